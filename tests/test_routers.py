# SPDX-License-Identifier: Apache-2.0
"""Router and Gate: settings, precision, jitter, custom routers, token tables, the sparse mixer, and bad input."""

import copy
import inspect
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import moe_kernels as mk
from moe_kernels.routers import Gate, SparseMixer, count_experts

T, H, E, K = 13, 16, 8, 2


def gate_of(router=None, **options):
    torch.manual_seed(0)
    gate = Gate(H, E, K, router, **options)
    nn.init.normal_(gate.weight)
    return gate


def rows(dtype=torch.float32):
    return torch.randn(T, H, generator=torch.Generator().manual_seed(1)).to(dtype)


def same(a, b):
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b))


# ---- settings


def test_the_settings_are_those_of_route():
    theirs, ours = inspect.signature(mk.route).parameters, inspect.signature(mk.Router).parameters
    runtime = {"logits", "top_k", "e_score_correction_bias", "padding_mask"}  # not settings
    assert set(mk.Router().options()) == set(theirs) - runtime
    assert all(ours[name].default == theirs[name].default for name in mk.Router().options())
    assert all(p.kind is p.KEYWORD_ONLY for p in ours.values())


@pytest.mark.parametrize("settings", [
    {}, {"renormalize": False}, {"scoring_func": "sigmoid", "routed_scaling_factor": 2.5}, {"logit_softcap": 3.0},
    {"num_expert_group": 4, "topk_group": 2}, {"scoring_func": "sqrtsoftplus", "renormalize_eps": 0.1},
    {"num_expert_group": 2, "topk_group": 1, "group_top": 2, "scale_when_renormalized": False},
])  # fmt: skip
def test_gate_is_a_product_and_route(settings):
    gate, x, mask = gate_of(mk.Router(**settings)), rows(), torch.arange(T) % 3 > 0
    logits, routing = gate(x, padding_mask=mask)
    assert torch.equal(logits, F.linear(x, gate.weight))
    assert same(routing, mk.route(logits, K, padding_mask=mask, **settings))


def test_bias_and_correction_bias():
    gate, x = gate_of(mk.Router(scoring_func="sigmoid", bias=True, correction_bias=True)), rows()
    with torch.no_grad():
        gate.bias.copy_(torch.linspace(-1, 1, E))
        gate.e_score_correction_bias[3] = 10.0
    logits, routing = gate(x)
    assert torch.equal(logits, F.linear(x, gate.weight, gate.bias))
    assert (routing.topk_ids[:, 0] == 3).all()
    assert same(
        routing, mk.route(logits, K, scoring_func="sigmoid", e_score_correction_bias=gate.e_score_correction_bias)
    )
    assert {n for n, _ in gate.named_parameters()} == {"weight", "bias"}
    assert {n for n, _ in gate.named_buffers()} == {"e_score_correction_bias"}


def test_the_selection_bias_stays_in_float32():
    """Its updates are of 0.001; in bfloat16 they would be lost."""
    gate = gate_of(mk.Router(scoring_func="sigmoid", correction_bias=True))
    gate.e_score_correction_bias += 1.001
    want = gate.e_score_correction_bias.clone()
    for cast in (gate.bfloat16, gate.half, lambda: gate.to(torch.bfloat16)):
        cast()
        assert torch.equal(gate.e_score_correction_bias, want)
    assert gate.weight.dtype == torch.bfloat16
    assert gate.double().e_score_correction_bias.dtype == torch.float64
    made = Gate(H, E, K, mk.Router(correction_bias=True), dtype=torch.bfloat16, device="meta").to_empty(device="cpu")
    assert made.e_score_correction_bias.dtype == torch.float32


def test_precision():
    """The product is in float32 whatever the dtype of x, in float64 for float64, or in the dtype of x on request."""
    x = rows()
    for dtype in (torch.bfloat16, torch.float16):
        gate = gate_of(dtype=dtype)
        logits, routing = gate(x.to(dtype))
        assert logits.dtype == torch.float32 and routing.topk_weights.dtype == torch.float32
        assert torch.equal(logits, F.linear(x.to(dtype).float(), gate.weight.float()))
        own = gate_of(mk.Router(dtype="input"), dtype=dtype)
        assert torch.equal(own(x.to(dtype))[0], F.linear(x.to(dtype), own.weight))
    logits, routing = gate_of(dtype=torch.float64)(x.double())
    assert logits.dtype == routing.topk_weights.dtype == torch.float64


def test_autocast_leaves_the_router_in_float32():
    gate, x = gate_of(), rows()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, routing = gate(x)
        mixed, _ = gate_of(mk.Router(dtype="input"))(x)
    assert torch.equal(logits, F.linear(x, gate.weight)) and mixed.dtype == torch.bfloat16
    assert same(routing, gate(x)[1])


def test_jitter():
    """In training only, on the router's input only, each element times 1 - eps .. 1 + eps."""
    eps = 0.25
    gate = Gate(H, H, 1, mk.Router(input_jitter=eps))
    with torch.no_grad():
        gate.weight.copy_(torch.eye(H))  # the logits are the router's input
    x = torch.ones(2000, H)
    seen = gate(x)[0]
    assert 1 - eps <= seen.min() < 1 - 0.95 * eps and 1 + 0.95 * eps < seen.max() <= 1 + eps
    assert abs(seen.mean().item() - 1) < 5 * eps / math.sqrt(3 * seen.numel())  # five deviations of the mean
    assert seen.std(0).min() > 0.1 and seen.std(1).min() > 0.05  # one draw an element
    assert torch.equal(gate.eval()(x)[0], x)
    torch.manual_seed(5)
    layer = mk.MoELayer(H, 4, E, 1, router=mk.Router(renormalize=False, input_jitter=eps))
    x = torch.randn(50, H)
    y, routing = layer(x), layer.last_routing
    clean = mk.fused_experts(x, layer.experts.w13, layer.experts.w2, routing.topk_weights, routing.topk_ids)
    assert torch.equal(y, clean)  # the experts see the clean x
    layer.eval()(x)
    assert not torch.equal(layer.last_routing.topk_weights, routing.topk_weights)


# ---- custom routers


def first_two(x, logits, top_k):
    ids = torch.arange(top_k).expand(len(x), top_k)
    return logits.gather(1, ids).sigmoid(), ids


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(E))

    def forward(self, x, logits, top_k):
        return mk.route(logits * self.scale, top_k)


def test_a_function_as_router():
    layer, x = mk.MoELayer(H, 4, E, K, router=first_two), rows()
    mask = torch.arange(T) < 10
    y = layer(x, padding_mask=mask)
    routing = layer.last_routing
    assert (
        torch.equal(routing.topk_ids[:10], torch.arange(K).expand(10, K).int()) and (routing.topk_ids[10:] == -1).all()
    )
    assert routing.topk_ids.dtype == torch.int32 and not routing.topk_weights[10:].any() and not y[10:].any()
    assert routing.tokens_per_expert.tolist() == [10, 10, 0, 0, 0, 0, 0, 0]
    y.sum().backward()
    assert layer.router.weight.grad[:2].any() and not layer.router.weight.grad[2:].any()


def test_a_module_as_router_trains():
    layer = mk.MoELayer(H, 4, E, K, router=Learned(), losses=["switch", "z_loss"])
    assert "router.router_fn.scale" in layer.state_dict()
    (layer(rows()).square().sum() + layer.aux_loss).backward()
    assert layer.router.router_fn.scale.grad.any() and layer.router.weight.grad.any()
    again = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert torch.equal(again(rows()), layer(rows()))


def test_a_gate_as_router():
    gate = gate_of(mk.Router(scoring_func="sigmoid"))
    layer = mk.MoELayer(H, 4, E, K, router=gate)
    assert layer.router is gate


@pytest.mark.parametrize(("error", "text", "result"), [
    (TypeError, "its result must be a Routing or .topk_weights, topk_ids., got float32", torch.zeros(T, K)),
    (TypeError, "its result must be a Routing", (torch.zeros(T, K),)),
    (TypeError, rf"topk_weights must be floating \[T={T}, K={K}\], got int64", (torch.zeros(T, K).long(), None)),
    (ValueError, rf"topk_weights must be floating \[T={T}, K={K}\], got \[{T}, 1\]", (torch.zeros(T, 1), None)),
    (TypeError, rf"topk_ids must be int32 or int64 \[T={T}, K={K}\], got NoneType", (torch.zeros(T, K), None)),
])  # fmt: skip
def test_a_wrong_result_names_the_router(error, text, result):
    def my_router(x, logits, top_k):
        return result

    with pytest.raises(error, match=r"test_a_wrong_result_names_the_router.<locals>.my_router: " + text):
        mk.MoELayer(H, 4, E, K, router=my_router)(rows())


def test_ids_of_a_custom_router(monkeypatch):
    """Out of range is absent; in checked mode it raises."""

    class Far(nn.Module):
        def forward(self, x, logits, top_k):
            return torch.ones(len(x), top_k), torch.full((len(x), top_k), E)

    layer = mk.MoELayer(H, 4, E, K, router=Far())
    assert not layer(rows()).any() and (layer.last_routing.topk_ids == -1).all()
    monkeypatch.setenv("MOE_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match=r"Far: topk_ids must be in -1..7 .*got values from 8 to 8"):
        layer(rows())


# ---- token tables


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_token_table(scoring):
    """Ids from the table in its order; the weights are the scores of these experts, renormalised and scaled."""
    table = torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(v))[:K] for v in range(20)])
    gate = gate_of(mk.Router(scoring_func=scoring, routed_scaling_factor=1.5, token_table=table), dtype=torch.float64)
    tokens, mask = torch.arange(T) * 7 % 20, torch.arange(T) != 4
    logits, routing = gate(rows(torch.float64), token_ids=tokens, padding_mask=mask)
    ids = table[tokens]
    s = mk.reference.scores(logits, scoring)[1].gather(1, ids)
    want = torch.where(mask[:, None], 1.5 * s / s.sum(1, keepdim=True), 0.0)
    assert torch.equal(routing.topk_ids.long(), torch.where(mask[:, None], ids, -1))
    torch.testing.assert_close(routing.topk_weights, want, rtol=1e-14, atol=0)
    assert torch.equal(routing.tokens_per_expert, count_experts(routing.topk_ids, E))
    (grad,) = torch.autograd.grad(routing.topk_weights[:, 0].sum(), gate.weight)
    assert grad.any()


def test_an_empty_table_waits_for_a_checkpoint():
    gate = gate_of(mk.Router(scoring_func="sigmoid", token_table=20))
    assert gate.token_table.shape == (20, K) and int(gate.token_table.max()) < E
    other = Gate(H, E, K, mk.Router(scoring_func="sigmoid", token_table=20), device="meta").to_empty(device="cpu")
    other.load_state_dict(gate.state_dict())
    tokens = torch.arange(T)
    assert same(gate(rows(), token_ids=tokens)[1], other(rows(), token_ids=tokens)[1])


def test_errors_of_token_tables(monkeypatch):
    table = torch.zeros(20, K, dtype=torch.int64)
    layer = mk.MoELayer(H, 4, E, K, router=mk.Router(scoring_func="sigmoid", token_table=table))
    with pytest.raises(TypeError, match="Gate: token_ids must be given, as the router has a token_table, got None"):
        layer(rows())
    with pytest.raises(ValueError, match=r"MoELayer: token_ids must be int32 or int64 \[...=13\], got \[12\]"):
        layer(rows(), token_ids=torch.zeros(12, dtype=torch.int64))
    for debug in ("0", "1"):
        monkeypatch.setenv("MOE_KERNELS_DEBUG", debug)
        for wrong in (20, -1):
            with pytest.raises(
                ValueError, match=rf"Gate: token_ids must be in 0..19 .a row of token_table., got .* {wrong}"
            ):
                layer(rows(), token_ids=torch.full((T,), wrong))
    with pytest.raises(ValueError, match=r"Gate: token_table must be in 0..7 .an expert., got values from 8 to 8"):
        gate_of(mk.Router(scoring_func="sigmoid", token_table=table + 8))
    with pytest.raises(ValueError, match=r"Gate: token_table must be int32 or int64 \[V, K=2\], got \[20, 3\]"):
        gate_of(mk.Router(scoring_func="sigmoid", token_table=torch.zeros(20, 3, dtype=torch.int64)))
    with pytest.raises(ValueError, match="Router: renormalize must be True for softmax with a token_table"):
        mk.Router(renormalize=False, token_table=table)
    with pytest.raises(ValueError, match="Router: token_table must be alone"):
        mk.Router(token_table=table, num_expert_group=2, topk_group=1)


# ---- sparse mixer


def test_sparse_mixer_by_hand():
    """Near experts share a softmax; far ones are left out."""
    logits = torch.tensor([[5.0, 4.95, 1.0, -3.0]])
    weights, ids = SparseMixer(0.01).eval()(None, logits, 2)
    assert ids.tolist() == [[0, 1]]
    first = math.exp(5.0) / (math.exp(5.0) + math.exp(4.95))  # (5 - 4.95) / 5 <= 0.02
    torch.testing.assert_close(weights, torch.tensor([[first, 1.0]]))


def test_sparse_mixer_of_bad_logits():
    logits = torch.tensor(
        [[math.nan, 1.0, 2.0], [math.nan] * 3, [math.inf, 0.0, -math.inf], [-math.inf, -math.inf, 3.0]]
    )
    weights, ids = SparseMixer().eval()(None, logits.requires_grad_(), 2)
    assert ids.tolist() == [[2, 1], [0, 1], [0, 1], [2, 0]]
    assert weights.isfinite().all() and not weights[1].any() and weights[3, 1] == 0
    (grad,) = torch.autograd.grad(weights.sum(), logits)
    assert grad.isfinite().all()


def test_gradient_of_the_sparse_mixer():
    torch.manual_seed(0)
    layer = mk.MoELayer(H, 4, E, 2, router=SparseMixer(0.2), dtype=torch.float64).eval()
    nn.init.normal_(layer.router.weight)
    x = torch.randn(5, H, dtype=torch.float64, requires_grad=True)
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(dict(layer.named_parameters()), values)), (x,))

    assert torch.autograd.gradcheck(run, [x, *values], fast_mode=True)


def test_errors_of_the_sparse_mixer():
    with pytest.raises(RuntimeError, match=r"SparseMixer: only evaluation is built: call .eval\(\)"):
        mk.MoELayer(H, 4, E, 2, router=SparseMixer())(rows())
    with pytest.raises(ValueError, match="SparseMixer: top_k must be 2, got 3"):
        mk.MoELayer(H, 4, E, 3, router=SparseMixer()).eval()(rows())


# ---- bad input


@pytest.mark.parametrize(("error", "text", "settings"), [
    (ValueError, "Router: scoring_func must be one of softmax, .*plus, got 'tanh'", {"scoring_func": "tanh"}),
    (ValueError, "Router: dtype must be one of float32, input, got 'bfloat16'", {"dtype": "bfloat16"}),
    (ValueError, "Router: input_jitter must be in 0..1, 1 excluded, got 1.0", {"input_jitter": 1.0}),
    (ValueError, "Router: logit_softcap must be 0 .off. or positive, got -1", {"logit_softcap": -1}),
    (ValueError, "num_expert_group must be a divisor of E=8, got 3", {"num_expert_group": 3, "topk_group": 1}),
    (ValueError, "topk_group must be in 1..num_expert_group=4, got 5", {"num_expert_group": 4, "topk_group": 5}),
    (ValueError, "top_k must be at most the experts in reach", {"num_expert_group": 8, "topk_group": 1}),
    (TypeError, "topk_group must be an int, got NoneType", {"num_expert_group": 4}),
])  # fmt: skip
def test_errors_of_settings(error, text, settings):
    with pytest.raises(error, match=text):
        mk.MoELayer(H, 4, E, K, router=mk.Router(**settings))


def test_errors_of_the_router_argument():
    with pytest.raises(TypeError, match="Gate: router must be a Router or a callable .*got str 'sigmoid'"):
        mk.MoELayer(H, 4, E, K, router="sigmoid")


def test_repr_says_what_was_chosen():
    assert repr(mk.Router(scoring_func="sigmoid", bias=True)) == "Router(scoring_func='sigmoid', bias=True)"
    assert "int64 [20, 2]" in repr(mk.Router(token_table=torch.zeros(20, 2, dtype=torch.int64)))
    assert mk.Router() == mk.Router() and hash(mk.Router()) == hash(mk.Router())
