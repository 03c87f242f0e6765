# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm against torch.nn.functional.grouped_mm: the first GEMM of a layer, rows sorted by expert."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import roofline
import torch
from shapes import QWEN3, SHAPES, routed

import moe_kernels as mk
from moe_kernels.demo import full_size

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("tokens", [16, 512])
@pytest.mark.parametrize("name", [QWEN3.name, "olmoe-1b-7b"])
def test_grouped_gemm(name: str, tokens: int, dtype: str, against: Callable[..., float]) -> None:
    shape, kind = SHAPES[name], DTYPES[dtype]
    w13 = torch.empty(shape.E, 2 * shape.I, shape.H, dtype=kind)
    full_size.fill(w13, shape.H**-0.5)
    b = w13.transpose(1, 2)

    def prepare(round_: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids, _ = routed(shape, tokens, round_)
        ends = torch.bincount(ids.view(-1), minlength=shape.E).cumsum(0).int()
        rows = torch.randn(tokens * shape.K, shape.H, generator=torch.Generator().manual_seed(round_))
        return rows.to(kind), b, ends

    hit = len(routed(shape, tokens, 1)[0].unique())
    read = 1e3 * hit * 2 * shape.I * shape.H * kind.itemsize / (roofline.read_gb_per_s() * 1e9)
    flops = 1e3 * 2 * tokens * shape.K * 2 * shape.I * shape.H / (roofline.peak_gflops(kind) * 1e9)
    against(
        mk.grouped_gemm,
        lambda rows, weight, ends: torch.nn.functional.grouped_mm(rows, weight, offs=ends),
        "torch grouped_mm",
        prepare=prepare,
        rounds=9,
        bound_ms=max(read, flops),
    )
