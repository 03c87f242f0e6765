# SPDX-License-Identifier: Apache-2.0
"""expert_choice: which tokens every expert takes, against a sort; weights and gradients against float64."""

import pytest
import torch

import moe_kernels as mk
from moe_kernels import reference
from moe_kernels.routers import expert_choice
from moe_kernels.testing import UNIT, check

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = [  # T, E, n, C
    (0, 3, 1, 1), (1, 1, 1, 1), (7, 3, 7, 2), (64, 8, 16, 4), (70, 37, 35, 9), (40, 5, 40, 40), (33, 130, 33, 1),
    (600, 6, 300, 90),
]  # fmt: skip


def case(T, E, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(T, E, generator=g, dtype=torch.float64)).to(dtype), torch.rand(T, generator=g) < 0.7


def by_sorting(logits, count, n, mask):
    """ids of every token, from sorted columns of the scores in the precision that the kernels have."""
    s = mk.route(logits, logits.shape[1], renormalize=False)
    p = torch.zeros_like(s.topk_weights).scatter(1, s.topk_ids.long(), s.topk_weights)
    experts = [[] for _ in range(len(logits))]
    for first in range(0, len(logits), n):
        for e in range(logits.shape[1]):
            tokens = sorted(range(first, first + n), key=lambda t: (-float(p[t, e]), t))
            tokens = [t for t in tokens if mask is None or mask[t]][:count]
            for t in tokens:
                experts[t].append((-float(p[t, e]), e))
    return [[e for _, e in sorted(pairs)] for pairs in experts]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("T", "E", "n", "C"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_best_tokens_of_every_expert(backend, T, E, n, C, dtype, masked):
    logits, mask = case(T, E, dtype)
    mask = mask if masked else None
    got = backend.expert_choice(logits, C, n, padding_mask=mask, slots=None if T else 1)
    if backend.name != "reference" or dtype == torch.float64:  # torch's softmax may differ in the last bit
        assert [row[row >= 0].tolist() for row in got.topk_ids] == by_sorting(logits, C, n, mask)
    absent = got.topk_ids < 0
    assert not got.topk_weights[absent].any() and (absent.int().diff(dim=1) >= 0).all()  # absent ones come last
    live = torch.ones(T, dtype=torch.bool) if mask is None else mask
    tokens = live.reshape(-1, n).sum(1).clamp(max=C).sum() if T else 0
    assert got.tokens_per_expert.tolist() == [tokens] * E and got.tokens_per_expert.dtype == torch.int32
    assert torch.equal(got.tokens_per_expert, torch.bincount(got.topk_ids[~absent], minlength=E).int())
    p = reference.scores(logits.double())[1]
    want = torch.where(absent, 0.0, p.gather(1, got.topk_ids.long().clamp(min=0)))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.topk_weights.dtype == acc
    check(got.topk_weights, want, (E + 16) * UNIT[acc] * want + 1e-30, "weights")


@pytest.mark.parametrize(("T", "E", "n", "C"), [(12, 8, 6, 2), (70, 37, 35, 9)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient(backend, T, E, n, C, dtype):
    logits, mask = case(T, E, dtype)
    leaf, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got = backend.expert_choice(leaf, C, n, padding_mask=mask)
    pull = torch.randn(got.topk_weights.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad(got.topk_weights, leaf, pull.to(got.topk_weights.dtype))
    present = got.topk_ids >= 0
    w = truth.softmax(1).gather(1, got.topk_ids.long().clamp(min=0)) * present
    (want,) = torch.autograd.grad(w, truth, pull.to(got.topk_weights.dtype).double())
    acc = got.topk_weights.dtype
    check(grad, want, (E + 32) * UNIT[acc] * pull.abs().max() + UNIT[dtype] * want.abs(), "grad")
    assert not grad[~mask].any() and grad.any()


def test_ties_go_to_the_lowest_token_and_the_lowest_expert(backend):
    got = backend.expert_choice(torch.zeros(9, 4), 2, 3)
    assert got.topk_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [-1] * 4] * 3
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert backend.expert_choice(logits, 2, 4).topk_ids.tolist() == [[0, 1], [0, -1], [1, -1], [-1, -1]]


def test_rows_that_hold_nothing_finite(backend):
    """NaN is -inf; a token without any finite logit has score 0, and is taken last."""
    inf = torch.inf
    logits = torch.tensor([[-inf, -inf], [torch.nan, 1.0], [inf, 0.0], [0.0, 0.0]], requires_grad=True)
    got = backend.expert_choice(logits, 3, 4)
    assert got.tokens_per_expert.tolist() == [3, 3] and got.topk_weights.isfinite().all()
    assert got.topk_ids.tolist() == [[0, 1], [1, -1], [0, -1], [0, 1]]
    (grad,) = torch.autograd.grad(got.topk_weights.square().sum(), logits)
    assert grad.isfinite().all() and not grad[0].any()


def test_strided_rows_and_given_slots(backend):
    logits, _ = case(24, 12)
    want = backend.expert_choice(logits[:, :6].contiguous(), 4, 12)
    got = backend.expert_choice(logits[:, :6], 4, 12, slots=6)
    K = want.topk_ids.shape[1]
    assert torch.equal(got.topk_ids[:, :K], want.topk_ids) and (got.topk_ids[:, K:] == -1).all()
    assert torch.equal(got.topk_weights[:, :K], want.topk_weights) and not got.topk_weights[:, K:].any()


def test_the_same_for_any_number_of_threads():
    logits, mask = case(2000, 33)
    found, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(expert_choice.choose(logits, 100, 500, padding_mask=mask))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0][:3], other[:3]))


def test_it_keeps_what_was_chosen():
    """Beside the logits the backward needs ids and weights alone: no [T, E]."""
    logits, kept = case(64, 128)[0].requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        routing = expert_choice.choose(logits, 4, 64)
    others = [t for t in kept if t.data_ptr() != logits.data_ptr()]
    assert others and all(t.shape == routing.topk_ids.shape for t in others)


@pytest.mark.parametrize(("count", "n", "text"), [
    (1, 4, "T=6 must be a multiple of group_size=4"), (0, 3, r"count must be in 1..group_size=3, got 0"),
    (4, 3, r"count must be in 1..group_size=3, got 4"),
])  # fmt: skip
def test_errors(count, n, text):
    with pytest.raises(RuntimeError, match=text):
        expert_choice.choose(torch.zeros(6, 2), count, n)
