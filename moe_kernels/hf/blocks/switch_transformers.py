# SPDX-License-Identifier: Apache-2.0
"""Switch Transformers: the experts; router, capacity per sequence, router logits and losses stay theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter
from .mlp import expert_mlp
from .weights import linears, stacks, values


def columns(module: Any) -> list[list[Tensor]]:
    experts = list(module._modules.values())
    return [values(linears(experts, "wi")), values(linears(experts, "wo"))]


def forward(module: Any, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
    """x [T, H], one-hot [T, 1, E] with no 1 for a dropped token, weights [T, 1] -> [T, H], 0 for a dropped token."""
    kept, ids = selected_experts.max(dim=-1)
    (wi, wo), ids = stacks(columns(module), torch.where(kept > 0, ids, -1))
    first = next(iter(module._modules.values()))
    dropout = first.dropout.p if first.dropout.training else 0.0
    return expert_mlp(hidden_states, wi, wo, routing_weights, ids, first.act, gated=False, dropout=dropout)


ADAPTERS = (
    Adapter(
        kind="SwitchTransformersExperts",
        home="transformers.models.switch_transformers.modeling_switch_transformers",
        forward=forward,
        columns=columns,
        per_expert=True,
        act_fn=lambda module: next(iter(module._modules.values())).act,
    ),
)
