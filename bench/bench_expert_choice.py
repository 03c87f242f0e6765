# SPDX-License-Identifier: Apache-2.0
"""Expert choice from logits to slots, forward and backward, against torch's operations for the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import roofline
import torch

from moe_kernels.routers import expert_choice

SHAPES = [(4096, 64, 2), (4096, 256, 8), (16384, 16, 2)]  # tokens, experts, mean experts a token


def in_torch(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax, the best tokens of every expert, then the slots of every token."""
    p = logits.softmax(-1)
    tokens = p.T.topk(count, -1).indices
    taken = torch.zeros_like(p, dtype=torch.bool).scatter_(0, tokens.T, True)
    slots = int(taken.sum(1).max())
    ids = torch.where(taken, p.detach(), -1.0).topk(slots, -1).indices
    present = taken.gather(1, ids)
    return torch.where(present, p.gather(1, ids), 0.0), torch.where(present, ids, -1).int()


@pytest.mark.parametrize(("tokens", "experts", "mean"), SHAPES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_expert_choice(tokens: int, experts: int, mean: int, backward: bool, against: Callable[..., float]) -> None:
    count = tokens * mean // experts

    def run(choose: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[[torch.Tensor], object]:
        def call(logits: torch.Tensor) -> object:
            weights = choose(logits)[0]
            return torch.autograd.grad(weights.square().sum(), logits) if backward else weights

        return call

    def prepare(round_: int) -> tuple[torch.Tensor]:
        return (torch.randn(tokens, experts, generator=torch.Generator().manual_seed(round_)).requires_grad_(backward),)

    moved = tokens * experts * 4 * (5 if backward else 3)  # logits in, scores out and in; logits in, gradient out
    against(
        run(lambda logits: expert_choice.choose(logits, count, tokens)),
        run(lambda logits: in_torch(logits, count)),
        "softmax + topk + topk",
        prepare=prepare,
        bound_ms=moved / roofline.read_gb_per_s() / 1e6,
    )
