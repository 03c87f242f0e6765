# SPDX-License-Identifier: Apache-2.0
"""Whole tiny models of the families behind the experts interface: logits, every gradient, generation, in float64.

Each is the family's own architecture with small numbers in its config. What must agree is measured, not guessed: eager
runs again with its experts off by a rounding error (moe_kernels/demo/tolerance.py).
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from moe_kernels import hf  # noqa: E402
from moe_kernels.demo import families, tolerance  # noqa: E402

# Every word a config may use for a size; a config gets those that it has.
WORDS: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 128, "intermediate_size": 20, "moe_intermediate_size": 12,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_k": 2, "moe_topk": 2, "moe_top_k": 2, "top_k_experts": 2,
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "num_shared_experts": 1,
    "shared_expert_intermediate_size": 12, "shared_intermediate_size": 12,
    "moe_shared_expert_intermediate_size": 12, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "qk_head_dim": 16, "v_head_dim": 8, "mamba_d_state": 8,
    "mamba_d_head": 16, "mamba_n_heads": 4, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8,
    "n_groups": 2, "mamba_dt_rank": 4, "mamba_chunk_size": 8, "chunk_size": 8, "router_hidden_size": 16,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
MIXED = ["linear_attention", "full_attention"]

# family -> what its config needs besides
MODELS: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "aria_text": {},
    "axk1": {"num_key_value_heads": 4},
    "axk2": {"num_key_value_heads": 4},
    "cohere2_moe": {},
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "deepseek_v32": {"num_key_value_heads": 4},
    "deepseek_v4": {},
    "dots1": {},
    "ernie4_5_moe": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "flint": {"mlp_only_layers": [0], "layer_types": ["full_attention"] * 2},
    "glm4_moe": {},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "glm_moe_dsa": {"num_key_value_heads": 4},
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {"layer_types": MIXED},
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0, "use_mamba_kernels": False},
    "kolibri1": {},
    "laguna": {},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "mixtral": {},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention"], "num_hidden_layers": None},
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe_text": {"layer_types": MIXED},
    "qwen3_moe": {},
    "qwen3_next": {"layer_types": MIXED},
    "solar_open": {},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid"] * 2},
}


def build(name: str) -> Any:
    """The model in float64 with eager experts and random weights."""
    mapping = importlib.import_module("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    config_class = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING[name]
    default = config_class()
    words = {key: value for key, value in WORDS.items() if hasattr(default, key)}
    words.update(MODELS[name])
    config = config_class(**{key: value for key, value in words.items() if value is not None or key.endswith("_id")})
    config._experts_implementation = "eager"
    model = getattr(transformers, mapping[name])(config).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.08, generator=generator)
    model.set_experts_implementation("eager")
    return model


# Families whose own eager code sums in float32: nothing can agree with them beyond that.
SINGLE = {"nemotron_h"}


def test_enough_families() -> None:
    assert len(MODELS) >= 20


def compare(model: Any, dtype: torch.dtype) -> float:
    """Logits, loss and every gradient, ours against eager's: the largest error as a share of its bound."""
    layers = tolerance.experts_modules(model)
    assert layers, "no MoE layer: the config above is wrong"
    ids = torch.randint(1, 64, (2, 10), generator=torch.Generator().manual_seed(1))
    delta = tolerance.layer_delta(32, 20, 2, dtype)
    before = families.outputs_and_gradients(model, ids)
    with tolerance.nudged(model, delta, 1):
        nudged = families.outputs_and_gradients(model, ids)
    model.set_experts_implementation(hf.NAME)
    with families.count_calls() as calls:
        after = families.outputs_and_gradients(model, ids)
    assert calls[0] == len(layers)
    assert before.keys() == after.keys()
    for module in layers:  # every expert weight took part in the comparison, and not with a gradient of 0
        assert all(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
    limits = {key: tolerance.bound(value, [nudged[key]], delta) for key, value in before.items()}
    return max(tolerance.distance(value, after[key]) / (limits[key] or 1e-300) for key, value in before.items())


@pytest.mark.parametrize("name", MODELS)
def test_family(name: str) -> None:
    """Logits, loss, the gradient of every parameter, and greedy generation are eager's; every MoE layer ran ours."""
    model = build(name)
    prompt = torch.randint(1, 64, (2, 5), generator=torch.Generator().manual_seed(2))
    tokens = model.generate(prompt, max_new_tokens=3, do_sample=False)
    assert compare(model, torch.float32 if name in SINGLE else torch.float64) <= 1.0
    assert torch.equal(model.generate(prompt, max_new_tokens=3, do_sample=False), tokens)


def test_the_comparison_sees_a_float32_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: an input that passes through float32 must be noticed."""
    right = hf.experts_forward

    def wrong(module: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return right(module, x.float().to(x.dtype), ids, weights)

    monkeypatch.setattr(hf, "experts_forward", wrong)
    assert compare(build("qwen3_moe"), torch.float64) > 4
