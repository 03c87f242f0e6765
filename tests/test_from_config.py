# SPDX-License-Identifier: Apache-2.0
"""MoELayer.from_config: every family of the table against its own block in transformers, and every refusal."""

from __future__ import annotations

import copy
import importlib
import json
import math
import pickle
import re
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from test_hf_classes import experts_classes  # noqa: E402

from moe_kernels import MoELayer, Router  # noqa: E402
from moe_kernels.hf import state  # noqa: E402
from moe_kernels.hf.config import find, layer_kwargs  # noqa: E402
from moe_kernels.hf.families import FAMILIES, REFUSED  # noqa: E402
from moe_kernels.testing import assert_matches, must_fail_when_perturbed  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:MoELayer.from_config")
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

# Settings that change what the block computes, each on one family that reads it.
VARIANTS = [
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("deepseek_v3", {"norm_topk_prob": False}),
    ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
    ("deepseek_v2", {"topk_method": "group_limited_greedy"}),
    ("deepseek_v2", {"mlp_bias": True}),
    ("deepseek_v4", {"scoring_func": "sigmoid", "mlp_bias": True}),
    ("deepseek_v4", {"mlp_layer_types": ["hash_moe"] * 4}),
    ("cohere2_moe", {"shared_expert_combination_strategy": "sum"}),
    ("cohere2_moe", {"expert_selection_fn": "sigmoid"}),
    ("cohere2_moe", {"expert_selection_fn": "sigmoid", "norm_topk_prob": False}),
    ("aria_text", {"mlp_bias": True, "hidden_act": "gelu_new"}),
    ("ernie4_5_moe", {"use_bias": True, "moe_num_shared_experts": 1}),
    ("lfm2_moe", {"use_expert_bias": False}),
    ("laguna", {"moe_router_logit_softcapping": 0.0}),
    ("nemotron_h", {"moe_latent_size": 24, "mlp_bias": True}),
    ("nemotron_h", {"mlp_hidden_act": "mish"}),
    ("longcat_flash", {"zero_expert_num": 0}),
    ("mixtral", {"hidden_act": "gelu"}),
    ("mixtral", {"hidden_act": "quick_gelu"}),
    ("qwen2_moe", {"hidden_act": "quick_gelu"}),
    ("switch_transformers", {"router_bias": False, "dense_act_fn": "gelu_new"}),
    ("step3p5", {"swiglu_limits": None, "swiglu_limits_shared": None}),
    ("granitemoeshared", {"shared_intermediate_size": 0}),
]
CASES = [(kind, {}) for kind in BLOCKS] + VARIANTS


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


def build(kind: str, config: Any) -> nn.Module:
    """The family's block with random weights and buffers."""
    names = BLOCKS[kind]
    home = type(config).__module__
    modeling = importlib.import_module(home.replace("configuration_", "modeling_"))
    if " + " in names:
        block: nn.Module = Beside(modeling, names, config)
    else:
        cls = getattr(modeling, names)
        block = cls(config, 0) if "layer_idx" in cls.__init__.__code__.co_varnames else cls(config)
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


def both(kind: str, config: Any) -> tuple[nn.Module, MoELayer]:
    """The family's block and the layer from its config, with the same weights."""
    block, layer = build(kind, config), MoELayer.from_config(config).eval()
    layer.load_state_dict(state.state_dict_from(block, layer))
    return block, layer


def output(result: Any, x: Tensor) -> Tensor:
    """The block's output out of whatever it returns."""
    y = result[0] if isinstance(result, tuple) else result
    return y.reshape(x.shape)


def as_gradients(block: nn.Module) -> nn.Module:
    """A block whose parameters are this one's gradients."""
    other = copy.deepcopy(block)
    with torch.no_grad():
        for p, q in zip(other.parameters(), block.parameters()):
            p.copy_(torch.zeros_like(q) if q.grad is None else q.grad)
    return other


@pytest.mark.parametrize(("kind", "changes"), CASES, ids=lambda v: str(v) if v != {} else "")
def test_layer_equals_block(kind: str, changes: dict[str, Any]) -> None:
    """Output, gradients of x and of every parameter, in float32: sums of at most 64 products."""
    block, layer = both(kind, tiny_config(kind, changes))
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 7, 32, generator=generator)
    g = torch.randn(x.shape, generator=generator)
    ids = torch.randint(0, 16, (2, 7), generator=generator)
    hashed = "hash_moe" in str(changes)
    x0, x1 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y0 = output(block(x0, ids) if hashed else block(x0), x)
    y1 = layer(x1, token_ids=ids if hashed else None)
    y0.backward(g)
    y1.backward(g)
    truth = state.state_dict_from(as_gradients(block), layer) | {"y": y0.detach(), "x": x0.grad}
    found = {name: p.grad for name, p in layer.named_parameters()} | {"y": y1.detach(), "x": x1.grad}
    for name, value in found.items():
        value = torch.zeros_like(truth[name]) if value is None else value
        bound = 64 * 2**-24 * (float(truth[name].abs().max()) + 1e-6)
        assert_matches(value, truth[name].double(), bound, name)
        must_fail_when_perturbed(value, truth[name].double(), bound, name)


def test_every_experts_class_is_reached() -> None:
    """The blocks above hold every class behind the experts interface of the installed transformers, and the table's."""
    assert set(BLOCKS) == set(FAMILIES)
    assert not set(FAMILIES) & set(REFUSED)
    held = {type(m).__name__ for kind in BLOCKS for m in build(kind, tiny_config(kind)).modules()}
    missing = {name for _, name in experts_classes()} - held
    assert not missing, f"no row of the table builds {missing}"


@pytest.mark.parametrize("kind", BLOCKS)
def test_weights_go_both_ways(kind: str) -> None:
    """What was taken from a block and is put into another one makes that one equal to the first."""
    config = tiny_config(kind)
    block, layer = both(kind, config)
    other = build(kind, config)
    with torch.no_grad():
        for t in other.state_dict(keep_vars=True).values():
            t.copy_(t * 0 if t.is_floating_point() else t)
    moved = state.state_dict_to(layer, other)
    left = {"vision_moe.", "experts.gate_up_proj"} if kind in ("ernie4_5_vl_moe_text", "longcat_flash") else set()
    for name, value in block.state_dict().items():
        if not any(name.startswith(prefix) for prefix in left):  # LongCat has rows for its zero experts
            assert torch.equal(moved[name], value), name
    layer.load_state_dict(state.state_dict_from(block, layer))
    assert moved.keys() == block.state_dict().keys()


def test_weights_that_do_not_fit_are_named() -> None:
    layer = MoELayer.from_config(tiny_config("qwen2_moe"))
    with pytest.raises(ValueError, match="MixtralSparseMoeBlock has nothing for the layer's shared_experts.w13, "):
        state.state_dict_from(build("mixtral", tiny_config("mixtral", {"intermediate_size": 12})), layer)
    with pytest.raises(ValueError, match=r"experts.gate_up_proj is \[8, 40, 32\], but experts.w13 wants \[8, 24, 32\]"):
        state.state_dict_from(build("mixtral", tiny_config("mixtral")), layer)
    with pytest.raises(ValueError, match="Sequential has nothing for the layer's router.weight, experts.w13"):
        state.state_dict_to(layer, nn.Sequential())


# ---- which layers are MoE

SCHEDULE: dict[str, Any] = {
    "num_hidden_layers": 8, "num_layers": 8, "first_k_dense_replace": 2, "num_dense_layers": 3,
    "decoder_sparse_step": 2, "mlp_only_layers": [3], "moe_layer_interval": 2, "moe_layer_start_index": 2,
    "expert_layer_period": 3, "expert_layer_offset": 1, "moe_layers": [1, 5], "num_sparse_encoder_layers": 2,
    "vocab_size": 300000, "mlp_layer_types": ["dense", "sparse"] * 4, "layers_block_type": ["moe", "mlp"] * 4,
    "swiglu_limits": None, "swiglu_limits_shared": None,
}  # fmt: skip
SCHEDULES: dict[str, dict[str, Any]] = {
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"] * 4},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["full_attention"] * 8},
}
MODELS = {
    "dots3_note_vision_encoder": "Dots3NoteVisionModel",
    "qwen3_omni_moe_talker_text": "Qwen3OmniMoeTalkerModel",
    "step3p5": "Step3p7TextModel",
    "switch_transformers": "SwitchTransformersEncoderModel",
}


@pytest.mark.parametrize("kind", sorted(set(BLOCKS) - {"dbrx", "ernie4_5_vl_moe_text", "qwen4_exp_text"}))
def test_dense_layers_are_where_the_model_has_them(kind: str) -> None:
    """Against the whole model on the meta device. (The three left out need more than sizes, and have no dense layers
    but Ernie's, by the rule of a dozen others.)"""
    fields = {name for base in CONFIGS[kind].__mro__ for name in vars(base).get("__annotations__", {})}
    changes = {name: value for name, value in SCHEDULE.items() if name in fields} | SCHEDULES.get(kind, {})
    config = tiny_config(kind, changes)
    modeling = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    block = BLOCKS[kind].partition(" ")[0]
    models = [name for name in vars(modeling) if re.search(r"(?<!PreTrained)(Text|Encoder|Vision|Talker)?Model$", name)]
    text = [name for name in models if "Text" in name] if kind.endswith("_text") else models
    best = MODELS.get(kind) or min(text, key=len)
    with torch.device("meta"):
        model = getattr(modeling, best)(config)
    names = [name for name, m in model.named_modules() if type(m).__name__ == block]
    want = sorted({int(re.findall(r"\d+", name)[0]) for name in names})
    depth = getattr(config, "num_layers" if kind == "longcat_flash" else "num_hidden_layers")
    assert want
    for i in range(depth):
        if i in want and (kind, i > 0) != ("zaya", True):
            layer_kwargs(config, i, device="meta")
        elif i not in want:
            with pytest.raises(ValueError, match=rf"layer {i} of this {kind} config is dense; its MoE layers are "):
                layer_kwargs(config, i)
    with pytest.raises(ValueError, match=rf"layer_idx must be in 0..{depth - 1} for this {kind} config, got {depth}"):
        layer_kwargs(config, depth)


# ---- what a config may be


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("aria", "text_config"),
        ("gemma4", "text_config"),
        ("glm4v_moe", "text_config"),
        ("llama4", "text_config"),
        ("qwen3_omni_moe", "thinker_config.text_config"),
        ("qwen3_vl_moe", "text_config"),
        ("step3p7", "text_config"),
    ],
)
def test_multimodal_configs_are_entered(kind: str, path: str) -> None:
    config = CONFIGS[kind]()
    inner = config
    for name in path.split("."):
        inner = getattr(inner, name)
    assert find(config)[0] is inner


@pytest.mark.parametrize("kind", BLOCKS)
def test_config_json_is_enough(kind: str) -> None:
    """The dict of config.json makes the same layer as the config object."""
    config = tiny_config(kind)
    plain = json.loads(config.to_json_string(use_diff=False))
    ours, theirs = layer_kwargs(plain, device="meta"), layer_kwargs(config, device="meta")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert str(ours[name]) == str(value), name


def test_released_dimensions_on_meta() -> None:
    """A layer of DeepSeek-V3's own size, without memory for it."""
    layer = MoELayer.from_config(CONFIGS["deepseek_v3"](), layer_idx=3, device="meta", dtype=torch.bfloat16)
    assert layer.experts.w13.shape == (256, 4096, 7168)
    assert layer.shared_experts.w2.shape == (7168, 2048)
    assert layer.router.e_score_correction_bias.dtype == torch.float32
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    want = Router(
        scoring_func="sigmoid", correction_bias=True, num_expert_group=8, topk_group=4, group_top=2,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    assert layer.router.settings == want


@pytest.mark.parametrize("kind", BLOCKS)
def test_meta_then_real(kind: str) -> None:
    """Every module of a family's layer takes device and dtype, and draws its own parameters."""
    layer = MoELayer.from_config(tiny_config(kind), device="meta", dtype=torch.bfloat16)
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(math.nan)
    layer.reset_parameters()
    for name, p in layer.state_dict().items():
        if name.endswith("token_table"):
            continue
        matrix = p.dim() > 1 and not name.endswith("bias")
        drawn = 0.015 < float(p.float().std()) < 0.4 if matrix else set(p.flatten().tolist()) <= {-1.0, 0.0, 1.0}
        assert bool(p.isfinite().all()) and drawn, name
    clone = copy.deepcopy(pickle.loads(pickle.dumps(layer)))
    assert str(clone) == str(layer)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "minimax_m2", "jamba", "olmoe"])
def test_same_experts_in_bfloat16(kind: str) -> None:
    """The router runs in the family's own precision: the same logits are chosen, to the bit. (Logits, not ids: bfloat16
    makes ties, which torch.topk breaks as it likes.)"""
    block, layer = both(kind, tiny_config(kind))
    block, layer = block.bfloat16(), layer.bfloat16()
    x = torch.randn(4, 64, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    seen: list[Tensor] = []
    block.experts.register_forward_pre_hook(lambda m, args: seen.append(args[1]))
    with torch.no_grad():
        block(x)
        layer(x)
        logits = layer.router.logits(x.reshape(-1, 32))
    theirs, ours = (logits.gather(1, ids.long()).sort(1).values for ids in (seen[0], layer.last_routing.topk_ids))
    assert torch.equal(theirs, ours)


# ---- losses


@pytest.mark.parametrize("kind", ["mixtral", "minimax_m2", "laguna", "qwen2_moe"])
def test_balance_loss(kind: str) -> None:
    """Attached where the config asks for router logits; the value and gradient of transformers' own function."""
    config = tiny_config(kind, {"output_router_logits": True, "router_aux_loss_coef": 0.7})
    layer = MoELayer.from_config(config)
    with torch.no_grad():
        layer.router.weight.mul_(20)
    modeling = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(3))
    logits = layer.router.logits(x.reshape(-1, 32)).detach().requires_grad_()
    capped = logits if kind != "laguna" else 0.6 * torch.tanh(logits / 0.6)
    truth = 0.7 * modeling.load_balancing_loss_func((capped,), 8, 3)
    (grad,) = torch.autograd.grad(truth, logits)
    layer(x)
    assert float((layer.aux_loss - truth).abs()) <= 16 * 2**-24 * float(truth.detach())
    layer.aux_loss.backward()
    want = grad.t() @ x.reshape(-1, 32)
    assert float((layer.router.weight.grad - want).abs().max()) <= 64 * 2**-24 * float(want.abs().max())
    assert MoELayer.from_config(tiny_config(kind, {"router_aux_loss_coef": 0.7})).losses == ()


def test_switch_losses() -> None:
    config = tiny_config("switch_transformers", {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.2})
    config.output_router_logits = True
    layer = MoELayer.from_config(config).eval()
    modeling = importlib.import_module("transformers.models.switch_transformers.modeling_switch_transformers")
    x = 40 * torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(3))
    layer(x)
    logits = layer.router.logits(x.reshape(-1, 32)).reshape(2, 9, 8)
    p = logits.softmax(-1)
    truth = 0.3 * modeling.load_balancing_loss_func(p, p.argmax(-1)) + 0.2 * modeling.router_z_loss_func(logits)
    assert float((layer.aux_loss - truth).abs()) <= 64 * 2**-24 * float(truth)


# ---- refusals


def test_no_mixture_of_experts() -> None:
    with pytest.raises(ValueError, match=r"'llama' is no Mixture of Experts: its config names no experts"):
        MoELayer.from_config(CONFIGS["llama"]())
    with pytest.raises(ValueError, match=r"this granitemoehybrid config is no Mixture of Experts: it has no experts"):
        MoELayer.from_config(tiny_config("granitemoehybrid", {"num_local_experts": 0}))
    with pytest.raises(ValueError, match=r"this gemma4_text config is no .*: all 4 layers are dense"):
        MoELayer.from_config(tiny_config("gemma4_text", {"enable_moe_block": False}))
    with pytest.raises(ValueError, match=r"this deepseek_v3 config is no .*: all 4 layers are dense"):
        MoELayer.from_config(tiny_config("deepseek_v3", {"first_k_dense_replace": 4}))
    with pytest.raises(ValueError, match="this mixtral config is no Mixture of Experts: it has no experts"):
        MoELayer.from_config({"model_type": "mixtral"})
    with pytest.raises(ValueError, match="'SimpleNamespace' is no Mixture of Experts: its config names no experts"):
        MoELayer.from_config({})
    for wrong in ("mistralai/Mixtral-8x7B-v0.1", None, 3):
        with pytest.raises(TypeError, match="hf_config must be a config or the dict of a config.json, got"):
            MoELayer.from_config(wrong)


def test_unknown_model_type_lists_the_known_ones() -> None:
    config = types.SimpleNamespace(model_type="mixtrel", num_experts=8)
    with pytest.raises(ValueError, match=r"model_type 'mixtrel' is not in the table; it knows afmoe, .*zaya. Give"):
        MoELayer.from_config(config)
    outer = types.SimpleNamespace(model_type="vlm", text_config={"model_type": "mixtrel", "num_experts": 8})
    with pytest.raises(ValueError, match=r"'mixtrel' in 'vlm'"):
        MoELayer.from_config(outer)


def test_layer_idx_is_an_int() -> None:
    for wrong in ("3", 1.0, True):
        with pytest.raises(TypeError, match="layer_idx must be an int or None, got"):
            MoELayer.from_config(tiny_config("mixtral"), layer_idx=wrong)
    with pytest.raises(ValueError, match=r"layer_idx must be in 0..3 for this mixtral config, got -1"):
        MoELayer.from_config(tiny_config("mixtral"), layer_idx=-1)


def test_settings_that_cannot_be_expressed() -> None:
    with pytest.raises(ValueError, match="router of layer 1 of a zaya model takes the router states of "):
        MoELayer.from_config(tiny_config("zaya"), layer_idx=1)
    two = {
        "ffn_config": {"ffn_hidden_size": 12, "moe_num_experts": 8, "moe_top_k": 3, "moe_normalize_expert_weights": 2.0}
    }
    with pytest.raises(ValueError, match=r"moe_normalize_expert_weights must be 1 or None, got 2.0"):
        MoELayer.from_config(tiny_config("dbrx", two))
    with pytest.raises(ValueError, match=r"scoring_func must be sigmoid, softmax or sqrtsoftplus, got 'tanh'"):
        MoELayer.from_config(tiny_config("deepseek_v4", {"scoring_func": "tanh"}))
    with pytest.raises(ValueError, match=r"no activation 'silly' in transformers; it has gelu"):
        MoELayer.from_config(tiny_config("mixtral", {"hidden_act": "silly"}))
    with pytest.raises(ValueError, match=r"a deepseek_v2 config must have num_experts_per_tok or .*, got none"):
        MoELayer.from_config(tiny_config("deepseek_v2", {"num_experts_per_tok": None}))


@pytest.mark.parametrize("kind", REFUSED)
def test_families_without_a_row_say_why(kind: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{kind} cannot be a MoELayer: {REFUSED[kind]}")):
        MoELayer.from_config(types.SimpleNamespace(model_type=kind))


def test_nllb_uses_two_experts_only() -> None:
    """Why NLLB has no row. When this fails, transformers has mended it and the row can be written."""
    config = CONFIGS["nllb-moe"](d_model=32, num_experts=4, expert_capacity=64)
    modeling = importlib.import_module("transformers.models.nllb_moe.modeling_nllb_moe")
    torch.manual_seed(0)
    block = modeling.NllbMoeSparseMLP(config, ffn_dim=20).eval()
    x = torch.randn(2, 50, 32)
    block(x).sum().backward()
    used = [i for i in range(4) if getattr(block.experts, f"expert_{i}").fc1.weight.grad is not None]
    assert used == [0, 1]


@pytest.mark.parametrize("kind", ["mixtral", "minimax_m2"])
def test_noise_on_the_input_warns(kind: str) -> None:
    with pytest.warns(UserWarning, match=rf"in training, {kind} multiplies .* noise \(router_jitter_noise=0.1\)"):
        MoELayer.from_config(tiny_config(kind, {"router_jitter_noise": 0.1}))


@pytest.mark.parametrize(
    ("kind", "rest"), [("axk1", "post_mlp_layernorm on"), ("ernie4_5_vl_moe_text", "experts for im")]
)
def test_what_is_left_out_warns(kind: str, rest: str) -> None:
    with pytest.warns(UserWarning, match=f"the block of {kind} also has {rest}.* leaves that to its caller"):
        MoELayer.from_config(tiny_config(kind))


@pytest.mark.parametrize("kind", ["gemma4_text", "inkling_text", "zaya", "deepseek_v4", "muse_spark_text", "kolibri1"])
def test_odd_layers_compile(kind: str) -> None:
    """Gates, experts and activations of single families trace as one graph and give the same numbers."""
    changes = {"mlp_layer_types": ["hash_moe"] * 4} if kind == "deepseek_v4" else {}
    layer = both(kind, tiny_config(kind, changes))[1]
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(5))
    ids = torch.arange(14).reshape(2, 7) if changes else None
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y0, y1 = layer(x, token_ids=ids), compiled(x, token_ids=ids)
    assert torch.equal(y0, y1)
    y0.sum().backward()
    before = {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad()
    y1.sum().backward()
    for name, p in layer.named_parameters():
        assert (p.grad is None) == (before[name] is None), name
        if p.grad is not None:
            assert float((p.grad - before[name]).abs().max()) <= 16 * 2**-24 * float(p.grad.abs().max() + 1e-6), name
