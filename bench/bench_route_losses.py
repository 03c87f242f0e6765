# SPDX-License-Identifier: Apache-2.0
"""Routing with its balance losses (Switch and z), forward and backward, against torch's operations for the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import roofline
import torch

import moe_kernels as mk
from moe_kernels import losses

TERMS = (losses.Switch(0.01), losses.ZLoss(0.001))


def ours(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """d logits, by one pass over the logits forward and one backward."""
    routing, sums = mk.route_with_sums(logits, top_k)
    inputs = losses.LossInputs(logits, routing, score_sums=sums)
    whole = routing.topk_weights.square().sum() + TERMS[0](inputs) + TERMS[1](inputs)
    return torch.autograd.grad(whole, logits)[0]


def in_torch(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """The same by softmax, topk, bincount and means, and autograd."""
    E = logits.shape[1]
    p = logits.softmax(-1)
    weights, ids = p.topk(top_k)
    weights = weights / weights.sum(-1, keepdim=True)
    f = torch.bincount(ids.flatten(), minlength=E) / ids.numel()
    loss = 0.01 * E * (f * p.mean(0)).sum() + 0.001 * logits.logsumexp(-1).square().mean()
    return torch.autograd.grad(weights.square().sum() + loss, logits)[0]


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(4096, 256, 8), (4096, 64, 8), (4096, 8, 2)])
def test_route_with_losses(tokens: int, experts: int, top_k: int, against: Callable[..., float]) -> None:
    def prepare(round_: int) -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(round_)
        return torch.randn(tokens, experts, generator=generator).requires_grad_(), top_k

    torch.testing.assert_close(ours(*prepare(0)), in_torch(*prepare(0)), rtol=1e-4, atol=1e-6)
    moved = tokens * experts * 4 * 3  # the logits are read twice, their gradient is written once
    bound = moved / roofline.read_gb_per_s() / 1e6
    against(ours, in_torch, "softmax + topk + bincount", prepare=prepare, bound_ms=bound)
