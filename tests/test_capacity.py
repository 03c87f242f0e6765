# SPDX-License-Identifier: Apache-2.0
"""Capacity: the number of slots, and what a layer does with the tokens that do not fit."""

import math

import pytest
import torch

import moe_kernels as mk
from moe_kernels.capacity import ROUNDINGS


def layer_with(capacity, K=2, **options):
    torch.manual_seed(0)
    return mk.MoELayer(16, 8, 4, K, capacity=capacity, **options)


# ---- how many


@pytest.mark.parametrize(("rule", "tokens", "K", "E", "slots"), [
    (mk.Capacity(1.0), 40, 1, 8, 5), (mk.Capacity(1.25), 37, 2, 8, 12),
    (mk.Capacity(1.25, rounding="floor"), 37, 2, 8, 11),
    (mk.Capacity(1.0, rounding="round"), 20, 1, 8, 2), (mk.Capacity(1.0, rounding="round"), 28, 1, 8, 4),  # half: even
    (mk.Capacity(0.01), 40, 1, 8, 1), (mk.Capacity(0.01, min_capacity=4), 40, 1, 8, 4),
    (mk.Capacity(100.0), 40, 1, 8, 40), (mk.Capacity(math.inf), 40, 1, 8, 40), (mk.Capacity(fixed=3), 40, 1, 8, 3),
    (mk.Capacity(fixed=64), 40, 1, 8, 40), (mk.Capacity(1.0, min_capacity=50), 40, 1, 8, 40),
])  # fmt: skip
def test_slots(rule, tokens, K, E, slots):
    assert rule.slots(tokens, K, E) == slots


def test_slots_in_evaluation():
    rule = mk.Capacity(1.25, eval_factor=2.0)
    assert (rule.slots(80, 1, 8), rule.slots(80, 1, 8, training=False)) == (13, 20)
    layer = layer_with(mk.Capacity(0.5, eval_factor=math.inf))
    x = torch.randn(40, 16)
    layer(x)
    assert layer.last_routing.dropped.any() and int(layer.last_routing.tokens_per_expert.max()) == 10
    layer.eval()(x)
    assert not layer.last_routing.dropped.any()


@pytest.mark.parametrize(("error", "text", "arguments"), [
    (ValueError, "factor must be given, or fixed, not both, got factor=None, fixed=None", {}),
    (ValueError, "factor must be given, or fixed, not both, got factor=1.0, fixed=2", {"factor": 1.0, "fixed": 2}),
    (ValueError, "factor must be positive, got 0", {"factor": 0}),
    (ValueError, "factor must be positive, got nan", {"factor": math.nan}),
    (ValueError, "eval_factor must be positive, got -1", {"factor": 1.0, "eval_factor": -1}),
    (ValueError, "fixed must be 1 or more, got 0", {"fixed": 0}),
    (ValueError, "min_capacity must be 1 or more, got 0", {"factor": 1.0, "min_capacity": 0}),
    (ValueError, "rounding must be one of ceil, floor, round, got 'up'", {"factor": 1.0, "rounding": "up"}),
    (ValueError, "drop_policy must be one of position, got 'probs'", {"factor": 1.0, "drop_policy": "probs"}),
    (ValueError, "group must be .batch., .sequence. or a number of tokens, got 'no'", {"factor": 1.0, "group": "no"}),
    (ValueError, "group must be 1 or more, got 0", {"factor": 1.0, "group": 0}),
])  # fmt: skip
def test_a_capacity_that_cannot_hold(error, text, arguments):
    with pytest.raises(error, match="Capacity: " + text):
        mk.Capacity(**arguments)


def test_repr_says_what_was_chosen():
    assert repr(mk.Capacity(1.25, group="sequence")) == "Capacity(factor=1.25, group='sequence')"


# ---- in a layer


@pytest.mark.parametrize("group", ["batch", "sequence", 7])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_dropped_slots_are_absent(group, rounding):
    """The layer is its experts on the kept slots: the same bits as by hand."""
    layer = layer_with(mk.Capacity(0.6, group=group, rounding=rounding))
    x = torch.randn(3, 10, 16)
    y, routing = layer(x), layer.last_routing
    rows = x.reshape(-1, 16)
    full = mk.route(rows @ layer.router.weight.T, 2)
    tokens = {"batch": 30, "sequence": 10}.get(group, group)
    late = mk.limit_capacity(full.topk_ids, 4, layer.capacity.slots(tokens, 2, 4), group_size=tokens)
    assert late.any() and torch.equal(routing.dropped, late)
    assert torch.equal(routing.topk_ids, torch.where(late, -1, full.topk_ids))
    assert torch.equal(routing.topk_weights, torch.where(late, 0.0, full.topk_weights))  # not renormalised
    assert torch.equal(routing.tokens_per_expert, full.topk_ids[~late].long().bincount(minlength=4).int())
    by_hand = mk.fused_experts(rows, layer.experts.w13, layer.experts.w2, routing.topk_weights, routing.topk_ids)
    assert torch.equal(y, by_hand.reshape(x.shape))


def test_a_token_dropped_everywhere_gives_zero_and_no_gradient():
    layer = layer_with(mk.Capacity(fixed=1), K=1, router=mk.Router(renormalize=False))
    x = torch.randn(20, 16, requires_grad=True)
    y = layer(x)
    gone = layer.last_routing.dropped.all(1)
    assert int(gone.sum()) >= 16
    assert not y[gone].any() and y[~gone].any(1).all()
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert not grad[gone].any() and grad[~gone].any(1).all()


def test_shared_experts_run_for_dropped_tokens():
    layer = layer_with(mk.Capacity(fixed=1), K=1, num_shared_experts=1)
    x = torch.randn(20, 16)
    y, gone = layer(x), layer.last_routing.dropped.all(1)
    assert gone.any() and torch.equal(y[gone], layer.shared_experts(x)[gone])


def test_renormalize_after_drop():
    x = torch.randn(30, 16)
    plain, again = (layer_with(mk.Capacity(0.6, renormalize_after_drop=flag)) for flag in (False, True))
    plain(x), again(x)
    before, after = plain.last_routing, again.last_routing
    assert torch.equal(before.topk_ids, after.topk_ids)
    some = (after.topk_ids >= 0).any(1)
    assert some.any() and not some.all()
    torch.testing.assert_close(after.topk_weights.sum(1)[some], torch.ones(int(some.sum())), rtol=4 * 2**-24, atol=0)
    assert not after.topk_weights[~some].any()
    assert (before.topk_weights.sum(1)[some] < 0.999).any()
    (grad,) = torch.autograd.grad(again(x.requires_grad_()).sum(), x)
    assert grad.isfinite().all()


def test_padding_takes_no_capacity():
    """Masked tokens in front do not push others out."""
    layer = layer_with(mk.Capacity(fixed=2), K=1)
    x = torch.randn(24, 16)
    mask = torch.arange(24) >= 12
    layer(x, padding_mask=mask)
    masked = layer.last_routing
    layer(x[12:])
    assert torch.equal(masked.dropped[12:], layer.last_routing.dropped)
    assert not masked.dropped[:12].any() and (masked.topk_ids[:12] == -1).all()
    assert torch.equal(masked.tokens_per_expert, layer.last_routing.tokens_per_expert)


def test_a_number_is_a_factor_and_none_is_dropless():
    assert layer_with(1.5).capacity == mk.Capacity(1.5) and layer_with(2).capacity == mk.Capacity(2)
    layer = layer_with(None)
    layer(torch.randn(5, 16))
    assert layer.last_routing.dropped is None
    for wrong in ("1.25", True, [1.0]):
        with pytest.raises(TypeError, match="MoELayer: capacity must be a Capacity, a factor or None, got"):
            layer_with(wrong)


def test_a_sequence_needs_a_sequence():
    layer = layer_with(mk.Capacity(1.0, group="sequence"))
    with pytest.raises(ValueError, match='MoELayer: x must be at least 3-D with capacity.group="sequence", got 2-D'):
        layer(torch.randn(5, 16))
    assert layer(torch.randn(0, 5, 16)).shape == (0, 5, 16)
    assert layer(torch.randn(5, 0, 16)).shape == (5, 0, 16)


def test_losses_count_before_the_drop():
    x = torch.randn(30, 16)
    free, tight = (layer_with(capacity, losses="switch") for capacity in (None, mk.Capacity(fixed=1)))
    free(x), tight(x)
    assert tight.last_routing.dropped.any() and torch.equal(free.aux_loss, tight.aux_loss)


@pytest.mark.parametrize("rule", [
    mk.Capacity(1.0), mk.Capacity(1.3, rounding="round"), mk.Capacity(0.9, rounding="floor", min_capacity=2),
    mk.Capacity(1.0, group="sequence"), mk.Capacity(fixed=2, group=5),
], ids=repr)  # fmt: skip
def test_dynamic_shapes_compile_once(rule):
    """The capacity of a symbolic number of tokens."""
    layer = layer_with(rule)
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    for tokens in (9, 31, 77):
        x = torch.randn(2, tokens, 16)
        y, dropped = compiled(x), layer.last_routing.dropped
        assert torch.equal(y, layer(x)) and torch.equal(dropped, layer.last_routing.dropped)
    assert len(graphs) == 1
