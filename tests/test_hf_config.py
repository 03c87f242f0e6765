# SPDX-License-Identifier: Apache-2.0
"""What MoELayer.from_config takes for a config, what it makes of it besides the numbers, and every refusal."""

from __future__ import annotations

import copy
import importlib
import json
import math
import pickle
import re
import types

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from tiny_configs import BLOCKS, CONFIGS, filled, tiny_config  # noqa: E402

from moe_kernels import MoELayer, Router  # noqa: E402
from moe_kernels.hf.config import find, layer_kwargs  # noqa: E402
from moe_kernels.hf.families import REFUSED  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:MoELayer.from_config")


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
    block, layer = filled(kind, tiny_config(kind))
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
    assert float((layer.aux_loss - truth).abs().detach()) <= 16 * 2**-24 * float(truth.detach())
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
    assert float((layer.aux_loss - truth).abs().detach()) <= 64 * 2**-24 * float(truth)


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
    layer = filled(kind, tiny_config(kind, changes))[1]
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
