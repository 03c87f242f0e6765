# SPDX-License-Identifier: Apache-2.0
"""permute against sort and index_select."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import roofline
import torch
from shapes import SHAPES, routed

import moe_kernels as mk


@pytest.mark.parametrize("tokens", [16, 512, 4096])
@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "mixtral-8x7b"])
def test_permute(name: str, tokens: int, against: Callable[..., float]) -> None:
    shape = SHAPES[name]

    def theirs(x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        order = ids.view(-1).sort(stable=True).indices
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel())
        counts = torch.bincount(ids.view(-1), minlength=shape.E).cumsum(0)
        return x.index_select(0, order // shape.K), order, inverse, counts

    def prepare(round_: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(tokens, shape.H, generator=torch.Generator().manual_seed(round_)).bfloat16()
        return x, routed(shape, tokens, round_)[0]

    moved = 2 * (tokens + tokens * shape.K) * shape.H
    against(
        lambda x, ids: mk.permute(x, ids, shape.E),
        theirs,
        "sort + index_select",
        prepare=prepare,
        bound_ms=moved / roofline.read_gb_per_s() / 1e6,
    )
