# SPDX-License-Identifier: Apache-2.0
"""Grouped products by TMA and wgmma, run on the emulator as an sm_90 device: tiles, forms, epilogues, against float64."""

from __future__ import annotations

import math

import pytest
import simt_direct
import simt_ops
import torch
from test_cuda_gemm import FORMS, ROWS, Mlp, bound, expert_of, numbers, plain, weight

from moe_kernels.testing import check

pytestmark = pytest.mark.skipif(bool(simt_ops.missing()), reason=simt_ops.missing())

TILES = {name.removeprefix("wgmma "): index for name, index in ROWS.items() if name.startswith("wgmma")}
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _sm_90(monkeypatch):
    monkeypatch.setenv(simt_ops.ARCH, "90")
    simt_ops.restart()


def truth_of(a, b, ends, bias=None):
    """(a[r] @ b[e].T + bias[e] in float64, its size) of the rows that an expert owns."""
    used = int(ends.clamp(min=0).max())
    e = expert_of(ends, used)
    add = 0 if bias is None else bias.double()[e]
    exact = [torch.einsum("rk,rnk->rn", f(a[:used].double()), f(b.double())[e]) for f in (torch.clone, torch.abs)]
    return exact[0] + add, exact[1] + abs(add)


# ---- the product: tails in every direction, empty experts, both layouts


@pytest.mark.parametrize("along_columns", [False, True])
@pytest.mark.parametrize("tile", TILES)
def test_product(tile, along_columns):
    dtype = HALVES[along_columns]
    ends = torch.tensor([0, 1, 1, 18, 37, 37], dtype=torch.int32)
    N, K = 136, 72
    a, b, bias = numbers(40, K, dtype=dtype), weight(6, N, K, dtype, along_columns), numbers(6, N, dtype=dtype)
    out = plain(a, b, ends, TILES[tile], bias=bias)
    assert out[37:].isnan().all()  # rows of no expert are not touched
    truth, size = truth_of(a, b, ends, bias)
    check(out[:37], truth, bound(size, truth, K, dtype), tile)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("counts", "N", "K"), [([150, 0, 70], 264, 72), ([300], 8, 520)])
def test_several_tiles_and_rounds(tile, counts, N, K):
    """More tiles than blocks, more slices than stages: every barrier goes round, every consumer has several tiles."""
    ends = torch.tensor(counts).cumsum(0).int()
    a, b = numbers(int(ends[-1]), K, dtype=torch.bfloat16), weight(len(counts), N, K, torch.bfloat16)
    truth, size = truth_of(a, b, ends)
    check(plain(a, b, ends, TILES[tile]), truth, bound(size, truth, K, torch.bfloat16), tile)
