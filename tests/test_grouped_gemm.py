# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm: all four cases, any size and stride, forward and gradients within c * u * sqrt(k) * |a| |b|."""

import math

import pytest
import torch

from moe_kernels import reference
from moe_kernels.schemas import acc_dtype
from moe_kernels.testing import SAFETY, UNIT, check, rounding

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CASES = ["rows", "columns", "inner", "batch"]
SHAPES = [(13, 24, 16, 4), (1, 1, 1, 1), (37, 12, 37, 3), (33, 96, 48, 2), (0, 5, 7, 2), (7, 9, 33, 40)]  # M, k, N, E


def operands(case, M, k, N, E, dtype, tail=2):
    """a, b, offs: the grouped dimension is cut at random, with empty groups and a tail that belongs to none."""
    g = torch.Generator().manual_seed(M + E)
    grouped = {"rows": M, "columns": N, "inner": k, "batch": 0}[case]
    end = max(grouped - tail, 0)
    offs = torch.randint(0, end + 1, (E,), generator=g).sort().values.int()
    a = torch.randn((E, M, k) if case in ("columns", "batch") else (M, k), generator=g, dtype=torch.float64)
    b = torch.randn((E, k, N) if case in ("rows", "batch") else (k, N), generator=g, dtype=torch.float64)
    return a.to(dtype), b.to(dtype), None if case == "batch" else offs


def compare(backend, case, M, k, N, E, dtype, with_bias):
    acc = acc_dtype(dtype)
    a, b, offs = operands(case, M, k, N, E, dtype)
    bias = torch.randn(E, N, dtype=torch.float64).to(dtype) if with_bias else None
    leaves = [t.detach().requires_grad_() for t in (a, b, bias) if t is not None]
    out = backend.grouped_gemm(leaves[0], leaves[1], offs, bias=leaves[2] if with_bias else None)
    assert out.dtype == dtype
    grad_out = torch.randn(out.shape, dtype=torch.float64).to(dtype)
    grads = torch.autograd.grad(out, leaves, grad_out)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    truth = reference.grouped_gemm(exact[0], exact[1], offs, bias=exact[2] if with_bias else None)
    truths = torch.autograd.grad(truth, exact, grad_out.double(), materialize_grads=True)
    size = [t.detach().abs().requires_grad_() for t in exact]  # the gradients of |a| |b| are |g| |b|^T and |a|^T |g|
    sizes = reference.grouped_gemm(size[0], size[1], offs, bias=size[2] if with_bias else None)
    grad_sizes = torch.autograd.grad(sizes, size, grad_out.double().abs(), materialize_grads=True)

    def bound(terms, magnitude, value):
        return SAFETY * (UNIT[acc] * math.sqrt(max(terms, 1)) * magnitude.detach() + rounding(value, dtype))

    check(out, truth, bound(k, sizes, truth), "out")
    for name, grad, true, big, terms in zip(("a", "b", "bias"), grads, truths, grad_sizes, (N, M, M)):
        assert grad.dtype == dtype
        check(grad, true, bound(terms, big, true), f"grad_{name}")


@pytest.mark.parametrize(
    ("case", "with_bias"), [(c, b) for c in CASES for b in (False, True) if (c, b) != ("columns", True)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_gemm(backend, dtype, case, with_bias):
    for M, k, N, E in SHAPES[:-1] if backend.name == "simt" else SHAPES:  # 40 groups are many blocks to emulate
        compare(backend, case, M, k, N, E, dtype, with_bias)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_out_dtype(backend, dtype, case):
    a, b, offs = operands(case, 9, 20, 11, 3, dtype)
    truth = reference.grouped_gemm(a.double(), b.double(), offs)
    size = reference.grouped_gemm(a.double().abs(), b.double().abs(), offs)
    out = backend.grouped_gemm(a, b, offs, out_dtype=torch.float32)
    assert out.dtype == torch.float32
    check(out, truth, SAFETY * UNIT[torch.float32] * (math.sqrt(20) + 1) * size)
    leaf = a.requires_grad_()
    (grad,) = torch.autograd.grad(backend.grouped_gemm(leaf, b, offs, out_dtype=torch.float32).sum(), leaf)
    assert grad.dtype == dtype


@pytest.mark.parametrize("case", CASES)
def test_strides(backend, case):
    a, b, offs = operands(case, 9, 20, 11, 3, torch.float32)
    plain = backend.grouped_gemm(a, b, offs)
    spread = torch.zeros(*a.shape[:-1], 2 * a.shape[-1])
    spread[..., ::2] = a
    size = reference.grouped_gemm(a.double().abs(), b.double().abs(), offs)
    for a2, b2 in ((a.mT.contiguous().mT, b), (a, b.mT.contiguous().mT), (spread[..., ::2], b.mT.contiguous().mT)):
        out = backend.grouped_gemm(a2, b2, offs)
        check(out, plain.double(), 2 * SAFETY * UNIT[torch.float32] * math.sqrt(20) * size)


def test_what_no_group_owns_is_zero(backend):
    a, b, offs = operands("rows", 9, 5, 4, 3, torch.float32)
    bias = torch.ones(3, 4)
    assert backend.grouped_gemm(a, b, offs, bias=bias)[int(offs[-1]) :].eq(0).all()
    a, b, offs = operands("columns", 9, 5, 8, 3, torch.float32)
    assert backend.grouped_gemm(a, b, offs)[:, int(offs[-1]) :].eq(0).all()
    a[:] = math.nan  # an empty group reads nothing
    empty = torch.tensor([2, 2, 5], dtype=torch.int32)
    a2, b2, _ = operands("inner", 3, 5, 4, 3, torch.float32)
    assert backend.grouped_gemm(a2, b2, empty)[1].eq(0).all()


def test_agrees_with_torch(backend):
    """The layout of torch.nn.functional.grouped_mm, where that one accepts the sizes."""
    grouped_mm = torch.nn.functional.grouped_mm
    for case in CASES:
        a, b, offs = operands(case, 16, 32, 24, 4, torch.float32, tail=0)
        if offs is not None:
            offs = torch.tensor([0, 4, 12, {"rows": 16, "columns": 24, "inner": 32}[case]], dtype=torch.int32)
        b = b.mT.contiguous().mT
        size = reference.grouped_gemm(a.double().abs(), b.double().abs(), offs)
        bound = 2 * SAFETY * UNIT[torch.float32] * math.sqrt(32) * size
        check(backend.grouped_gemm(a, b, offs), grouped_mm(a, b, offs=offs).double(), bound, case)
