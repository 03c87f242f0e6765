# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn from logits to weights, forward and backward, against torch's operations for the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moe_kernels.routers import assignment

SHAPES = [(4096, 64, 1), (4096, 256, 2), (16384, 16, 1)]  # tokens, experts, experts a token
STEPS = 10  # as many for both; about what a tolerance of 1e-4 takes


def in_torch(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """As Megatron-Core writes it: two products an iteration, its norm read back."""
    with torch.no_grad():
        cost = logits.exp()
        T, E = cost.shape
        d0, d1 = cost.new_ones(T), cost.new_ones(E)
        error, steps = 1e9, 0
        while error > 0 and steps < STEPS:
            d0 = 1 / T / ((cost * d1).sum(1) + 1e-8)
            before, d1 = d1, 1 / E / ((d0[:, None] * cost).sum(0) + 1e-8)
            error, steps = float((d1 - before).abs().mean()), steps + 1
        ids = (d1 * cost * d0[:, None]).topk(top_k, 1).indices
    scores = logits.sigmoid() if top_k == 1 else logits.softmax(-1)
    return scores.gather(1, ids)


def by_products(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """The same with matrix-vector products, the fastest that torch's operations give."""
    with torch.no_grad():
        cost = logits.exp()
        T, E = cost.shape
        d1 = cost.new_ones(E)
        for _ in range(STEPS):
            d0 = 1 / T / (cost @ d1 + 1e-8)
            before, d1 = d1, 1 / E / (d0 @ cost + 1e-8)
            float((d1 - before).abs().mean())
        ids = (d0[:, None] * cost * d1).topk(top_k, 1).indices
    scores = logits.sigmoid() if top_k == 1 else logits.softmax(-1)
    return scores.gather(1, ids)


@pytest.mark.parametrize(("tokens", "experts", "top_k"), SHAPES)
@pytest.mark.parametrize("peer", [in_torch, by_products], ids=["as published", "by products"])
def test_sinkhorn(
    tokens: int, experts: int, top_k: int, peer: Callable[..., torch.Tensor], against: Callable[..., float]
) -> None:
    def run(choose: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], object]:
        return lambda logits: torch.autograd.grad(choose(logits).square().sum(), logits)

    against(
        run(lambda logits: assignment.balance(logits, top_k, 1e-30, STEPS).topk_weights),
        run(lambda logits: peer(logits, top_k)),
        "torch calls" if peer is in_torch else "mv + topk",
        prepare=lambda round_: (
            torch.randn(tokens, experts, generator=torch.Generator().manual_seed(round_)).requires_grad_(),
        ),
    )
