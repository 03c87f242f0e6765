# SPDX-License-Identifier: Apache-2.0
"""route against the same arithmetic in torch calls: score, choose, renormalise, count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from shapes import SHAPES

import moe_kernels as mk


def softmax_in_torch(logits: torch.Tensor, K: int) -> tuple[torch.Tensor, ...]:
    scores = torch.softmax(logits.float(), -1)
    values, ids = scores.topk(K)
    return values / values.sum(-1, keepdim=True), ids, torch.bincount(ids.view(-1), minlength=logits.shape[1])


def groups_in_torch(logits: torch.Tensor, bias: torch.Tensor, K: int, G: int, M: int) -> tuple[torch.Tensor, ...]:
    scores = torch.sigmoid(logits.float())
    choice = scores + bias
    best = choice.view(len(choice), G, -1).topk(2).values.sum(-1)
    keep = torch.zeros_like(best).scatter_(1, best.topk(M).indices, 1.0)
    masked = choice.view(len(choice), G, -1).masked_fill(keep[..., None] == 0, float("-inf")).view_as(choice)
    ids = masked.topk(K).indices
    values = scores.gather(1, ids)
    values = values / (values.sum(-1, keepdim=True) + 1e-20) * 2.5
    return values, ids, torch.bincount(ids.view(-1), minlength=logits.shape[1])


@pytest.mark.parametrize("tokens", [1, 512, 8192])
@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b"])
def test_route_softmax(name: str, tokens: int, against: Callable[..., float]) -> None:
    shape = SHAPES[name]
    against(
        lambda logits: mk.route(logits, shape.K),
        lambda logits: softmax_in_torch(logits, shape.K),
        "torch calls",
        prepare=lambda r: (torch.randn(tokens, shape.E, generator=torch.Generator().manual_seed(r)),),
    )


@pytest.mark.parametrize("tokens", [1, 512, 8192])
def test_route_groups(tokens: int, against: Callable[..., float]) -> None:
    shape = SHAPES["deepseek-v3"]
    groups, kept = shape.groups or (1, 1)
    bias = torch.randn(shape.E, generator=torch.Generator().manual_seed(0)) * 0.1

    def ours(logits: torch.Tensor) -> object:
        return mk.route(
            logits,
            shape.K,
            scoring_func="sigmoid",
            e_score_correction_bias=bias,
            num_expert_group=groups,
            topk_group=kept,
            routed_scaling_factor=2.5,
        )

    against(
        ours,
        lambda logits: groups_in_torch(logits, bias, shape.K, groups, kept),
        "torch calls",
        prepare=lambda r: (torch.randn(tokens, shape.E, generator=torch.Generator().manual_seed(r)),),
    )
