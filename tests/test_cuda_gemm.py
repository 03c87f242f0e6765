# SPDX-License-Identifier: Apache-2.0
"""Grouped products on the tensor cores, run on the emulator: every tile, dtype and layout, against float64."""

from __future__ import annotations

import ctypes
import math
from ctypes import Structure, c_bool, c_double, c_int32, c_int64, c_void_p

import pytest
import simt_direct
import simt_ops
import torch
from simt_direct import CODES, Weight, pointer

from moe_kernels.testing import SAFETY, UNIT, check, rounding

pytestmark = pytest.mark.skipif(bool(simt_ops.missing()), reason=simt_ops.missing())


class RowsEpilogue(Structure):
    _fields_ = [("kind", c_int32), ("row_to_slot", c_void_p), ("topk_weights", c_void_p), ("bias", c_void_p),
                ("out", c_void_p), ("out_stride", c_int64), ("out_dtype", c_int32), ("activation", c_int32),
                ("gated", c_bool), ("interleaved", c_bool), ("weight_on_input", c_bool), ("limit", c_double),
                ("alpha", c_double), ("hidden_mask", c_void_p), ("hidden", c_void_p), ("act", c_void_p),
                ("grad_hidden", c_void_p), ("grad_biased", c_void_p), ("weighted_act", c_void_p),
                ("weight_parts", c_void_p)]  # fmt: skip


class GroupedRows(Structure):
    _fields_ = [("E", c_int64), ("S", c_int64), ("N", c_int64), ("K", c_int64), ("dtype", c_int32),
                ("allow_tf32", c_bool), ("a", c_void_p), ("a_stride", c_int64), ("a_expert", c_int64),
                ("gather", c_void_p), ("per_token", c_int64), ("b", Weight), ("ends", c_void_p),
                ("epilogue", RowsEpilogue)]  # fmt: skip


class RowsBy(Structure):
    _fields_ = [("rows", GroupedRows), ("by", c_int32)]


TILES = {"128x256": 0, "128x128": 1, "64x128": 2, "16x128": 3}
FMA = 4


@pytest.fixture(autouse=True)
def _first_seed():
    simt_ops.restart()


def rows_of(a, b, ends, *, gather=None, per_token=1, S=None, tf32=False):
    """The struct of a @ b[e].T, without epilogue. b [E, N, K] of any strides."""
    g = GroupedRows()
    g.E, g.N, g.K = b.shape
    g.S = S if S is not None else len(gather) if gather is not None else len(a)
    g.dtype, g.allow_tf32 = CODES[a.dtype], tf32
    g.a, g.a_stride, g.gather, g.per_token = a.data_ptr(), a.stride(0), pointer(gather), per_token
    g.b = Weight(b.data_ptr(), b.stride(0), b.stride(1), b.stride(2), 32 * b.stride(1), False)
    g.ends = pointer(ends)
    return g


def call(g, by, reads, writes):
    args = RowsBy(g, by)
    simt_direct.call("grouped_rows", args, reads={k: t for k, t in reads.items() if t is not None}, writes=writes)


def plain(a, b, ends, by, *, out_dtype=None, bias=None, weights=None, **kwargs):
    g = rows_of(a, b, ends, **kwargs)
    out = torch.full((g.S, g.N), math.nan, dtype=out_dtype or a.dtype)
    e = g.epilogue
    e.kind, e.out, e.out_stride, e.out_dtype = 0, out.data_ptr(), g.N, CODES[out.dtype]
    e.bias, e.topk_weights, e.row_to_slot = pointer(bias), pointer(weights), pointer(kwargs.get("gather"))
    reads = {"a": a, "b": b, "ends": ends, "gather": kwargs.get("gather"), "bias": bias, "weights": weights}
    call(g, by, reads, {"out": out})
    return out


def weight(E, N, K, dtype, along_columns):
    b = torch.randn(E, N, K, dtype=torch.float64).to(dtype)
    return b.mT.contiguous().mT if along_columns else b


@pytest.mark.parametrize("along_columns", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tile", TILES)
def test_product(tile, dtype, along_columns):
    if dtype == torch.float32 and TILES[tile] < 2:
        pytest.skip("no tf32 kernel of this size")
    ends = torch.tensor([0, 1, 1, 18, 37, 37], dtype=torch.int32)
    N, K = 136, 72
    a, b = torch.randn(40, K, dtype=torch.float64).to(dtype), weight(6, N, K, dtype, along_columns)
    bias = torch.randn(6, N, dtype=torch.float64).to(dtype)
    out = plain(a, b, ends, TILES[tile], bias=bias, tf32=True)
    assert out[37:].isnan().all()
    begin = 0
    for e, end in enumerate(ends.tolist()):
        truth = a[begin:end].double() @ b[e].double().T + bias[e].double()
        size = a[begin:end].double().abs() @ b[e].double().abs().T + bias[e].double().abs()
        unit = 2**-11 if dtype == torch.float32 else UNIT[torch.float32] * math.sqrt(K)
        check(out[begin:end], truth, SAFETY * (unit * size + rounding(truth, dtype)), f"{e}")
        begin = end
