# SPDX-License-Identifier: Apache-2.0
"""unpermute: rows back to their tokens, weighted, forward and both gradients within the derived bound."""

import math

import pytest
import torch

from moe_kernels import reference
from moe_kernels.schemas import acc_dtype
from moe_kernels.testing import SAFETY, UNIT, check, make_ids, rounding

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 4, 3, 2), (1, 1, 1, 1), (19, 24, 6, 2), (7, 37, 128, 8), (5, 12, 3, 3), (33, 1, 8, 4), (4, 300, 2048, 1)]


def compare(backend, T, H, E, K, dtype, align, weight_dtype, g):
    acc = acc_dtype(dtype)
    ids = make_ids(T, E, K, "zipf", g)
    ids = torch.where(torch.rand(T, K, generator=g) < 0.2, -1, ids)
    maps = reference.permute(torch.zeros(T, H), ids, E, align=align)
    rows = torch.randn(len(maps.row_to_slot), H, dtype=torch.float64).to(dtype)
    rows = torch.where(maps.row_to_slot[:, None] < 0, math.nan, rows).requires_grad_()  # rows of no slot are not read
    weights = torch.rand(T, K, dtype=torch.float64).to(weight_dtype or acc)
    weights = torch.where(maps.slot_to_row.reshape(T, K) < 0, math.inf, weights).requires_grad_()
    grad_y = torch.randn(T, H, dtype=torch.float64).to(dtype)
    y = backend.unpermute(rows, maps.slot_to_row, weights)
    assert y.dtype == dtype
    grads = torch.autograd.grad(y, (rows, weights), grad_y)
    assert grads[1].dtype == weights.dtype
    leaves = [rows.detach().double().requires_grad_(), weights.detach().double().requires_grad_()]
    truth = reference.unpermute(leaves[0], maps.slot_to_row, leaves[1])
    truths = torch.autograd.grad(truth, leaves, grad_y.double())
    clean_rows = rows.detach().double().nan_to_num(nan=0.0)
    clean_weights = torch.where(weights.detach().isinf(), 0.0, weights.detach().double())
    size = reference.unpermute(clean_rows.abs(), maps.slot_to_row, clean_weights)
    check(y, truth, SAFETY * (UNIT[acc] * math.sqrt(K) * size + rounding(size, dtype)), "y")
    check(grads[0], truths[0], SAFETY * rounding(truths[0], dtype), "grad_rows")
    padded = torch.cat([clean_rows.abs(), torch.zeros(1, H, dtype=torch.float64)])
    size = (padded[maps.slot_to_row.long()].reshape(T, K, H) * grad_y.double().abs()[:, None]).sum(-1)
    bound = SAFETY * (UNIT[acc] * math.sqrt(H) * size + UNIT[weights.dtype] * truths[1].abs())
    check(grads[1], truths[1], bound, "grad_weights")


@pytest.mark.parametrize("weight_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpermute(backend, dtype, align, weight_dtype):
    g = torch.Generator().manual_seed(2)
    for T, H, E, K in SHAPES:
        compare(backend, T, H, E, K, dtype, align, weight_dtype, g)


@pytest.mark.parametrize("make", [lambda x: x[:, ::2], lambda x: x.T, lambda x: x[::2]])
def test_strides(backend, make):
    rows = make(torch.randn(8, 8))
    slots = torch.arange(rows.shape[0], dtype=torch.int32).flip(0)
    weights = torch.rand(rows.shape[0], 2)[:, ::2]
    a, b = (backend.unpermute(r, slots, w) for r, w in ((rows, weights), (rows.contiguous(), weights.contiguous())))
    assert torch.equal(a, b)
    leaf = torch.randn(4, 4, requires_grad=True)
    y = backend.unpermute(leaf, torch.arange(4, dtype=torch.int32), torch.ones(4, 1))
    (grad,) = torch.autograd.grad(y, leaf, torch.arange(16.0).reshape(4, 4).T)
    assert torch.equal(grad, torch.arange(16.0).reshape(4, 4).T)


def test_all_slots_absent(backend):
    rows, weights = torch.full((4, 3), math.nan, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    y = backend.unpermute(rows, torch.full((4,), -1, dtype=torch.int32), weights)
    assert y.eq(0).all()
    assert all(g.eq(0).all() for g in torch.autograd.grad(y.sum(), (rows, weights)))


def test_combine_is_not_rounded_on_the_way(backend):
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    y = backend.unpermute(rows, torch.arange(3, dtype=torch.int32), torch.ones(1, 3))
    assert y.item() == 258
