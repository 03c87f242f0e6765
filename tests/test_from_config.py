# SPDX-License-Identifier: Apache-2.0
"""MoELayer.from_config: every family of the table against its own block in transformers, and every refusal."""

from __future__ import annotations

import copy
import importlib
import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from test_hf_classes import experts_classes  # noqa: E402
from tiny_configs import BLOCKS, CONFIGS, build, filled, tiny_config  # noqa: E402

from moe_kernels import MoELayer  # noqa: E402
from moe_kernels.hf import state  # noqa: E402
from moe_kernels.hf.config import layer_kwargs  # noqa: E402
from moe_kernels.hf.families import FAMILIES, REFUSED  # noqa: E402
from moe_kernels.testing import assert_matches, must_fail_when_perturbed  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:MoELayer.from_config")
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
    block, layer = filled(kind, tiny_config(kind, changes))
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


DOUBLE = ("aria_text", "cohere2_moe", "dbrx", "deepseek_v4", "gpt_oss", "lfm2_moe", "mistral4", "phimoe")


@pytest.mark.parametrize("kind", DOUBLE)
def test_layer_equals_block_in_float64(kind: str) -> None:
    """Where transformers' own code keeps float64: constants such as LFM2's 1e-6 show."""
    block, layer = filled(kind, tiny_config(kind, {"expert_selection_fn": "sigmoid"} if kind == "cohere2_moe" else {}))
    block, layer = block.double(), layer.double()
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    with torch.no_grad():
        truth = output(block(x), x)
        assert_matches(layer(x), truth, 256 * 2**-53 * float(truth.abs().max()), kind)


def test_zaya_routers_follow_each_other() -> None:
    """Two layers in a row: the second router takes the first one's states, and its gradient flows back into them."""
    config = tiny_config("zaya")
    blocks = [build("zaya", config, i) for i in (0, 1)]
    layers = [MoELayer.from_config(config, layer_idx=i).eval() for i in (0, 1)]
    for block, layer in zip(blocks, layers):
        layer.load_state_dict(state.state_dict_from(block, layer))
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(7))
    with pytest.raises(RuntimeError, match=r"call layer.router.follow\(layer_before.router\), and run "):
        layers[1](x)
    layers[1].router.follow(layers[0].router)
    y, states = blocks[0](x)
    truth, _ = blocks[1](x + y, states)
    y1 = layers[1](x + layers[0](x))
    truth.sum().backward()
    y1.sum().backward()
    for block, layer in zip(blocks, layers):
        wanted = state.state_dict_from(as_gradients(block), layer)
        for name, p in layer.named_parameters():
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            want = wanted[name].double()
            assert_matches(grad, want, 64 * 2**-24 * (float(want.abs().max()) + 1e-6), name)
    assert float(layers[1].router.router_states_scale.grad.abs().max()) > 0
    again = copy.deepcopy(nn.ModuleList(layers))
    assert torch.equal(again[1](x + again[0](x)), y1)


def test_layers_that_differ() -> None:
    """A number a layer, a kind of router a layer, a limit a layer."""
    assert layer_kwargs(tiny_config("hunyuan_v1_moe", {"moe_topk": [1, 2, 3, 4]}), 2)["top_k"] == 3
    config = tiny_config("deepseek_v4", {"mlp_layer_types": ["hash_moe", "moe", "moe", "moe"]})
    assert [layer_kwargs(config, i)["router"].token_table for i in (0, 1)] == [16, None]
    config = tiny_config("step3p5", {"swiglu_limits": [0.0, 0.5, 0.7, 0.0]})
    assert MoELayer.from_config(config, layer_idx=2).experts.activation.limit == 0.7
    assert layer_kwargs(config, 3)["activation"] == "silu" and "experts" not in layer_kwargs(config, 3)
    own = {"per_layer_config": {i: {"num_local_experts": 4 + i, "num_experts_per_tok": 1 + i} for i in range(4)}}
    config = tiny_config("dots3_note_vision_encoder", own)
    for c in (config, json.loads(config.to_json_string(use_diff=False))):
        assert [(layer_kwargs(c, i)["num_experts"], layer_kwargs(c, i)["top_k"]) for i in (0, 3)] == [(4, 1), (7, 4)]


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
    block, layer = filled(kind, config)
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
        if i in want:
            layer_kwargs(config, i, device="meta")
        elif i not in want:
            with pytest.raises(ValueError, match=rf"layer {i} of this {kind} config is dense; its MoE layers are "):
                layer_kwargs(config, i)
    with pytest.raises(ValueError, match=rf"layer_idx must be in 0..{depth - 1} for this {kind} config, got {depth}"):
        layer_kwargs(config, depth)
