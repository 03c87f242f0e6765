# SPDX-License-Identifier: Apache-2.0
"""Every op is a well-behaved torch op (opcheck), and every backward the derivative of its forward (gradcheck)."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import moe_kernels as mk
from moe_kernels.schemas import ACTIVATIONS, SCHEMAS, SCORING
from moe_kernels.testing import make_case

OPS = torch.ops.moe_kernels


def samples(dtype=torch.float32):
    """One or more argument lists of every op."""
    logits = torch.randn(6, 8, dtype=dtype)
    case = make_case(6, 12, 5, 4, 2, dtype=dtype, bias=True, hidden_mask=True, expert_map=True)
    weights, ids = case.topk_weights, case.topk_ids % 4
    tail = (case.w13_bias, case.w2_bias, case.expert_map, case.hidden_mask, 0, True)
    experts = (case.x, case.w13, case.w2, weights, ids, *tail, False, False, False, 7.0, 1.702, False)
    r = mk.route(logits, 2)
    p = mk.permute(case.x, r.topk_ids, 8, align=2)
    b = torch.randn(8, 12, 7, dtype=dtype)
    packed = OPS.pack_experts(case.w13, case.w2, True, False, False, 1)
    yield "route", (logits, 2, 0, True, 0.0, 1.5, 0.0, 1, 1, 1, None, None, 0, False)
    yield "route", (logits, 2, 1, True, 1e-20, 1.5, 3.0, 4, 2, 2, torch.randn(8, dtype=dtype), torch.arange(6) < 4,
                    3, True)  # fmt: skip
    yield (
        "route_backward",
        (torch.rand_like(r.topk_weights), None, torch.rand(2, 8, dtype=r.topk_weights.dtype), logits, r.topk_ids,
         r.topk_weights, 0, True, 0.0, 1.0, 0.0, True),
    )  # fmt: skip
    yield "sum_scores", (logits, 1, True, 3.0, 2, torch.arange(6) < 4)
    yield "sum_scores_backward", (torch.rand(2, 8, dtype=dtype), logits, 0, False, 0.0, 2, None)
    cuts = OPS.expert_cuts(logits, 2, 3, torch.arange(6) < 4)
    yield "expert_cuts", (logits, 2, 3, torch.arange(6) < 4)
    yield "expert_choice", (logits, *cuts[:3], 5)
    yield "sinkhorn", (logits, 1, 1e-4, 100, None)
    yield "sinkhorn", (logits, 3, 1e-4, 100, torch.arange(6) < 4)
    yield "limit_capacity", (r.topk_ids, 8, 2, 4)
    yield "permute", (case.x, r.topk_ids, 8, 4)
    yield "permute_backward", (torch.randn_like(p.x_rows), p.slot_to_row, 6)
    yield "grouped_gemm", (p.x_rows, b, p.expert_offsets[1:], None, 1, False, None)
    yield "grouped_gemm", (p.x_rows, b, p.expert_offsets[1:], torch.randn(8, 7, dtype=dtype), 1, True, None)
    yield "grouped_gemm", (b, b.mT, None, None, 1, False, None)
    yield "grouped_gemm_backward", (p.x_rows, torch.randn(len(p.x_rows), 7), p.expert_offsets[1:], torch.randn_like(b),
                                    False)  # fmt: skip
    yield "unpermute", (p.x_rows, p.slot_to_row, r.topk_weights)
    yield "unpermute_backward", (torch.randn(6, 12, dtype=dtype), p.x_rows, p.slot_to_row, r.topk_weights)
    yield "fused_experts", (*experts, None, None, False)
    full = tuple(
        None if a is case.expert_map else a for a in experts
    )  # with absent slots hidden has rows that nobody reads
    _, hidden = OPS.fused_experts(*full, None, None, True)
    yield "fused_experts", (*full, None, None, True)
    for needs in (63, 5):
        yield "fused_experts_backward", (case.grad_y, hidden, *full, None, None, needs)
    main_grads = (torch.randn_like(case.w13), torch.randn_like(case.w2))
    yield "fused_experts_backward", (case.grad_y, hidden, *full, *main_grads, 63)
    yield "pack_experts", (case.w13, case.w2, True, False, False, 2)
    yield "fused_experts_packed", (case.x, *packed, 5, weights, ids, *tail, False, 7.0, 1.702)


DIFFERENTIABLE = (
    "route", "sum_scores", "expert_choice", "sinkhorn", "permute", "grouped_gemm", "unpermute", "fused_experts"
)  # fmt: skip


@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(gradient):
    seen = set()
    for name, args in samples():
        seen.add(name)
        if gradient:
            if name not in DIFFERENTIABLE or (name == "fused_experts" and not args[-1]):
                continue
            args = tuple(
                a.detach().requires_grad_()
                if isinstance(a, torch.Tensor) and a.is_floating_point() and i not in (8, 10)
                else a
                for i, a in enumerate(args)
            )  # fmt: skip  not: hidden_mask, selection bias
        opcheck(getattr(OPS, name).default, args)
    assert seen == set(SCHEMAS)


def distinct(T, E):
    return (torch.stack([torch.randperm(E) for _ in range(T)]).double() / 3).requires_grad_()


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scoring", SCORING)
def test_gradcheck_route(scoring, renormalize, softcap):
    mask = torch.tensor([True, True, False, True])

    def weights_and_lse(logits):
        got = mk.route(logits, 3, scoring_func=scoring, renormalize=renormalize, logit_softcap=softcap,
                       routed_scaling_factor=1.7, padding_mask=mask, renormalize_eps=0.01)  # fmt: skip
        return got.topk_weights if got.lse is None else (got.topk_weights, got.lse)

    assert gradcheck(weights_and_lse, distinct(4, 6))


def test_gradcheck_permute_and_unpermute():
    ids = torch.tensor([[0, 2], [2, -1], [1, 0]])
    assert gradcheck(
        lambda x: mk.permute(x, ids, 3, align=2).x_rows, torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    )
    maps = mk.permute(torch.zeros(3, 2), ids, 3, align=2)
    rows = torch.randn(len(maps.row_to_slot), 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda r, w: mk.unpermute(r, maps.slot_to_row, w), (rows, weights))


@pytest.mark.parametrize("case", ["rows", "columns", "inner", "batch"])
def test_gradcheck_grouped_gemm(case):
    offs = None if case == "batch" else torch.tensor([1, 1, 4], dtype=torch.int32)
    a = torch.randn((3, 5, 5) if case in ("columns", "batch") else (5, 5), dtype=torch.float64, requires_grad=True)
    b = torch.randn((3, 5, 5) if case in ("rows", "batch") else (5, 5), dtype=torch.float64, requires_grad=True)
    inputs = (a, b) if case == "columns" else (a, b, torch.randn(3, 5, dtype=torch.float64, requires_grad=True))

    def product(a, b, bias=None):
        return mk.grouped_gemm(a, b, offs, bias=bias)

    assert gradcheck(product, inputs)
    assert gradgradcheck(product, inputs)


@pytest.mark.parametrize("weight_on_input", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_fused_experts(activation, gated, weight_on_input):
    gated = gated or activation == "swigluoai"
    case = make_case(4, 3, 2, 3, 2, dtype=torch.float64, activation=activation, gated=gated, bias=True, absent=True,
                     hidden_mask=True, weight_on_input=weight_on_input, seed=4)  # fmt: skip
    leaves = {name: t.requires_grad_() for name, t in case.leaves().items()}

    def layer(x, w13, w2, topk_weights, w13_bias, w2_bias):
        options = case.options() | {"w13_bias": w13_bias, "w2_bias": w2_bias}
        return mk.fused_experts(x, w13, w2, topk_weights, case.topk_ids, **options)

    assert gradcheck(layer, tuple(leaves.values()))
