# SPDX-License-Identifier: Apache-2.0
"""MoELayer: the same bits as its parts by hand, shapes, dtypes, masks, losses, parameters, bad input."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import moe_kernels as mk
from moe_kernels.testing import check, expert_layer, make_case

H, I, E, K = 24, 16, 8, 2
V3 = {"scoring_func": "sigmoid", "correction_bias": True, "num_expert_group": 4, "topk_group": 2,
      "routed_scaling_factor": 2.5}  # fmt: skip
EVERYTHING = {"router": mk.Router(**V3), "num_shared_experts": 2, "shared_gate": True, "losses": ("switch", "z_loss"),
              "capacity": 1.0}  # fmt: skip


def layer_of(**options):
    torch.manual_seed(0)
    return mk.MoELayer(H, I, E, K, **options)


def x_of(*shape, dtype=torch.float32):
    return torch.randn(*shape, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def grads_of(layer, *outputs):
    return torch.autograd.grad(outputs, list(layer.parameters()), [torch.ones_like(o) for o in outputs])


# ---- what it computes


@pytest.mark.parametrize("options", [
    {}, {"activation": "relu", "gated": False}, {"bias": True, "activation": "swigluoai", "interleaved": True},
    {"num_shared_experts": 2}, {"num_shared_experts": 1, "shared_gate": True}, {"shared_intermediate_size": 5},
    {"router": mk.Router(scoring_func="sigmoid", weight_on_input=True)}, {"recompute": True},
    {"bias": True, "activation": "swigluoai", "swiglu_limit": 1.0, "swiglu_alpha": 1.5},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_is_its_parts(options, dtype):
    """Forward and every gradient: the bits of route, fused_experts and two dense products."""
    layer, x = layer_of(dtype=dtype, **options), x_of(3, 5, dtype=dtype).requires_grad_()
    y = layer(x)
    rows, router, experts = x.reshape(-1, H), layer.router, layer.experts
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    routing = mk.route(F.linear(rows.to(acc), router.weight.to(acc)), K, **router.settings.options())
    by_hand = mk.fused_experts(
        rows, experts.w13, experts.w2, routing.topk_weights, routing.topk_ids, w13_bias=experts.w13_bias,
        w2_bias=experts.w2_bias, apply_router_weight_on_input=router.settings.weight_on_input,
        **{key: options[key] for key in ("activation", "gated", "interleaved", "recompute", "swiglu_limit",
                                       "swiglu_alpha") if key in options},
    )  # fmt: skip
    if layer.shared_experts is not None:
        gate, up = F.linear(rows, layer.shared_experts.w13).chunk(2, -1)
        shared = F.linear(F.silu(gate) * up, layer.shared_experts.w2)
        if layer.shared_expert_gate is not None:
            shared = torch.sigmoid(F.linear(rows, layer.shared_expert_gate.weight)) * shared
        by_hand = by_hand + shared
    assert y.dtype == dtype and torch.equal(y, by_hand.reshape(x.shape))
    for a, b in zip(grads_of(layer, y), torch.autograd.grad(by_hand.sum(), list(layer.parameters()))):
        assert torch.equal(a, b)
    assert torch.equal(layer.last_routing.topk_ids, routing.topk_ids)


def test_against_the_truth():
    """The experts inside the layer, within the bound that follows from the dtype."""
    case = make_case(13, H, I, E, K, seed=3)
    layer = layer_of(router=lambda x, logits, top_k: (case.topk_weights, case.topk_ids))
    with torch.no_grad():
        layer.experts.w13.copy_(case.w13), layer.experts.w2.copy_(case.w2)
    x = case.x.clone().requires_grad_()
    y = layer(x)
    y.backward(case.grad_y)
    truth = expert_layer(case)
    check(y, *truth["y"], "y")
    check(x.grad, *truth["grad_x"], "grad_x")
    check(layer.experts.w13.grad, *truth["grad_w13"], "grad_w13")
    check(layer.experts.w2.grad, *truth["grad_w2"], "grad_w2")


def test_the_readme_layer():
    router = mk.Router(
        scoring_func="sigmoid", correction_bias=True, num_expert_group=4, topk_group=2, routed_scaling_factor=2.5
    )
    layer = mk.MoELayer(64, 32, 16, 4, num_shared_experts=1, router=router)
    x = torch.randn(2, 10, 64)
    assert layer(x).shape == x.shape
    torch.testing.assert_close(layer.last_routing.topk_weights.sum(1), torch.full((20,), 2.5))


@pytest.mark.parametrize("shape", [(), (7,), (0,), (2, 3), (2, 0), (0, 3), (2, 1, 3), (1, 1, 1, 1)])
def test_leading_dimensions(shape):
    layer, x = layer_of(**EVERYTHING), x_of(*shape).requires_grad_()
    y = layer(x)
    assert y.shape == x.shape
    T = math.prod(shape)
    routing = layer.last_routing
    assert routing.topk_ids.shape == (T, K) and routing.tokens_per_expert.shape == (E,)
    assert torch.equal(y, layer(x.reshape(T, H)).reshape(x.shape))
    (y.sum() + layer.aux_loss).backward()
    assert x.grad.shape == x.shape
    if T == 0:
        assert layer.aux_loss.item() == 0 and not any(p.grad.any() for p in layer.parameters() if p.grad is not None)


def test_any_strides():
    layer, x = layer_of(), x_of(4, 6)
    assert torch.equal(layer(x.transpose(0, 1)), layer(x.transpose(0, 1).contiguous()))


def test_autocast():
    """Experts in bfloat16, router in float32: the bits of a bfloat16 layer with the float32 router."""
    layer, x = layer_of(num_shared_experts=1), x_of(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    low = copy.deepcopy(layer).bfloat16()
    routing = mk.route(F.linear(x, layer.router.weight), K)
    want = low.experts(x.bfloat16(), routing.topk_weights, routing.topk_ids) + low.shared_experts(x.bfloat16())
    assert torch.equal(y, want)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in layer.parameters())


def test_modules_of_ones_own():
    class Twice(nn.Module):
        def forward(self, x, topk_weights, topk_ids, weight_on_input=False):
            return 2 * x * topk_weights.sum(1, keepdim=True)

    layer = layer_of(experts=Twice(), shared_experts=nn.Linear(H, H, bias=False), shared_gate=True)
    x = x_of(5)
    shared = torch.sigmoid(layer.shared_expert_gate(x)) * layer.shared_experts(x)
    torch.testing.assert_close(layer(x), 2 * x + shared)
    assert set(layer.state_dict()) == {"router.weight", "shared_experts.weight", "shared_expert_gate.weight"}


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_layer_runs_kernels():
    """One call of each of our ops; of torch's products only the router's and the shared experts'."""
    layer = layer_of(num_shared_experts=1, capacity=1.0)
    with Calls() as calls:
        y = layer(x_of(9))
    ours = [name for name in calls.names if name.startswith("moe_kernels.")]
    assert ours == [
        "moe_kernels.route.default",
        "moe_kernels.limit_capacity.default",
        "moe_kernels.fused_experts.default",
    ]
    assert sum(name.startswith(("aten.mm", "aten.addmm", "aten.linear")) for name in calls.names) == 3
    assert not [name for name in calls.names if any(word in name for word in ("topk", "sort", "softmax", "bmm"))]
    with Calls() as calls:
        y.sum().backward()
    assert {"moe_kernels.route_backward.default", "moe_kernels.fused_experts_backward.default"} <= set(calls.names)


# ---- padding


@pytest.mark.parametrize("options", [{}, {"num_shared_experts": 1, "shared_gate": True}, {"bias": True},
                                     {"router": mk.Router(bias=True)}], ids=str)  # fmt: skip
def test_padding_is_not_there(options):
    """Whatever stands in a masked row, NaN too: output 0, and all the rest as if the row were not there."""
    layer, mask = layer_of(losses=("switch", "z_loss"), **options), torch.rand(3, 5) > 0.4
    if options.get("bias"):
        nn.init.normal_(layer.experts.w2_bias)
    x = x_of(3, 5)
    dirty = torch.where(mask[..., None], x, math.nan).requires_grad_()
    y = layer(dirty, padding_mask=mask)
    masked, aux = layer.last_routing, layer.aux_loss
    grads = grads_of(layer, y, aux)
    (grad_x,) = torch.autograd.grad(layer(dirty, padding_mask=mask).sum(), dirty)
    alone = layer(x[mask])
    assert not y[~mask].any() and torch.equal(y[mask], alone)
    assert not grad_x[~mask].any() and grad_x.isfinite().all()
    assert (masked.topk_ids[~mask.flatten()] == -1).all() and not masked.topk_weights[~mask.flatten()].any()
    assert torch.equal(masked.tokens_per_expert, layer.last_routing.tokens_per_expert)
    torch.testing.assert_close(aux, layer.aux_loss, rtol=1e-6, atol=0)  # sums over other shapes
    for a, b in zip(grads, grads_of(layer, alone, layer.aux_loss)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ---- losses


def test_aux_loss_without_losses_is_zero():
    layer = layer_of()
    layer(x_of(5))
    assert layer.aux_loss.shape == () and layer.aux_loss.item() == 0


def test_attached_losses():
    """The output keeps its bits, and its backward is that of output plus losses."""
    plain, attached = layer_of(**EVERYTHING), layer_of(**EVERYTHING, attach_losses=True)
    x = x_of(2, 9)
    y, z = plain(x), attached(x)
    assert torch.equal(y, z) and torch.equal(plain.aux_loss, attached.aux_loss)
    for pull in (1.0, 0.0):  # the losses pull with weight 1 whatever pulls on the output
        want = torch.autograd.grad((pull * y).sum() + plain.aux_loss, list(plain.parameters()), retain_graph=True)
        got = torch.autograd.grad((pull * z).sum(), list(attached.parameters()), retain_graph=True)
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert not torch.equal(got[0], torch.zeros_like(got[0]))
    z.add_(1)  # a residual in place


def test_attached_losses_of_a_router_without_gradient():
    layer = layer_of(router=lambda x, logits, k: (torch.ones(len(x), k), torch.arange(k).expand(len(x), k)),
                     losses="switch", attach_losses=True)  # fmt: skip
    layer(x_of(5)).sum().backward()
    assert layer.router.weight.grad.any()


def test_last_routing_is_detached():
    layer = layer_of(**EVERYTHING)
    layer(x_of(5))
    assert not any(t.requires_grad for t in layer.last_routing if t is not None)
    assert isinstance(layer.last_routing, mk.Routing) and layer.aux_loss.requires_grad


# ---- parameters


@pytest.mark.parametrize(("options", "names"), [
    ({}, ()),
    ({"bias": True}, ("experts.w13_bias", "experts.w2_bias")),
    ({"router": mk.Router(bias=True, correction_bias=True)}, ("router.bias", "router.e_score_correction_bias")),
    ({"num_shared_experts": 1}, ("shared_experts.w13", "shared_experts.w2")),
    ({"shared_intermediate_size": 5, "shared_gate": True},
     ("shared_experts.w13", "shared_experts.w2", "shared_expert_gate.weight")),
    ({"router": mk.Router(scoring_func="sigmoid", token_table=11)}, ("router.token_table",)),
    ({"capacity": 1.0, "losses": ("switch",)}, ()),
], ids=str)  # fmt: skip
def test_state_dict(options, names):
    layer = layer_of(**options)
    state = layer.state_dict()
    assert set(state) == {"router.weight", "experts.w13", "experts.w2", *names}
    other = mk.MoELayer(H, I, E, K, **options)
    other.load_state_dict(state)
    x, tokens = x_of(5), torch.arange(5)
    assert torch.equal(layer(x, token_ids=tokens), other(x, token_ids=tokens))


def test_shapes_of_parameters():
    layer = layer_of(num_shared_experts=3, shared_gate=True, bias=True, router=mk.Router(bias=True))
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "router.weight": (E, H), "router.bias": (E,), "experts.w13": (E, 2 * I, H), "experts.w2": (E, H, I),
        "experts.w13_bias": (E, 2 * I), "experts.w2_bias": (E, H), "shared_experts.w13": (6 * I, H),
        "shared_experts.w2": (H, 3 * I), "shared_expert_gate.weight": (1, H),
    }  # fmt: skip
    assert layer_of(gated=False, activation="relu").experts.w13.shape == (E, I, H)
    assert layer_of(num_shared_experts=3, shared_intermediate_size=5).shared_experts.w2.shape == (H, 5)


def test_initialisation():
    wide = {"bias": True, "num_shared_experts": 1, "router": mk.Router(bias=True, correction_bias=True)}
    normal, fan_in, zero = (
        mk.MoELayer(200, 100, 20, 2, init=init, **wide) for init in ("normal", "fan_in", "zero_router")
    )
    for layer in (normal, fan_in, zero):
        assert not any(t.any() for name, t in layer.state_dict().items() if name.endswith("bias"))
    for name, p in normal.named_parameters():
        if not name.endswith("bias"):
            n = p.numel()
            assert abs(p.std().item() - 0.02) < 5 * 0.02 / math.sqrt(2 * n), name  # five deviations
            assert abs(p.mean().item()) < 5 * 0.02 / math.sqrt(n), name
            q = fan_in.get_parameter(name)
            std = math.sqrt(0.1 / p.shape[-1])
            assert 1.9 * std < q.abs().max() <= 2 * std and abs(q.std() / std - 0.880) < 5 / math.sqrt(n), name
    assert not zero.router.weight.any() and zero.experts.w2.any()


def test_repr_names_what_is_special():
    text = repr(layer_of(**EVERYTHING))
    for part in ("Gate(24 -> 8, top_k=2", "scoring_func='sigmoid'", "Experts(8 x (24 -> 16 -> 24)",
                 "SharedExperts(24 -> 32", "capacity=Capacity(factor=1.0)", "Switch(coef=0.01"):  # fmt: skip
        assert part in text


def test_a_layer_learns():
    torch.manual_seed(0)
    layer = mk.MoELayer(8, 16, 4, 2, num_shared_experts=1, losses="switch")
    x = torch.randn(64, 8)
    target = torch.tanh(x.flip(1))
    optimiser = torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(layer(x), target)
        optimiser.zero_grad()
        (loss + layer.aux_loss).backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


# ---- bad input


@pytest.mark.parametrize(("error", "text", "arguments"), [
    (ValueError, "hidden_size must be 1 or more, got 0", {"hidden_size": 0}),
    (TypeError, "hidden_size must be an int, got float 24.0", {"hidden_size": 24.0}),
    (ValueError, "intermediate_size must be 1 or more, got -1", {"intermediate_size": -1}),
    (ValueError, "num_experts must be 1 or more, got 0", {"num_experts": 0}),
    (ValueError, "top_k must be in 1..num_experts=8, got 9", {"top_k": 9}),
    (ValueError, "top_k must be in 1..num_experts=8, got 0", {"top_k": 0}),
    (ValueError, "activation must be one of silu, .*, got 'swish'", {"activation": "swish"}),
    (ValueError, "gated must be True for swigluoai, got False", {"gated": False, "activation": "swigluoai"}),
    (ValueError, "gated must be True for interleaved, got False", {"gated": False, "interleaved": True}),
    (ValueError, "num_shared_experts must be 0 or more, got -1", {"num_shared_experts": -1}),
    (ValueError, "shared_gate must be False without shared experts, got True", {"shared_gate": True}),
    (ValueError, "init must be one of normal, fan_in, zero_router, got 'xavier'", {"init": "xavier"}),
])  # fmt: skip
def test_errors_of_the_constructor(error, text, arguments):
    sizes = {"hidden_size": H, "intermediate_size": I, "num_experts": E, "top_k": K}
    with pytest.raises(error, match="MoELayer: " + text):
        mk.MoELayer(**sizes | arguments)


@pytest.mark.parametrize(("error", "text", "x", "more"), [
    (ValueError, r"MoELayer: x must be floating \[..., H=24\], got float32 \[5, 23\]", torch.zeros(5, 23), {}),
    (ValueError, r"MoELayer: x must be floating \[..., H=24\], got float32 \[\]", torch.zeros(()), {}),
    (TypeError, r"MoELayer: x must be floating \[..., H=24\], got int64 \[5, 24\]", torch.zeros(5, 24).long(), {}),
    (TypeError, r"MoELayer: x must be floating \[..., H=24\], got list", [1.0], {}),
    (ValueError, r"MoELayer: padding_mask must be bool \[...=2, ...=5\], got \[10\]", torch.zeros(2, 5, 24),
     {"padding_mask": torch.ones(10, dtype=torch.bool)}),
    (TypeError, r"MoELayer: padding_mask must be bool \[...=5\], got int64 \[5\]", torch.zeros(5, 24),
     {"padding_mask": torch.ones(5).long()}),
    (TypeError, r"MoELayer: token_ids must be int32 or int64 \[...=5\], got float32 \[5\]", torch.zeros(5, 24),
     {"token_ids": torch.ones(5)}),
    (TypeError, r"fused_experts: w13 must be of x's dtype bfloat16, got float32", torch.zeros(5, 24).bfloat16(), {}),
])  # fmt: skip
def test_errors_of_the_forward(error, text, x, more):
    layer = layer_of()
    with pytest.raises(error, match=text):
        layer(x, **more)


def test_all_combinations_run():
    """Every router with every capacity, every loss: legal ones work together."""
    routers = (
        None,
        mk.Router(**V3),
        mk.Router(scoring_func="sqrtsoftplus", bias=True),
        mk.Router(weight_on_input=True),
    )
    capacities = (None, 1.0, mk.Capacity(1.0, group="sequence"), mk.Capacity(fixed=1, group=3))
    names = ("switch", "gshard", "z_loss", "deepseek_v2_expert", "deepseek_v3", "importance")
    x, mask = x_of(2, 6), torch.arange(12).reshape(2, 6) % 5 > 0
    for router, capacity, shared in itertools.product(routers, capacities, (0, 1)):
        layer = layer_of(router=router, capacity=capacity, num_shared_experts=shared, losses=names)
        (layer(x, padding_mask=mask).sum() + layer.aux_loss).backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())
