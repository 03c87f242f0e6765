# SPDX-License-Identifier: Apache-2.0
"""Small configs of every family of the table, and the blocks that transformers builds from them."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels import MoELayer
from moe_kernels.hf import state

CONFIGS = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING

# ---- tiny configs and their blocks

TINY: dict[str, Any] = {
    "hidden_size": 32, "d_model": 32, "intermediate_size": 20, "moe_intermediate_size": 12, "d_ff": 20,
    "shared_expert_intermediate_size": 28, "shared_intermediate_size": 28, "moe_shared_expert_intermediate_size": 28,
    "shared_experts_intermediate_size": 14, "share_expert_dim": 28, "expert_ffn_hidden_size": 12, "moe_hidden_size": 24,
    "router_hidden_size": 10, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8,
    "num_experts_per_tok": 3, "moe_topk": 3, "moe_k": 3, "moe_top_k": 3, "top_k_experts": 3, "zero_expert_num": 3,
    "n_group": 4, "topk_group": 2, "n_shared_experts": 2, "num_shared_experts": 2, "moe_num_shared_experts": 2,
    "routed_scaling_factor": 1.7, "router_scaling_factor": 1.7, "route_scale": 1.7, "moe_routed_scaling_factor": 1.7,
    "moe_router_scaling_factor": 1.7, "swiglu_limit": 0.4, "mlp_gate_softcap": 0.5, "mlp_up_softcap": 0.5,
    "num_hidden_layers": 4, "num_layers": 4, "vocab_size": 16, "enable_moe_block": True, "expert_capacity": 3,
    "moe_router_logit_softcapping": 0.6, "router_bias": True, "swiglu_limits": [0.4] * 4,
    "swiglu_limits_shared": [0.3] * 4, "num_attention_heads": 4, "num_key_value_heads": 4, "mamba_n_heads": 4,
}  # fmt: skip

BLOCKS = {
    "afmoe": "AfmoeSparseMoeBlock",
    "aria_text": "AriaTextMoELayer",
    "axk1": "AXK1MoE",
    "axk2": "AXK2MoE",
    "bailing_hybrid": "BailingHybridMoE",
    "beam": "BeamMoE",
    "cohere2_moe": "Cohere2MoeSparseMoeBlock",
    "dbrx": "DbrxFFN",
    "deepseek_ocr2_text": "DeepseekOcr2TextMoe",
    "deepseek_v2": "DeepseekV2Moe",
    "deepseek_v3": "DeepseekV3MoE",
    "deepseek_v32": "DeepseekV32MoE",
    "deepseek_v4": "DeepseekV4SparseMoeBlock",
    "diffusion_gemma_text": "DiffusionGemmaTextRouter + DiffusionGemmaTextExperts + DiffusionGemmaRMSNorm",
    "dots1": "Dots1MoE",
    "dots3_note_text": "Dots3NoteTextMoE",
    "dots3_note_vision_encoder": "Dots3NoteVisionMoE",
    "ernie4_5_moe": "Ernie4_5_MoeSparseMoeBlock",
    "ernie4_5_vl_moe_text": "Ernie4_5_VLMoeMoeBlock",
    "exaone_moe": "ExaoneMoeSparseMoEBlock",
    "flex_olmo": "FlexOlmoSparseMoeBlock",
    "flint": "FlintSparseMoeBlock",
    "gemma4_text": "Gemma4TextRouter + Gemma4TextExperts + Gemma4RMSNorm",
    "glm4_moe": "Glm4MoeMoE",
    "glm4_moe_lite": "Glm4MoeLiteMoE",
    "glm4v_moe_text": "Glm4vMoeTextMoE",
    "glm5_next_text": "Glm5NextTextMoE",
    "glm_moe_dsa": "GlmMoeDsaMoE",
    "gpt_oss": "GptOssMLP",
    "granitemoe": "GraniteMoeMoE",
    "granitemoe_swa": "GraniteMoeSWAMoE + GraniteMoeSWAMLP",
    "granitemoehybrid": "GraniteMoeHybridMoE + GraniteMoeHybridMLP",
    "granitemoeshared": "GraniteMoeSharedMoE + GraniteMoeSharedMLP",
    "hunyuan_v1_moe": "HunYuanMoEV1Moe",
    "hy_v3": "HYV3MoE",
    "hy_v4": "HYV4MoE",
    "inkling2_text": "Inkling2SparseMoeBlock",
    "inkling_text": "InklingMoE",
    "jamba": "JambaSparseMoeBlock",
    "jetmoe": "JetMoeMoE",
    "kimi_linear": "KimiLinearMoE",
    "kolibri1": "Kolibri1SparseMoeBlock",
    "laguna": "LagunaSparseMoeBlock",
    "lfm2_moe": "Lfm2MoeSparseMoeBlock",
    "llama4_text": "Llama4TextMoe",
    "longcat_flash": "LongcatFlashMoE",
    "mellum": "MellumSparseMoeBlock",
    "mimo_v2_flash": "MiMoV2FlashMoE",
    "minimax": "MiniMaxSparseMoeBlock",
    "minimax_m2": "MiniMaxM2SparseMoeBlock",
    "minimax_m3_vl_text": "MiniMaxM3VLSparseMoeBlock",
    "mistral4": "Mistral4MoE",
    "mistral_large4_text": "MistralLarge4TextMoE",
    "mixtral": "MixtralSparseMoeBlock",
    "muse_spark_text": "MuseSparkMoE",
    "nemotron_h": "NemotronHMoE",
    "olmoe": "OlmoeSparseMoeBlock",
    "openai_privacy_filter": "OpenAIPrivacyFilterMLP",
    "phimoe": "PhimoeSparseMoeBlock",
    "qwen2_moe": "Qwen2MoeSparseMoeBlock",
    "qwen3_5_moe_text": "Qwen3_5MoeSparseMoeBlock",
    "qwen3_moe": "Qwen3MoeSparseMoeBlock",
    "qwen3_next": "Qwen3NextSparseMoeBlock",
    "qwen3_omni_moe_talker_text": "Qwen3OmniMoeTalkerTextSparseMoeBlock",
    "qwen3_omni_moe_text": "Qwen3OmniMoeThinkerTextSparseMoeBlock",
    "qwen3_vl_moe_text": "Qwen3VLMoeTextSparseMoeBlock",
    "qwen4_exp_text": "Qwen4ExpTextSparseMoeBlock",
    "solar_open": "SolarOpenMoE",
    "step3p5": "Step3p7SparseMoeBlock",
    "switch_transformers": "SwitchTransformersSparseMLP",
    "unlimited_ocr_text": "UnlimitedOcrTextMoe",
    "zaya": "ZayaSparseMoeBlock",
}

SPECIAL: dict[str, dict[str, Any]] = {
    "dbrx": {"ffn_config": {"ffn_hidden_size": 12, "moe_num_experts": 8, "moe_top_k": 3}},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [12, 6]},
    "llama4_text": {"num_experts_per_tok": 2},
    "nemotron_h": {"layers_block_type": ["moe"] * 4},
    "phimoe": {"num_experts_per_tok": 2, "router_jitter_noise": 0.2},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 28},
    "switch_transformers": {"num_sparse_encoder_layers": 4, "num_decoder_layers": 4},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(kind: str, changes: dict[str, Any] | None = None) -> Any:
    """A small config of a model_type: TINY's values for the fields that its class has."""
    cls = CONFIGS[kind]
    fields = {name for base in cls.__mro__ for name in vars(base).get("__annotations__", {})}
    values = {name: value for name, value in TINY.items() if name in fields}
    if "mlp_layer_types" in fields:
        values["mlp_layer_types"] = ["moe" if kind == "deepseek_v4" else "sparse"] * 4
    config = cls(**(values | SPECIAL.get(kind, {}) | (changes or {})))
    config._experts_implementation = "eager"
    return config


class Beside(nn.Module):
    """The parts of a MoE that lie beside each other in a decoder layer, by their names there."""

    def __init__(self, modeling: Any, names: str, config: Any) -> None:
        super().__init__()
        first, second, *norm = (getattr(modeling, name) for name in names.split(" + "))
        self.gemma = bool(norm)
        if self.gemma:
            self.router, self.experts = first(config), second(config)
            self.pre_feedforward_layernorm_2 = norm[0](config.hidden_size, eps=config.rms_norm_eps)
            self.post_feedforward_layernorm_2 = norm[0](config.hidden_size, eps=config.rms_norm_eps)
        else:
            self.block_sparse_moe = first(config)
            self.shared_mlp = second(config) if config.shared_intermediate_size else None

    def forward(self, x: Tensor) -> Tensor:
        """As the decoder layers of Gemma 4 and Granite compute it."""
        if self.gemma:
            rows = x.reshape(-1, x.shape[-1])
            _, weights, ids = self.router(rows)
            y = self.experts(self.pre_feedforward_layernorm_2(rows), ids, weights).reshape(x.shape)
            return self.post_feedforward_layernorm_2(y)
        y = self.block_sparse_moe(x)
        return y if self.shared_mlp is None else y + self.shared_mlp(x)


def build(kind: str, config: Any, layer_idx: int = 0) -> nn.Module:
    """The family's block with random weights and buffers."""
    names = BLOCKS[kind]
    home = type(config).__module__
    modeling = importlib.import_module(home.replace("configuration_", "modeling_"))
    if " + " in names:
        block: nn.Module = Beside(modeling, names, config)
    else:
        cls = getattr(modeling, names)
        block = cls(config, layer_idx) if "layer_idx" in cls.__init__.__code__.co_varnames else cls(config)
    if hasattr(block, "post_mlp_layernorm"):  # A.X-K1: not part of the layer
        block.post_mlp_layernorm = nn.Identity()
    generator = torch.Generator().manual_seed(len(kind))
    with torch.no_grad():
        for name, t in block.state_dict(keep_vars=True).items():
            if t.is_floating_point():
                t.copy_(torch.randn(t.shape, generator=generator) * (0.1 if "bias" in name else 0.3) + ("norm" in name))
            else:  # a table of experts: different ones for a token
                t.copy_(torch.rand(t.shape[0], 8, generator=generator).argsort(1)[:, : t.shape[1]])
    return block.eval()


def filled(kind: str, config: Any) -> tuple[nn.Module, MoELayer]:
    """The family's block and the layer from its config, with the same weights."""
    block, layer = build(kind, config), MoELayer.from_config(config).eval()
    layer.load_state_dict(state.state_dict_from(block, layer))
    return block, layer
