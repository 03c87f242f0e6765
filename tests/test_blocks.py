# SPDX-License-Identifier: Apache-2.0
"""Blocks outside the experts interface: tiny whole models before and after `replace`, and the parts on their own."""

from __future__ import annotations

import importlib
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

import block_models  # noqa: E402
from block_models import LAYERS, MODELS, build, run, same, tokens  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import moe_kernels as mk  # noqa: E402
from moe_kernels.hf.blocks import mlp  # noqa: E402

GOLDEN = Path(__file__).with_name("golden")
EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}
# LongCat-Flash's own router, and its weights, are float32 in a float64 model: nothing can agree beyond that.
EXACT_TO = {family: EPS[torch.float32 if family == "longcat_flash" else torch.float64] for family in MODELS}
ROUTER_LOGITS = {f: {} if f == "longcat_flash" else {"output_router_logits": True} for f in MODELS}


@pytest.mark.parametrize("family", list(MODELS))
def test_whole_model(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, loss, router logits, aux loss, all gradients, greedy generation; and their code is really not run."""
    model = build(family)
    before = run(model, **ROUTER_LOGITS[family])
    words = model.generate(tokens(2, 5), max_new_tokens=8, do_sample=False)
    report = mk.replace(model, strict=True)
    assert report.ok and len(report.taken) == LAYERS[family]
    for layer in (m for m in model.modules() if "forward" in vars(m)):
        monkeypatch.setattr(type(layer), "forward", None)
    after = run(model, **ROUTER_LOGITS[family])
    same(before, after, EXACT_TO[family])
    if ROUTER_LOGITS[family]:
        assert any("router_logits" in name for name in after)
        assert family == "llama4" or any("aux_loss" in name for name in after)
    assert torch.equal(model.generate(tokens(2, 5), max_new_tokens=8, do_sample=False), words)


@pytest.mark.parametrize("family", list(MODELS))
def test_the_comparison_sees_a_wrong_layer(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: routing weights rounded to float32 (LongCat-Flash: bfloat16) in one op are noticed."""
    model = build(family)
    before = run(model)
    mk.replace(model, strict=True)
    dtype = torch.bfloat16 if family == "longcat_flash" else torch.float32
    for name in ("fused_experts", "grouped_gemm"):
        right = getattr(mlp.ops, name)

        def wrong(*args: Any, right: Any = right, **options: Any) -> torch.Tensor:
            return right(args[0].to(dtype).to(args[0].dtype), *args[1:], **options)

        monkeypatch.setattr(mlp.ops, name, wrong)
    with pytest.raises(AssertionError, match="off by"):
        same(before, run(model), EXACT_TO[family])


@pytest.mark.parametrize("family", list(MODELS))
def test_float32_and_a_saved_model(family: str, tmp_path: Path) -> None:
    """Saved after the replacement, a plain transformers loads it and computes the same; keys are the ones it had."""
    model = build(family, torch.float32)
    keys, before = list(model.state_dict()), run(model)
    mk.replace(model, strict=True)
    assert list(model.state_dict()) == keys
    same(before, run(model), 4 * EPS[torch.float32])  # two layers, attention included: their own rounding doubles it
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, experts_implementation="eager").eval()
    assert not [m for m in loaded.modules() if "forward" in vars(m)]
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    same(before, run(loaded), EPS[torch.float32])


@pytest.mark.parametrize("family", list(MODELS))
def test_training_steps(family: str) -> None:
    """Three steps of AdamW end at the same parameters: nothing stale is read after an update."""
    model = build(family)
    other = block_models.clone(model)
    mk.replace(other, strict=True)
    for m in (model, other):
        optimiser = torch.optim.AdamW(m.parameters(), lr=1e-2, eps=1e-3)
        for _ in range(3):
            optimiser.zero_grad()
            m(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
            for p in m.parameters():  # of an expert without tokens: theirs has no gradient, ours one of 0
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            optimiser.step()
    exact = (
        1e-5 if family == "longcat_flash" else 1e-11
    )  # a step moves by lr * g / (|g| + eps): errors grow by lr / eps
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        assert float((a - b).detach().abs().max()) <= exact, name


@pytest.mark.parametrize("family", ["dbrx", "llama4"])
def test_compile_in_one_graph(family: str) -> None:
    """A replaced model compiles with fullgraph=True, for training too; outputs and gradients stay."""
    model = build(family, torch.float32)
    mk.replace(model, strict=True)
    before = run(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    result = compiled(input_ids=tokens(), labels=tokens(), use_cache=False)
    result.loss.backward()
    found = {"logits": result.logits.detach(), "loss": result.loss.detach()}
    found |= {"grad " + n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
    same({name: before[name] for name in found}, found, 4 * EPS[torch.float32])


def test_compile_with_their_graph_breaks() -> None:
    """JetMoE's router makes a Python list of counts: the graph breaks there and goes on behind it."""
    block = build("jetmoe").model.layers[0].mlp
    mk.replace(block, strict=True)
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    want = block(x)
    torch._dynamo.reset()
    got = torch.compile(block, backend="aot_eager")(x)
    same({"y": want.detach()}, {"y": got.detach()}, 4 * EPS[torch.float64])


BLOCKS = {  # the rest of these models breaks the graph, or takes long
    "switch_transformers": lambda model: model.encoder.block[1].layer[1].mlp,
    "nllb_moe": lambda model: model.model.encoder.layers[1].ffn,
    "longcat_flash": lambda model: model.model.layers[0].mlp,
}


@pytest.mark.parametrize("family", list(BLOCKS))
def test_compile_the_block_in_one_graph(family: str) -> None:
    block = BLOCKS[family](build(family))
    mk.replace(block, strict=True)
    x, weight = torch.randn(2, 7, 32, dtype=torch.float64), next(block.experts.parameters())
    want = block(x)
    (want_grad,) = torch.autograd.grad(want.sum(), weight)
    torch._dynamo.reset()
    got = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    (got_grad,) = torch.autograd.grad(got.sum(), weight)
    found = {"y": got.detach(), "grad weight": got_grad}
    same({"y": want.detach(), "grad weight": want_grad}, found, 4 * EPS[torch.float64])


# ---- Switch Transformers and NLLB-MoE


def test_switch_drops_per_sequence() -> None:
    """With room for one token an expert and sequence some are dropped, in both alike; a dropped token outputs 0."""
    model = build("switch_transformers", expert_capacity=1)
    before = run(model)
    mk.replace(model, strict=True)
    same(before, run(model), EXACT_TO["switch_transformers"])
    block = model.encoder.block[1].layer[1].mlp
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    mask, _, _ = block.router(x)
    dropped = mask.sum(-1) == 0
    assert dropped.any() and not dropped.all()
    y = block(x)
    assert bool((y[dropped] == 0).all()) and bool((y[~dropped] != 0).any(-1).all())


def test_switch_golden() -> None:
    """The recorded layer: output and gradients of every expert."""
    data = load_file(GOLDEN / "hf_switch.safetensors")
    home = importlib.import_module("transformers.models.switch_transformers.modeling_switch_transformers")
    config = transformers.SwitchTransformersConfig(
        d_model=24, d_ff=16, num_experts=8, expert_capacity=2, router_jitter_noise=0.0, dropout_rate=0.0
    )
    block = home.SwitchTransformersSparseMLP(config)
    block.load_state_dict({k.removeprefix("param."): v for k, v in data.items() if k.startswith("param.")})
    assert mk.replace(block, strict=True).taken[0].name == "experts"
    x = data["x"].clone().requires_grad_()
    y = block(x)
    torch.testing.assert_close(y, data["y"], rtol=1e-4, atol=1e-5)
    y.backward(data["gy"])
    torch.testing.assert_close(x.grad, data["grad_x"], rtol=1e-4, atol=1e-5)
    for name, p in block.named_parameters():
        torch.testing.assert_close(p.grad, data["grad." + name], rtol=1e-4, atol=1e-5)


def test_switch_jitter_and_dropout_in_training() -> None:
    """Jitter is the router's own; dropout is drawn as one mask: mean and rate are right, not the single draws."""
    block = build("switch_transformers", router_jitter_noise=0.1, dropout_rate=0.5, expert_capacity=9999)
    layer = block.encoder.block[1].layer[1].mlp
    for expert in layer.experts.values():  # every hidden unit is 1 for x = 1, and the output is their sum
        nn.init.constant_(expert.wi.weight, 1 / 32)
        nn.init.ones_(expert.wo.weight)
    mk.replace(block, strict=True)
    layer.train()
    x = torch.ones(4, 500, 32, dtype=torch.float64)
    mask, probability, _ = layer.router(x.clone())
    y = layer.experts(x.view(-1, 32), mask.view(-1, 1, 4), torch.ones(2000, 1, dtype=torch.float64))
    kept = (y[:, 0] / 2).round()  # each kept unit counts 1 / (1 - 0.5)
    assert torch.allclose(kept * 2, y[:, 0]) and kept.unique().numel() > 5
    assert abs(float(y[:, 0].mean()) / 21 - 1) < 5 * (1 / (2000 * 21)) ** 0.5
    assert float(probability.std()) > 0  # equal tokens, unequal jitter


def test_nllb_training_dropout() -> None:
    """moe_token_dropout works on the weighted output of each expert: at rate 1 - 1/n, kept elements count n times."""
    model = build("nllb_moe", moe_token_dropout=0.75)
    experts = model.model.encoder.layers[1].ffn.experts
    mk.replace(model, strict=True)
    x = torch.randn(400, 32, dtype=torch.float64)
    mask = nn.functional.one_hot(torch.randint(0, 4, (400,)), 4)
    probs = mask.double() * 0.7 + mask.roll(1, 1).double() * 0.3
    clean = {e: experts[f"expert_{e}"](x) * share for e, share in ((0, 0.3), (1, 0.7))}
    experts.train()
    y = experts(x, mask, probs)
    options = torch.stack([torch.zeros_like(y), 4 * clean[0], 4 * clean[1], 4 * (clean[0] + clean[1])])
    nearest = (options - y).abs().min(0)
    assert float(nearest.values.max()) < 1e-12
    share = torch.bincount(nearest.indices.flatten(), minlength=4) / y.numel()
    wanted = torch.tensor([0.5625, 0.1875, 0.1875, 0.0625])
    assert float((share - wanted).abs().max()) < 5 * 0.5 / y.numel() ** 0.5


def test_nllb_that_computes_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("nllb_moe")
    kind = type(model.model.encoder.layers[1].ffn.experts)
    monkeypatch.setattr(kind, "forward", lambda self, hidden_states, router_mask, router_probs: None)
    report = mk.replace(model)
    assert not report.ok and "does not know" in report.skipped[0].reason


def test_llama4_choice_of_two() -> None:
    model = build("llama4", num_experts_per_tok=2)
    before = run(model)
    mk.replace(model, strict=True)
    same(before, run(model), EXACT_TO["llama4"])


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("switch_transformers", {"dense_act_fn": "tanh"}),
        ("llama4", {"hidden_act": "tanh"}),
        ("longcat_flash", {"hidden_act": "tanh"}),
        ("jetmoe", {"activation_function": "tanh"}),
        ("nllb_moe", {"activation_function": "tanh"}),
    ],
)
def test_unfused_path(family: str, words: dict[str, str]) -> None:
    """An activation that we do not fuse runs step by step, and the report says so."""
    model = build(family, **words)
    before = run(model)
    report = mk.replace(model, strict=True)
    assert any("unfused path (Tanh" in entry.how for entry in report.taken), report
    same(before, run(model), EXACT_TO[family])


def test_second_weight_in_another_dtype() -> None:
    """T5 checkpoints keep wo in float32 beside 16-bit experts."""
    model = build("switch_transformers", torch.bfloat16)
    experts = model.encoder.block[1].layer[1].mlp.experts
    for expert in experts.values():
        expert.wo.float()
    x = torch.randn(40, 32).bfloat16()
    mask = nn.functional.one_hot(torch.arange(40) % 4, 4)[:, None]
    share = torch.full((40, 1), 0.5, dtype=torch.bfloat16)
    before = experts(x, mask, share)
    mk.replace(experts, strict=True)
    after = experts(x, mask, share)
    assert after.dtype == before.dtype
    # Hidden rows and the output are rounded to bfloat16 once each on both sides.
    torch.testing.assert_close(after, before, rtol=4 * EPS[torch.bfloat16], atol=4 * EPS[torch.bfloat16])


# ---- the two vision and Step families


def test_vitpose() -> None:
    config = transformers.VitPoseBackboneConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_experts=3, part_features=8,
        image_size=[32, 32], patch_size=[8, 8],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.VitPoseBackbone(config).double().eval()

    def call() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        y = model(pixels, dataset_index=torch.tensor([2, 0, 0, 7])).feature_maps[-1]  # 7 is no expert, 1 gets no image
        y.square().sum().backward()
        grads = {"grad " + n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
        return {"y": y.detach(), **{n: g.clone() for n, g in grads.items()}}

    before = call()
    report = mk.replace(model, strict=True)
    assert [e.kind for e in report.taken] == ["VitPoseNaiveMoe"] * 2
    same(before, call(), 8 * EPS[torch.float64])  # behind a LayerNorm the large parts of a gradient cancel


@pytest.mark.parametrize("limit", [0.0, 0.05])
def test_step3p7(limit: float) -> None:
    home = importlib.import_module("transformers.models.step3p7.modeling_step3p7")
    config = types.SimpleNamespace(
        num_local_experts=5, hidden_size=16, moe_intermediate_size=12, hidden_act="silu", swiglu_limits=[limit],
        swiglu_limits_shared=None, num_experts_per_tok=2, share_expert_dim=12, mlp_bias=False, intermediate_size=12,
        moe_router_scaling_factor=1.5,
    )  # fmt: skip
    block = home.Step3p7SparseMoeBlock(config, 0).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3)
    x = torch.randn(2, 7, 16, generator=generator, dtype=torch.float64)

    def call() -> dict[str, torch.Tensor]:
        block.zero_grad()
        y = block(x)
        y.square().sum().backward()
        return {"y": y.detach(), **{"grad " + n: p.grad.clone() for n, p in block.named_parameters()}}

    before = call()
    report = mk.replace(block, strict=True)
    assert ("unfused" in report.taken[0].how) == (limit > 0)
    same(before, call(), EPS[torch.float32])  # the router's weights are float32
