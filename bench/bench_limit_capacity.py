# SPDX-License-Identifier: Apache-2.0
"""limit_capacity against a one-hot and a running sum, the usual way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import roofline
import torch
from shapes import SHAPES, routed

import moe_kernels as mk


@pytest.mark.parametrize("tokens", [512, 4096])
@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "mixtral-8x7b"])
def test_limit_capacity(name: str, tokens: int, against: Callable[..., float]) -> None:
    shape = SHAPES[name]
    capacity = mk.Capacity(1.25).slots(tokens, shape.K, shape.E)

    def theirs(ids: torch.Tensor) -> torch.Tensor:
        chosen = torch.nn.functional.one_hot(ids.T.flatten().long(), shape.E)
        position = (chosen.cumsum(0) - 1).gather(1, ids.T.reshape(-1, 1).long())
        return (position >= capacity).view(shape.K, tokens).T

    def prepare(round_: int) -> tuple[torch.Tensor]:
        return (routed(shape, tokens, round_)[0],)

    moved = tokens * shape.K * 5  # an int32 in, a byte out
    against(
        lambda ids: mk.limit_capacity(ids, shape.E, capacity),
        theirs,
        "one_hot + cumsum",
        prepare=prepare,
        bound_ms=moved / roofline.read_gb_per_s() / 1e6,
    )
