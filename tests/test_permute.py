# SPDX-License-Identifier: Apache-2.0
"""permute: a stable counting sort of the slots, index maps exactly, rows bit by bit."""

import pytest
import torch

from moe_kernels.testing import make_ids

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 4, 3, 2), (1, 1, 1, 1), (19, 8, 6, 2), (7, 37, 128, 8), (5, 12, 3, 3), (64, 16, 2048, 1), (33, 1, 8, 4)]


def expected(ids, E, align):
    """The maps by definition, slot by slot."""
    flat = ids.flatten().tolist()
    rows = [[s for s, e in enumerate(flat) if e == expert] for expert in range(E)]
    offsets, row_to_slot, slot_to_row = [0], [], [-1] * len(flat)
    for of_expert in rows:
        for slot in of_expert:
            slot_to_row[slot] = len(row_to_slot)
            row_to_slot.append(slot)
        row_to_slot += [-1] * (-len(row_to_slot) % align)
        offsets.append(len(row_to_slot))
    P = len(flat) + E * (align - 1)
    return row_to_slot + [-1] * (P - len(row_to_slot)), slot_to_row, offsets


def compare(backend, T, H, E, K, dtype, align, skew, g):
    ids = make_ids(T, E, K, skew, g).to(torch.int64 if align == 4 else torch.int32)
    x = torch.randn(T, H).to(dtype).requires_grad_()
    got = backend.permute(x, ids, E, align=align)
    row_to_slot, slot_to_row, offsets = expected(ids, E, align)
    assert got.row_to_slot.tolist() == row_to_slot
    assert got.slot_to_row.tolist() == slot_to_row
    assert got.expert_offsets.tolist() == offsets
    assert all(t.dtype == torch.int32 for t in got[1:])
    rows = [torch.zeros(H, dtype=dtype) if s < 0 else x.detach()[s // K] for s in row_to_slot]
    assert torch.equal(got.x_rows, torch.stack(rows) if rows else torch.zeros(0, H, dtype=dtype))
    grad_rows = torch.randint(-4, 5, got.x_rows.shape).to(dtype)  # small integers: sums are exact in any dtype
    (grad,) = torch.autograd.grad(got.x_rows, x, grad_rows)
    wanted = torch.zeros(T, H, dtype=dtype)
    for row, slot in enumerate(row_to_slot):
        if slot >= 0:
            wanted[slot // K] += grad_rows[row]
    assert torch.equal(grad, wanted)


@pytest.mark.parametrize("skew", ["uniform", "zipf", "one", "empty"])
@pytest.mark.parametrize("align", [1, 4, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_permute(backend, dtype, align, skew):
    g = torch.Generator().manual_seed(1)
    for T, H, E, K in SHAPES:
        if backend.name == "simt" and E * align > 4096:
            continue  # 30000 rows of padding are seconds there; a single expert's padding is the same code
        compare(backend, T, H, E, K, dtype, align, skew, g)


def test_absent_ids_get_no_row(backend):
    x = torch.randn(3, 5, requires_grad=True)
    ids = torch.tensor([[0, -1], [7, 2], [2**40, -(2**40)]])
    got = backend.permute(x, ids, 3)
    assert got.row_to_slot.tolist() == [0, 3, -1, -1, -1, -1]
    assert got.slot_to_row.tolist() == [0, -1, -1, 1, -1, -1]
    assert got.expert_offsets.tolist() == [0, 1, 1, 2]
    assert got.x_rows[2:].eq(0).all()
    (grad,) = torch.autograd.grad(got.x_rows.sum(), x)
    assert grad.tolist() == [[1] * 5, [1] * 5, [0] * 5]


def test_ids_are_narrowed_after_the_range_check(backend):
    ids = torch.tensor([[2**32], [2**32 + 1], [1]])  # the first two would become 0 and 1 in 32 bits
    assert backend.permute(torch.ones(3, 2), ids, 2).slot_to_row.tolist() == [-1, -1, 0]


@pytest.mark.parametrize("make", [lambda x: x[:, ::2], lambda x: x.T, lambda x: x[::2], lambda x: x[:1].expand(6, -1)])
def test_strides(backend, make):
    x = make(torch.randn(6, 6))
    ids = torch.randint(0, 4, (x.shape[0], 4)).T.contiguous().T[:, ::2]
    a, b = backend.permute(x, ids, 4), backend.permute(x.contiguous(), ids.contiguous(), 4)
    assert all(torch.equal(s, t) for s, t in zip(a, b))
    leaf = torch.randn(6, 6, requires_grad=True)
    rows = backend.permute(leaf, torch.zeros(6, 1, dtype=torch.int32), 1).x_rows
    (grad,) = torch.autograd.grad(rows, leaf, torch.arange(36.0).reshape(6, 6).T)
    assert torch.equal(grad, torch.arange(36.0).reshape(6, 6).T)


def test_sums_of_the_backward_are_not_rounded_on_the_way(backend):
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    rows = backend.permute(x, torch.zeros(1, 3, dtype=torch.int32), 1).x_rows
    (grad,) = torch.autograd.grad(rows, x, torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16))
    assert grad.item() == 258  # 256 + 1 is 256 in bfloat16
