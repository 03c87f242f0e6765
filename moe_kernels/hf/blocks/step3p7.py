# SPDX-License-Identifier: Apache-2.0
"""Step 3.7: the experts, in the layout of the experts interface without being behind it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..experts import experts_forward
from .adapter import Adapter
from .mlp import expert_mlp


def forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """x [T, H], ids and weights [T, K] -> [T, H]; a layer with a clamp behind the activation takes the unfused path."""
    ids = torch.where(top_k_index < module.num_experts, top_k_index, -1)
    if module.limit < math.inf:
        return experts_forward(module, hidden_states, ids, top_k_weights)
    return expert_mlp(hidden_states, module.gate_up_proj, module.down_proj, top_k_weights, ids, module.act_fn)


ADAPTERS = (
    Adapter(
        kind="Step3p7Experts",
        home="transformers.models.step3p7.modeling_step3p7",
        forward=forward,
        columns=lambda m: [[m._parameters["gate_up_proj"]], [m._parameters["down_proj"]]],
        act_fn=lambda m: m.act_fn if m.limit == math.inf else m._apply_gate,
    ),
)
