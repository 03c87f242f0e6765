# SPDX-License-Identifier: Apache-2.0
"""Routing with its balance losses, forward and backward, against torch's operations for the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import roofline
import torch

import moe_kernels as mk
from moe_kernels import losses


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(4096, 256, 8), (4096, 64, 8)])
def test_route_with_losses(tokens: int, experts: int, top_k: int, against: Callable[..., float]) -> None:
    terms = (losses.Switch(), losses.ZLoss())

    def ours(logits: torch.Tensor) -> torch.Tensor:
        routing = mk.route(logits, top_k)
        inputs = losses.LossInputs(logits, routing)
        whole = routing.topk_weights.square().sum() + terms[0](inputs) + terms[1](inputs)
        return torch.autograd.grad(whole, logits)[0]

    def theirs(logits: torch.Tensor) -> torch.Tensor:
        p = logits.softmax(-1)
        weights, ids = p.topk(top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        f = torch.nn.functional.one_hot(ids, experts).float().mean((0, 1))
        loss = 0.01 * experts * (f * p.mean(0)).sum() + 0.001 * logits.logsumexp(-1).square().mean()
        return torch.autograd.grad(weights.square().sum() + loss, logits)[0]

    def prepare(round_: int) -> tuple[torch.Tensor]:
        generator = torch.Generator().manual_seed(round_)
        return (torch.randn(tokens, experts, generator=generator).requires_grad_(),)

    moved = tokens * experts * 4 * 5  # the logits are read four times, their gradient is written once
    against(ours, theirs, "softmax + topk + one_hot", prepare=prepare, bound_ms=moved / roofline.read_gb_per_s() / 1e6)
