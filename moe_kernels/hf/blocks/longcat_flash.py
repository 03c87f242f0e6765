# SPDX-License-Identifier: Apache-2.0
"""LongCat-Flash: the experts. An id of num_routed_experts or more is a zero expert, which returns its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter
from .mlp import expert_mlp


def columns(module: Any) -> list[list[Tensor]]:
    parameters = module._parameters
    return [[parameters["gate_up_proj"]], [parameters["down_proj"]]]


def forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """x [T, H], ids and weights [T, K] -> [T, H]."""
    E = module.num_routed_experts
    routed = top_k_index < E
    ids = torch.where(routed, top_k_index, -1)
    w13 = module.gate_up_proj[:E]  # rows for the identity experts are there, and unused
    y = expert_mlp(hidden_states, w13, module.down_proj, top_k_weights, ids, module.act_fn)
    share = top_k_weights.masked_fill(routed, 0.0).sum(dim=1, keepdim=True)
    return y + (hidden_states * share).to(y.dtype)


ADAPTERS = (
    Adapter(
        kind="LongcatFlashExperts",
        home="transformers.models.longcat_flash.modeling_longcat_flash",
        forward=forward,
        columns=columns,
        act_fn=lambda module: module.act_fn,
        refuse=lambda module: "" if module.num_routed_experts > 0 else "it has identity experts only",
    ),
)
