# SPDX-License-Identifier: Apache-2.0
"""sinkhorn: the plan against its definition in float64, ids against the plan, weights and gradients, any threads."""

import math

import pytest
import torch

from moe_kernels import reference
from moe_kernels.routers import assignment
from moe_kernels.testing import UNIT, check

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(0, 3, 1), (1, 1, 1), (7, 3, 2), (64, 8, 1), (65, 37, 4), (130, 70, 70), (300, 16, 2), (600, 33, 3)]


def case(T, E, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(T, E, generator=g, dtype=torch.float64)).to(dtype), torch.rand(T, generator=g) < 0.7


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("T", "E", "K"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_reference(backend, T, E, K, dtype, masked):
    logits, mask = case(T, E, dtype)
    mask = mask if masked else None
    steps = 5  # a fixed number of steps: the tolerance is not reached
    got = backend.sinkhorn(logits, K, 1e-30, steps, padding_mask=mask)
    live = torch.ones(T, dtype=torch.bool) if mask is None else mask
    shift = (
        logits[live].max().double() if dtype.itemsize == 2 and live.any() else 0.0
    )  # in half precision: largest is 0
    want = reference.sinkhorn(logits.double() - shift, K, 1e-300, steps, padding_mask=mask)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.plan.dtype == got.topk_weights.dtype == acc
    check(got.plan, want.plan, (2 * steps * (T + E) + 64) * UNIT[acc] * want.plan + 1e-30, "plan")
    assert not got.plan[~live].any() and (got.topk_ids[~live] == -1).all() and not got.topk_weights[~live].any()
    ids = reference.select(got.plan, K)[live]
    assert torch.equal(got.topk_ids[live].long(), ids)  # of the very plan that came
    counts = torch.bincount(ids.flatten(), minlength=E)
    assert torch.equal(got.tokens_per_expert.long(), counts) and got.topk_ids.dtype == torch.int32
    s = reference.scores(logits.double(), "sigmoid" if K == 1 else "softmax")[1][live].gather(1, ids)
    check(got.topk_weights[live], s, (E + 16) * UNIT[acc] * s + 1e-30, "weights")
    assert E == 1 or int(got.iterations) == (steps if live.any() else 0)  # one column does not move: it ends sooner


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_plan_is_balanced(backend, dtype):
    logits, mask = case(80, 8, dtype)
    got = backend.sinkhorn(logits / 2, 1, 1e-4, 1000, padding_mask=mask)
    assert 1 < int(got.iterations) < 20
    plan, n = got.plan[mask].double(), int(mask.sum())
    assert torch.allclose(plan.sum(0), torch.full((8,), 1 / 8, dtype=torch.float64), rtol=1e-5)
    assert torch.allclose(plan.sum(1), torch.full((n,), 1 / n, dtype=torch.float64), rtol=1e-2)
    assert int(backend.sinkhorn(logits, 1, 1e-30, 3).iterations) == 3


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient(backend, K, dtype):
    logits, mask = case(40, 12, dtype)
    leaf, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got = backend.sinkhorn(leaf, K, padding_mask=mask)
    pull = torch.randn(got.topk_weights.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pull = pull.to(got.topk_weights.dtype)
    (grad,) = torch.autograd.grad(got.topk_weights, leaf, pull)
    s = truth.sigmoid() if K == 1 else truth.softmax(1)
    w = s.gather(1, got.topk_ids.long().clamp(min=0)) * mask[:, None]
    (want,) = torch.autograd.grad(w, truth, pull.double())
    check(grad, want, 44 * UNIT[pull.dtype] * pull.double().abs().max() + UNIT[dtype] * want.abs(), "grad")
    assert not grad[~mask].any() and grad[mask].any()


def test_ties_go_to_the_lowest_expert(backend):
    assert backend.sinkhorn(torch.zeros(5, 4), 2).topk_ids.tolist() == [[0, 1]] * 5


def test_logits_that_are_not_finite_or_large(backend):
    inf = math.inf
    logits = torch.tensor([[-inf, -inf, -inf], [math.nan, 1.0, 0.0], [0.5, 2.0, -inf], [500.0, 1.0, 3.0]])
    got = backend.sinkhorn(logits.requires_grad_(), 2)
    assert got.plan.isfinite().all() and got.topk_weights.isfinite().all() and not got.topk_weights[0].any()
    (grad,) = torch.autograd.grad(got.topk_weights.square().sum(), logits)
    assert grad.isfinite().all()
    wide = (100 * torch.randn(70, 8, generator=torch.Generator().manual_seed(0))).bfloat16()
    assert backend.sinkhorn(wide, 1).plan.isfinite().all()
    nobody = backend.sinkhorn(wide, 1, padding_mask=torch.zeros(70, dtype=torch.bool))
    assert int(nobody.iterations) == 0 and not nobody.plan.any() and not nobody.tokens_per_expert.any()


def test_strided_rows(backend):
    logits, _ = case(70, 12)
    want, got = backend.sinkhorn(logits[:, :5].contiguous(), 2), backend.sinkhorn(logits[:, :5], 2)
    assert all(torch.equal(a, b) for a, b in zip(want, got))


def test_the_same_for_any_number_of_threads():
    logits, mask = case(3000, 40)
    found, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(assignment.balance(logits, 2, padding_mask=mask))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_it_keeps_what_was_chosen():
    """Beside the logits the backward needs ids and weights alone: no [T, E]."""
    logits, kept = case(64, 128)[0].requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = assignment.balance(logits, 2)
    others = [t for t in kept if t.data_ptr() != logits.data_ptr()]
    assert others and all(t.shape == found.topk_ids.shape for t in others)


def test_errors():
    with pytest.raises(RuntimeError, match=r"top_k must be in 1..E=2, got 3"):
        assignment.balance(torch.zeros(6, 2), 3)
    with pytest.raises(RuntimeError, match="tol and max_iterations must be positive, got 0"):
        assignment.balance(torch.zeros(6, 2), 1, 0.0)
