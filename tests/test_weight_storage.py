# SPDX-License-Identifier: Apache-2.0
"""Weights as they come: unaligned, expanded, with gaps; and memory that is not there."""

import pytest
import torch

import moe_kernels as mk
from moe_kernels.testing import Case, make_case

ROWS = [1, 40]  # tokens an expert and more: weights read where they lie, and packed first


def unaligned(t: torch.Tensor) -> torch.Tensor:
    """The same values one element behind an aligned address."""
    return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)


def with_gaps(t: torch.Tensor) -> torch.Tensor:
    """The same values in every second row of every second expert of a larger tensor."""
    wide = t.new_full((2 * t.shape[0], 2 * t.shape[1], t.shape[2] + 3), float("nan"))
    wide[::2, ::2, : t.shape[2]] = t
    return wide[::2, ::2, : t.shape[2]]


def outputs(case: Case) -> dict[str, torch.Tensor]:
    """y, every gradient, and y of packed weights."""
    leaves = {name: t.detach().requires_grad_() for name, t in case.leaves().items()}
    y = mk.fused_experts(topk_ids=case.topk_ids, **leaves, **case.options())
    y.backward(case.grad_y)
    packed = mk.pack_experts(case.w13, case.w2, transposed=case.transposed)
    again = mk.fused_experts(case.x, packed, None, case.topk_weights, case.topk_ids)
    return {"y": y.detach(), "packed": again, **{f"grad_{name}": t.grad for name, t in leaves.items()}}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", ROWS)
@pytest.mark.parametrize("change", [unaligned, with_gaps])
def test_storage(change, tokens: int, transposed: bool, dtype: torch.dtype) -> None:
    """The bits of the answer do not depend on where the weights lie."""
    case = make_case(tokens, 96, 80, 2, 1, dtype=dtype, transposed=transposed)
    moved = Case(**{**vars(case), "w13": change(case.w13), "w2": change(case.w2)})
    wanted, found = outputs(case), outputs(moved)
    assert wanted.keys() == found.keys()
    for name in wanted:
        assert torch.equal(wanted[name], found[name]), name


@pytest.mark.parametrize("tokens", ROWS)
def test_one_expert_for_all(tokens: int) -> None:
    """Expanded over the experts; the gradient of the one is the sum over all."""
    case = make_case(tokens, 96, 80, 4, 2)
    one = {"w13": case.w13[:1].clone(), "w2": case.w2[:1].clone()}
    leaves = {name: w.requires_grad_() for name, w in one.items()}
    full = {name: w.detach().repeat(4, 1, 1).requires_grad_() for name, w in one.items()}
    a = mk.fused_experts(case.x, leaves["w13"].expand(4, -1, -1), leaves["w2"].expand(4, -1, -1), case.topk_weights,
                         case.topk_ids)  # fmt: skip
    b = mk.fused_experts(case.x, full["w13"], full["w2"], case.topk_weights, case.topk_ids)
    assert torch.equal(a, b)
    a.backward(case.grad_y)
    b.backward(case.grad_y)
    for name in one:
        assert torch.equal(leaves[name].grad, full[name].grad.sum(0, keepdim=True)), name


def test_memory_that_is_not_there() -> None:
    """An output of four terabytes: the error names the size, and the next call works."""
    T, H = 2**24, 2**16
    x, weights = torch.zeros(1, H).expand(T, H), torch.ones(1, 1).expand(T, 1)
    ids = torch.zeros(1, 1, dtype=torch.int32).expand(T, 1)
    with pytest.raises(RuntimeError, match="4398046511104 bytes"):
        mk.fused_experts(x, torch.zeros(1, 2, H), torch.zeros(1, H, 1), weights, ids)
    case = make_case(5, 16, 8, 3, 2)
    before = outputs(case)
    assert all(torch.equal(before[name], t) for name, t in outputs(case).items())
