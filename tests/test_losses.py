# SPDX-License-Identifier: Apache-2.0
"""Balance losses: the published formula written out token by token, gradients, masks, sequences, and bad input."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_golden import Vector

import moe_kernels as mk
from moe_kernels import losses
from moe_kernels.losses import LossInputs

B, S, E, K, G, M = 3, 7, 8, 3, 4, 2
EXACT = {"rtol": 1e-12, "atol": 1e-13}  # float64 sums of some hundred terms of size 1: about 1e-14
SIGMOID = mk.Router(scoring_func="sigmoid", num_expert_group=G, topk_group=M, correction_bias=True)
SOFTMAX = mk.Router(num_expert_group=G, topk_group=M, renormalize=False)
BIAS = torch.linspace(-0.3, 0.3, E, dtype=torch.float64)
CASES = [
    (losses.Switch(), SOFTMAX), (losses.Switch(0.02, divide_by_k=False), SOFTMAX), (losses.Switch(), SIGMOID),
    (losses.Switch(scope="sequence"), SOFTMAX), (losses.GShard(), SOFTMAX), (losses.ZLoss(), SOFTMAX),
    (losses.ZLoss(0.1), SIGMOID), (losses.ZLoss(), mk.Router(logit_softcap=2.0)), (losses.DeepSeekV2Expert(), SOFTMAX),
    (losses.DeepSeekV2Device(), SOFTMAX), (losses.DeepSeekV2Comm(), SOFTMAX),
    (losses.DeepSeekV2Device(devices=2), mk.Router()), (losses.DeepSeekV2Comm(devices=2, limit=2), mk.Router()),
    (losses.DeepSeekV3(), SIGMOID), (losses.DeepSeekV3(count="selected"), SIGMOID), (losses.Importance(), SOFTMAX),
]  # fmt: skip


def logits_of(seed=0):
    return torch.randn(B * S, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs_of(logits, router, mask=None, length=S):
    bias = BIAS if router.correction_bias else None
    routing = mk.route(logits, K, e_score_correction_bias=bias, padding_mask=mask, **router.options())
    return LossInputs(logits, routing, router, length, mask)


def formula(loss, logits, ids, router, mask):
    """The loss as its paper has it, with loops; ids are those chosen."""
    cap = router.logit_softcap
    l = logits if cap == 0 else cap * torch.tanh(logits / cap)
    s = l.softmax(-1) if router.scoring_func == "softmax" else l.sigmoid()
    p = s / s.sum(-1, keepdim=True)
    groups = [[b * S + i for i in range(S) if mask[b * S + i]] for b in range(B)]
    everyone, sequences = [t for g in groups for t in g], [g for g in groups if g]
    name = type(loss).__name__

    def count(tokens, e, columns=range(K)):
        return sum(int(ids[t, k] == e) for t in tokens for k in columns)

    def mean(values):
        return sum(values) / len(values)

    if name == "Switch":
        k = K if loss.divide_by_k else 1
        parts = sequences if loss.scope == "sequence" else [everyone]
        return loss.coef * E * mean([
            sum(count(g, e) / (k * len(g)) * mean([p[t, e] for t in g]) for e in range(E)) for g in parts
        ])  # fmt: skip
    if name == "GShard":
        n = len(everyone)
        return loss.coef * mean([count(everyone, e, [0]) / n * mean([p[t, e] for t in everyone]) for e in range(E)])
    if name == "ZLoss":
        return loss.coef * mean([l[t].logsumexp(0) ** 2 for t in everyone])
    if name == "Importance":
        gates = [sum(s[t, e] for t in everyone for k in range(K) if ids[t, k] == e) for e in range(E)]
        average = mean(gates)
        return loss.coef * mean([(g - average) ** 2 for g in gates]) / (average**2 + 1e-10)
    if name == "DeepSeekV3" and loss.count == "paper":
        ids = torch.tensor([sorted(range(E), key=lambda e, t=t: -s[t, e].item())[:K] for t in range(B * S)])

    def one(g):
        f = [E / (K * len(g)) * count(g, e) for e in range(E)]
        P = [mean([(p if name == "DeepSeekV3" else s)[t, e] for t in g]) for e in range(E)]
        if name in ("DeepSeekV2Expert", "DeepSeekV3"):
            return sum(a * b for a, b in zip(f, P))
        D = loss.devices or G
        members = [range(d * E // D, (d + 1) * E // D) for d in range(D)]
        if name == "DeepSeekV2Device":
            return sum(mean([f[e] for e in d]) * sum(P[e] for e in d) for d in members)
        sent = [sum(any(int(ids[t, k]) in d for k in range(K)) for t in g) for d in members]
        limit = loss.limit or M
        return sum(D / (limit * len(g)) * n * sum(P[e] for e in d) for n, d in zip(sent, members))

    return loss.coef * mean([one(g) for g in sequences])


def masks():
    some = torch.rand(B * S, generator=torch.Generator().manual_seed(3)) > 0.4
    empty_sequence = torch.arange(B * S) >= S
    return {"none": None, "some": some, "empty sequence": empty_sequence}


@pytest.mark.parametrize("mask", masks().values(), ids=masks())
@pytest.mark.parametrize(
    ("loss", "router"), CASES, ids=lambda v: repr(v) if not isinstance(v, mk.Router) else v.scoring_func
)
def test_is_the_formula(loss, router, mask):
    logits = logits_of().requires_grad_()
    inputs = inputs_of(logits, router, mask)
    everyone = torch.ones(B * S, dtype=torch.bool) if mask is None else mask
    want = formula(loss, logits, inputs.routing.topk_ids, router, everyone)
    got = loss(inputs)
    assert got.shape == () and got.dtype == torch.float64
    torch.testing.assert_close(got, want, **EXACT)
    for a, b in zip(torch.autograd.grad(got, logits), torch.autograd.grad(want, logits)):
        torch.testing.assert_close(a, b, **EXACT)
        assert b.any()


@pytest.mark.parametrize(
    ("loss", "router"), CASES, ids=lambda v: repr(v) if not isinstance(v, mk.Router) else v.scoring_func
)
def test_without_tokens(loss, router):
    """No token, or none that counts: loss 0, gradient 0."""
    for T, mask in ((0, None), (B * S, torch.zeros(B * S, dtype=torch.bool))):
        logits = logits_of()[:T].requires_grad_()
        value = loss(inputs_of(logits, router, mask))
        assert float(value) == 0
        assert not torch.autograd.grad(value, logits)[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_logits_are_summed_in_float32(dtype):
    logits = logits_of().to(dtype)
    for loss, router in CASES:
        value = loss(inputs_of(logits, router))
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), loss(inputs_of(logits.double(), router)), rtol=1e-5, atol=1e-8)


def test_balanced_values():
    """Uniform scores, every expert chosen equally often: what the coefficient is worth."""
    ids = torch.arange(8).repeat(3).reshape(8, 3)
    routing = mk.Routing(torch.ones(8, 3), ids.int(), torch.full((8,), 3), torch.zeros(8), None)
    inputs = LossInputs(torch.zeros(8, 8), routing)
    for loss, want in ((losses.Switch(0.01), 0.01), (losses.Switch(0.01, divide_by_k=False), 0.03),
                       (losses.DeepSeekV2Expert(0.01), 0.01), (losses.DeepSeekV3(0.01, count="selected"), 0.01),
                       (losses.GShard(1.0), 1 / 64), (losses.ZLoss(1.0), 0), (losses.Importance(1.0), 0)):  # fmt: skip
        assert float(loss(inputs)) == pytest.approx(want, rel=1e-6)


def test_squared_cv_is_that_of_the_population():
    t = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert float(losses.squared_cv(t)) == pytest.approx(3.5 / 9)
    assert float(losses.squared_cv(torch.tensor([5.0]))) == 0  # one expert


def test_load_of_noisy_gating():
    """On given noise: gates, importance, load, the loss and its gradients (golden vector of Shazeer's gate)."""
    v = Vector(Path(__file__).with_name("golden") / "ref_noisy_topk.safetensors")
    x, w_gate, w_noise = (v[name].clone().requires_grad_() for name in ("x", "w_gate", "w_noise"))
    clean, std = x @ w_gate, F.softplus(x @ w_noise) + v.config["noise_eps"]
    noisy = clean + v["normal_noise"] * std
    routing = mk.route(noisy, v.config["k"])
    v.same(routing.topk_ids, "topk_ids")
    inputs = LossInputs(clean, routing, noise_std=std, noisy_logits=noisy)
    assert float(losses.Load(1.0)(inputs)) == pytest.approx(float(losses.squared_cv(v["load"])), rel=1e-4)
    assert float(losses.Importance(1.0)(inputs)) == pytest.approx(float(losses.squared_cv(v["importance"])), rel=1e-4)
    loss = losses.Importance(v.config["w_importance"])(inputs) + losses.Load(v.config["w_load"])(inputs)
    v.close(loss.detach().reshape(1), "loss")
    for name, grad in zip(("x", "w_gate", "w_noise"), torch.autograd.grad(loss, (x, w_gate, w_noise))):
        v.close(grad, "grad_" + name)


def test_load_of_all_experts_is_a_count():
    logits = logits_of()
    routing = mk.route(logits, E)
    inputs = LossInputs(logits, routing, noise_std=torch.ones_like(logits), noisy_logits=logits)
    assert float(losses.Load()(inputs)) == 0


def test_load_needs_noise():
    with pytest.raises(ValueError, match="Load: needs the noise of noisy gating, but this router adds none"):
        losses.Load()(inputs_of(logits_of(), SOFTMAX))


# ---- by name, in a layer


def test_names():
    layer = mk.MoELayer(16, 8, E, K, losses=["switch", "z_loss", losses.Switch(0.5)])
    assert layer.losses == (losses.Switch(), losses.ZLoss(), losses.Switch(0.5))
    assert mk.MoELayer(16, 8, E, K, losses="deepseek_v3").losses == (losses.DeepSeekV3(),)
    assert set(losses.LOSSES) == {"switch", "gshard", "z_loss", "deepseek_v2_expert", "deepseek_v2_device",
                                  "deepseek_v2_comm", "deepseek_v3", "importance", "load"}  # fmt: skip
    coefficients = {name: kind().coef for name, kind in losses.LOSSES.items()}
    assert coefficients == {"switch": 0.01, "gshard": 0.01, "z_loss": 0.001, "deepseek_v2_expert": 0.003,
                            "deepseek_v2_device": 0.05, "deepseek_v2_comm": 0.02, "deepseek_v3": 1e-4,
                            "importance": 0.1, "load": 0.1}  # fmt: skip
    assert all(dataclasses.is_dataclass(kind) and kind.__doc__ for kind in losses.LOSSES.values())


@pytest.mark.parametrize("mask", [None, masks()["some"].reshape(B, S)], ids=["whole", "padded"])
def test_in_a_layer(mask):
    """aux_loss is the sum of the losses on the layer's own logits, per sequence of its x."""
    several = [loss for loss, router in CASES if router is SOFTMAX]
    layer = mk.MoELayer(16, 8, E, K, router=SOFTMAX, losses=several, dtype=torch.float64)
    x = torch.randn(B, S, 16, dtype=torch.float64)
    layer(x, padding_mask=mask)
    logits = (x.reshape(-1, 16) @ layer.router.weight.T).detach()
    flat = torch.ones(B * S, dtype=torch.bool) if mask is None else mask.flatten()
    ids = mk.route(logits, K, **SOFTMAX.options()).topk_ids
    want = sum(formula(loss, logits, ids, SOFTMAX, flat) for loss in several)
    torch.testing.assert_close(layer.aux_loss.detach(), want, **EXACT)
    (grad,) = torch.autograd.grad(layer.aux_loss, layer.router.weight)
    assert grad.any()


def test_a_loss_of_ones_own():
    def entropy(inputs):
        p = inputs.probabilities()
        return -(p * p.log()).sum(-1).mean()

    layer = mk.MoELayer(16, 8, E, K, losses=entropy)
    layer(torch.randn(5, 16))
    assert 0 < float(layer.aux_loss) <= math.log(E)


@pytest.mark.parametrize(("error", "text", "wrong"), [
    (ValueError, "MoELayer: losses must be one of switch, .*load, got 'swich'", "swich"),
    (TypeError, "MoELayer: losses must be names or callables .*got float 0.01", [0.01]),
    (TypeError, "MoELayer: losses must be names or callables .*got Switch", [losses.Switch]),
])  # fmt: skip
def test_errors(error, text, wrong):
    with pytest.raises(error, match=text):
        mk.MoELayer(16, 8, E, K, losses=wrong)


def test_errors_of_settings():
    with pytest.raises(ValueError, match="Switch: scope must be one of micro_batch, sequence, got 'token'"):
        losses.Switch(scope="token")
    with pytest.raises(ValueError, match="DeepSeekV3: count must be one of paper, selected, got 'all'"):
        losses.DeepSeekV3(count="all")
    with pytest.raises(ValueError, match="DeepSeekV2Device: devices must be a divisor of E=8, got 3"):
        losses.DeepSeekV2Device(devices=3)(inputs_of(logits_of(), SOFTMAX))
