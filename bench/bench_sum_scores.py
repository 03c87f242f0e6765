# SPDX-License-Identifier: Apache-2.0
"""sum_scores, forward and backward, against torch's softmax and mean. With a choice: bench_route_losses.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import roofline
import torch

OP = torch.ops.moe_kernels.sum_scores.default


@pytest.mark.parametrize(("tokens", "experts"), [(4096, 256), (4096, 64)])
def test_sum_scores(tokens: int, experts: int, against: Callable[..., float]) -> None:
    def ours(logits: torch.Tensor, pull: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(OP(logits, 0, True, 0.0, 1, None), logits, pull)[0]

    def theirs(logits: torch.Tensor, pull: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(logits.softmax(-1).sum(0, keepdim=True), logits, pull)[0]

    def prepare(round_: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(round_)
        logits = torch.randn(tokens, experts, generator=generator).requires_grad_()
        return logits, torch.randn(1, experts, generator=generator)

    moved = tokens * experts * 4 * 3  # the logits are read twice, their gradient is written once
    bound = moved / roofline.read_gb_per_s() / 1e6
    against(ours, theirs, "softmax + sum", prepare=prepare, bound_ms=bound)
