# SPDX-License-Identifier: Apache-2.0
"""unpermute against index_select, weight and sum."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import roofline
import torch
from shapes import SHAPES, routed

import moe_kernels as mk


@pytest.mark.parametrize("tokens", [16, 512, 4096])
@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "mixtral-8x7b"])
def test_unpermute(name: str, tokens: int, against: Callable[..., float]) -> None:
    shape = SHAPES[name]

    def prepare(round_: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = torch.randn(tokens, shape.H, generator=torch.Generator().manual_seed(round_)).bfloat16()
        ids, weights = routed(shape, tokens, round_)
        moved = mk.permute(x, ids, shape.E)
        return moved.x_rows, moved.slot_to_row, weights

    def theirs(rows: torch.Tensor, slot_to_row: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        slots = rows.index_select(0, slot_to_row).view(tokens, shape.K, shape.H)
        return (slots * weights[..., None]).sum(1).to(rows.dtype)

    moved = 2 * (tokens + tokens * shape.K) * shape.H
    bound = moved / roofline.read_gb_per_s() / 1e6
    against(mk.unpermute, theirs, "index_select, mul, sum", prepare=prepare, bound_ms=bound)
