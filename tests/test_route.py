# SPDX-License-Identifier: Apache-2.0
"""route: ids and counts exactly, weights, lse and gradients within the derived bound, every rule of the edge cases."""

import itertools
import math

import pytest
import torch

from moe_kernels import reference
from moe_kernels.schemas import SCORING, acc_dtype
from moe_kernels.testing import SAFETY, UNIT, check

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 8, 2), (1, 1, 1), (5, 3, 3), (33, 8, 2), (7, 128, 8), (3, 2048, 1), (9, 37, 5), (20, 60, 30)]
RULES = {
    "plain": {},
    "unnormalised": {"renormalize": False},
    "scaled": {"routed_scaling_factor": 2.5},
    "v2": {"renormalize": True, "scale_when_renormalized": False, "routed_scaling_factor": 16.0},
    "eps": {"renormalize_eps": 1e-2},
    "softcap": {"logit_softcap": 3.0, "renormalize": False},
    "bias": {"bias": True},
    "groups": {"num_expert_group": 4, "topk_group": 2},
    "groups_bias": {"num_expert_group": 4, "topk_group": 2, "bias": True, "routed_scaling_factor": 2.5},
    "group_top3": {"num_expert_group": 2, "topk_group": 1, "group_top": 3, "bias": True},
    "single_groups": {"num_expert_group": "E", "topk_group": "K", "bias": True},
    "masked": {"mask": True},
}


def logits_of(T, E, dtype, seed=0):
    """Random logits whose neighbours differ clearly in any dtype: a permutation of well-spaced values a row."""
    g = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(E, generator=g) for _ in range(T)]) if T else torch.zeros(0, E)
    return ((order.double() - E / 2) * (8 / E)).to(dtype)


def options_of(rule, E, K):
    options = dict(RULES[rule])
    for name, letter in itertools.product(("num_expert_group", "topk_group"), ("E", "K")):
        if options.get(name) == letter:
            options[name] = {"E": E, "K": K}[letter]
    G, M = options.get("num_expert_group", 1), options.get("topk_group", 1)
    return options if E % G == 0 and M <= G and K <= M * E // G else None


def magnitudes(logits, options, scoring, ids, grad_weights, grad_lse):
    """What the bound of the weights, of the lse and of the logit gradient is made of, in float64.

    Relative errors are u times: the largest |l| (the argument of exp), sqrt(E) (the sum), a few for exp and division.
    The gradient of slot k reaches logit j through score s_j and, renormalised or softmax, through the sums: every term
    once, without sign.
    """
    l, s = reference.scores(logits.double(), scoring, options.get("logit_softcap", 0.0))
    acc, E = acc_dtype(logits.dtype), logits.shape[1]
    relative = SAFETY * UNIT[acc] * (8 + math.sqrt(E) + 2 * l.abs().amax(-1, keepdim=True))
    sel = s.gather(1, ids.long().clamp(min=0)) * (ids >= 0)
    renormalize, scale = reference.effective_scale(
        options.get("renormalize", True), ids.shape[1], options.get("routed_scaling_factor", 1.0),
        options.get("scale_when_renormalized", True),
    )  # fmt: skip
    eps = options.get("renormalize_eps", 0.0 if scoring == "softmax" else 1e-20)
    total = sel.sum(-1, keepdim=True) + eps if renormalize else torch.ones_like(sel[:, :1])
    total = torch.where(total > 0, total, 1.0)
    pull = grad_weights.double().abs() * (ids >= 0)
    shared = (pull * sel / total).sum(-1, keepdim=True)
    onto = torch.zeros_like(s).scatter_add(
        1, ids.long().clamp(min=0), (pull + (shared if renormalize else 0)) * (ids >= 0)
    )
    slope = {"softmax": s, "sigmoid": s, "sqrtsoftplus": l.sigmoid() / (2 * s)}[scoring]
    grad = onto * slope * scale / total
    if scoring == "softmax":
        grad = grad + s * ((onto * s).sum(-1, keepdim=True) * scale / total + grad_lse.double().abs()[:, None])
    return relative, grad


BRIEF = ("plain", "softcap", "groups_bias", "masked")  # of the 16-bit types
CASES = [(dtype, rule) for dtype in DTYPES for rule in RULES if dtype.itemsize > 2 or rule in BRIEF]


def compare(backend, T, E, K, dtype, rule, scoring):
    """Everything that route returns, and the gradient, of one shape; shapes that the rule cannot have pass."""
    options = options_of(rule, E, K)
    if options is None:
        return
    logits = logits_of(T, E, dtype).requires_grad_()
    bias = torch.linspace(0.2, -0.2, E)[torch.randperm(E)] if options.pop("bias", False) else None
    mask = torch.arange(T) % 3 != 1 if options.pop("mask", False) else None
    call = dict(options, scoring_func=scoring, e_score_correction_bias=bias, padding_mask=mask)
    got = backend.route(logits, K, **call)
    truth_in = logits.detach().double().requires_grad_()
    truth = reference.route(truth_in, K, **call)
    acc = acc_dtype(dtype)
    assert (got.topk_weights.dtype, got.topk_ids.dtype, got.tokens_per_expert.dtype) == (
        acc,
        torch.int32,
        torch.int32,
    )
    assert got.dropped is None
    assert (got.lse is not None) == (scoring == "softmax")
    assert torch.equal(got.tokens_per_expert, torch.bincount(got.topk_ids[got.topk_ids >= 0], minlength=E).int())
    if bias is None:  # with a bias two scores may come arbitrarily close
        assert torch.equal(got.topk_ids, truth.topk_ids)
    elif not torch.equal(got.topk_ids, truth.topk_ids):
        assert dtype != torch.float64
        return
    grad_w = torch.randn(T, K, dtype=torch.float64)
    grad_lse = torch.randn(T, dtype=torch.float64)
    relative, size = magnitudes(logits.detach(), options, scoring, truth.topk_ids, grad_w, grad_lse)
    check(got.topk_weights, truth.topk_weights, relative * truth.topk_weights.detach().abs(), "topk_weights")
    outputs, cotangents = [got.topk_weights], [grad_w.to(acc)]
    truths, truth_cotangents = [truth.topk_weights], [grad_w.to(acc).double()]
    if got.lse is not None:
        check(got.lse, truth.lse, relative[:, 0] * (1 + truth.lse.detach().abs()), "lse")
        outputs, cotangents = [*outputs, got.lse], [*cotangents, grad_lse.to(acc)]
        truths, truth_cotangents = [*truths, truth.lse], [*truth_cotangents, grad_lse.to(acc).double()]
    (grad,) = torch.autograd.grad(outputs, logits, cotangents)
    (grad_truth,) = torch.autograd.grad(truths, truth_in, truth_cotangents)
    assert grad.dtype == dtype
    floor = {torch.float16: 2.0**-25}.get(dtype, 0.0) + torch.finfo(acc).tiny
    check(grad, grad_truth, relative * size + 2 * UNIT[dtype] * grad_truth.abs() + floor, "grad_logits")


@pytest.mark.parametrize("scoring", SCORING)
@pytest.mark.parametrize(("dtype", "rule"), CASES, ids=str)
def test_route(backend, dtype, rule, scoring):
    for T, E, K in SHAPES:
        compare(backend, T, E, K, dtype, rule, scoring)


@pytest.mark.parametrize("scoring", SCORING)
@pytest.mark.parametrize("K", [1, 3, 7, 30])
def test_ties_go_to_the_lowest_id(backend, scoring, K):
    logits = torch.tensor([0.0, 1.0, -1.0]).repeat(20)[torch.randperm(60)].repeat(5, 1)
    got = backend.route(logits, K, scoring_func=scoring)
    wanted = sorted(range(60), key=lambda e: (-float(logits[0, e]), e))[:K]
    assert got.topk_ids.tolist() == [wanted] * 5


def test_group_ties_go_to_the_lowest_group(backend):
    got = backend.route(torch.zeros(2, 12), 2, num_expert_group=4, topk_group=2)
    assert got.topk_ids.tolist() == [[0, 1]] * 2
    bias = torch.zeros(12)
    bias[[4, 11]] = 0.25
    got = backend.route(torch.zeros(1, 12), 4, num_expert_group=4, topk_group=2, e_score_correction_bias=bias)
    assert got.topk_ids.tolist() == [[4, 11, 3, 5]]


def test_a_negative_choice_is_still_chosen_before_a_masked_group(backend):
    bias = torch.tensor([-2.0, -2.5, -3.0, -4.0])
    got = backend.route(torch.zeros(1, 4), 2, scoring_func="sigmoid", e_score_correction_bias=bias, num_expert_group=2,
                        topk_group=1)  # fmt: skip
    assert got.topk_ids.tolist() == [[0, 1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scoring", SCORING)
def test_rows_without_a_finite_logit(backend, scoring, dtype):
    logits = torch.full((2, 5), -math.inf, dtype=dtype)
    logits[1] = math.nan
    logits.requires_grad_()
    got = backend.route(logits, 3, scoring_func=scoring)
    assert got.topk_ids.tolist() == [[0, 1, 2]] * 2
    assert got.topk_weights.tolist() == [[0, 0, 0]] * 2
    if got.lse is not None:
        assert got.lse.tolist() == [0, 0]
    out = got.topk_weights.sum() + (got.lse.sum() if got.lse is not None else 0)
    (grad,) = torch.autograd.grad(out, logits)
    assert grad.eq(0).all()


@pytest.mark.parametrize("scoring", SCORING)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("bias", [False, True])
def test_nan_and_infinite_logits(backend, scoring, softcap, bias):
    row = [math.nan, 1.0, math.inf, -math.inf, 0.5, 0.25]
    logits = torch.tensor([row, [0.0] * 6], requires_grad=True)
    b = torch.tensor([9.0, 0.0, 0.0, 9.0, 0.0, 0.0]) if bias else None
    got = backend.route(logits, 5, scoring_func=scoring, logit_softcap=softcap, e_score_correction_bias=b)
    assert got.topk_ids[0].tolist() == [2, 1, 4, 5, 0]  # NaN and -inf come last, whatever the bias
    assert got.topk_weights.isfinite().all()
    assert got.topk_weights[0, 4] == 0
    (grad,) = torch.autograd.grad(got.topk_weights.square().sum(), logits)
    assert grad.isfinite().all()
    assert grad[0, [0, 2, 3]].eq(0).all()


def test_a_slot_without_a_finite_choice_weighs_nothing(backend):
    logits = torch.tensor([[1.0, 0.5, 9.0, math.nan]])
    got = backend.route(logits, 2, renormalize=False, num_expert_group=2, topk_group=1)
    assert got.topk_ids.tolist() == [[2, 0]]
    assert got.topk_weights[0, 1] == 0


@pytest.mark.parametrize("renormalize", [False, True])
def test_an_expert_out_of_reach_gets_no_gradient(backend, renormalize):
    logits = torch.tensor([[1.0, 0.5, 0.25, math.nan]], requires_grad=True)  # the masked group holds ids 2 and 3
    bias = torch.tensor([0.0, 0.0, 9.0, 9.0])
    got = backend.route(
        logits, 2, scoring_func="sigmoid", renormalize=renormalize, num_expert_group=2, topk_group=1, group_top=1,
        e_score_correction_bias=bias,
    )  # fmt: skip
    assert got.topk_ids.tolist() == [[2, 0]]
    (grad,) = torch.autograd.grad(got.topk_weights @ torch.tensor([1.0, 5.0]), logits)
    assert grad[0, [0, 1, 3]].eq(0).all()


def test_a_nan_bias_is_never_chosen_before_a_number(backend):
    bias = torch.tensor([math.nan, 0.0, 0.0])
    assert backend.route(
        torch.zeros(1, 3), 3, scoring_func="sigmoid", e_score_correction_bias=bias
    ).topk_ids.tolist() == [[1, 2, 0]]


def test_huge_logits_stay_finite(backend):
    logits = torch.tensor([[3e38, -3e38, 0.0, 1.0]], requires_grad=True)
    for scoring in SCORING:
        got = backend.route(logits, 3, scoring_func=scoring)
        (grad,) = torch.autograd.grad(got.topk_weights.square().sum(), logits)
        assert got.topk_weights.isfinite().all()
        assert grad.isfinite().all()


def test_far_negative_logits_keep_their_ratio(backend):
    logits = torch.tensor([[-30.0, -31.0, -90.0]], requires_grad=True)
    got = backend.route(logits, 2, scoring_func="sqrtsoftplus", renormalize_eps=0.0)
    truth = reference.route(logits.detach().double(), 2, scoring_func="sqrtsoftplus", renormalize_eps=0.0)
    check(got.topk_weights, truth.topk_weights, 200 * UNIT[torch.float32])
    (grad,) = torch.autograd.grad(got.topk_weights[0, 0], logits)
    assert grad.isfinite().all()
    assert grad[0, 0] > 0


def test_padding_mask(backend):
    logits = torch.randn(6, 8, requires_grad=True)
    mask = torch.tensor([True, False, True, True, False, True])
    got = backend.route(logits, 2, padding_mask=mask)
    alone = backend.route(logits[mask], 2)
    assert got.topk_ids[~mask].eq(-1).all()
    assert got.topk_weights[~mask].eq(0).all()
    assert got.lse[~mask].eq(0).all()
    assert torch.equal(got.topk_ids[mask], alone.topk_ids)
    assert torch.equal(got.topk_weights[mask], alone.topk_weights)
    assert torch.equal(got.tokens_per_expert, alone.tokens_per_expert)
    (grad,) = torch.autograd.grad(got.topk_weights.square().sum() + got.lse.sum(), logits)
    assert grad[~mask].eq(0).all()
    assert grad[mask].ne(0).any()


def test_only_k1_renormalised_has_no_gradient(backend):
    logits = torch.randn(500, 6, requires_grad=True)
    one = backend.route(logits, 1).topk_weights
    assert torch.equal(one, torch.ones_like(one))
    raw = backend.route(logits, 1, renormalize=False).topk_weights
    assert torch.autograd.grad(raw.sum(), logits)[0].ne(0).any()


def test_v2_rule(backend):
    logits = torch.randn(4, 6)
    kept = backend.route(logits, 2, routed_scaling_factor=16.0, scale_when_renormalized=False).topk_weights
    assert torch.equal(kept, backend.route(logits, 2).topk_weights)
    single = backend.route(logits, 1, routed_scaling_factor=16.0, scale_when_renormalized=False).topk_weights
    assert torch.equal(single, backend.route(logits, 1, renormalize=False, routed_scaling_factor=16.0).topk_weights)


@pytest.mark.parametrize(
    "make", [lambda x: x[:, ::2], lambda x: x[::2, :8], lambda x: x.T[:8].T, lambda x: x[:, :8].flip(1)]
)
def test_strides(backend, make):
    strided = make(torch.randn(10, 16)).detach().requires_grad_()
    plain = strided.detach().contiguous().requires_grad_()
    found = []
    for logits in (strided, plain):
        got = backend.route(logits, 3)
        (grad,) = torch.autograd.grad(got.topk_weights.square().sum(), logits)
        found.append((got.topk_ids, got.topk_weights, grad))
    assert all(torch.equal(a, b) for a, b in zip(*found))


def hard_rows(E):
    """Rows whose best are hard to tell apart or to find."""
    g, up = torch.Generator().manual_seed(0), torch.arange(E, dtype=torch.float32)
    neighbours = (1.0 + torch.randperm(E, generator=g) * 2.0**-23).float()  # their scores are partly equal
    deep = torch.where(up % 3 == 0, -85.0 - up / E, -95.0)  # scores below the smallest normal number, and zeros
    deep[E // 2] = 0.0
    few = torch.full((E,), -math.inf)
    few[-3:] = torch.tensor([1.0, 3.0, 1.0])
    return torch.stack([
        torch.randn(E, generator=g), up / E, -up / E, torch.zeros(E), neighbours, 80 + neighbours, deep, few, up % 2,
        torch.randn(E, generator=g).bfloat16().float(),
    ])  # fmt: skip


@pytest.mark.parametrize("E", [3, 16, 33, 256, 700])
def test_the_k_best_are_the_first_of_all(backend, E):
    """Whatever K, the choice is the beginning of the order by (score, lowest id); K = E looks at every score."""
    logits = hard_rows(E)
    whole = backend.route(logits, E, renormalize=False)
    scores = torch.zeros_like(logits).scatter(1, whole.topk_ids.long(), whole.topk_weights)
    scores = torch.where(logits.isfinite(), scores, -1.0)  # out of reach: behind a score of 0
    order = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(whole.topk_ids.long(), order.indices)
    for K in {1, 2, 8, E // 2, E - 1}:
        if 1 <= K <= E:
            got = backend.route(logits, K, renormalize=False)
            assert torch.equal(got.topk_ids.long(), order.indices[:, :K]), K
            assert torch.equal(got.topk_weights, order.values[:, :K].clamp(min=0)), K
