# SPDX-License-Identifier: Apache-2.0
"""DBRX: the experts; router, jitter and normalisation stay theirs.

Gate and up are two parameters of shape [E*I, H], which no copy-free view makes one, so the two products are taken
apart: permute, two grouped GEMMs, activation, a third one, unpermute.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import ops
from .adapter import Adapter


def columns(module: Any) -> list[list[Tensor]]:
    parameters = module.mlp._parameters
    return [[parameters["w1"]], [parameters["v1"]], [parameters["w2"]]]


def forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """x [B, S, H], ids and weights [B*S, K] -> [B, S, H]."""
    mlp, (E, I, H) = module.mlp, (module.num_experts, module.ffn_hidden_size, module.hidden_size)
    x = hidden_states.reshape(-1, H)
    rows = ops.permute(x.to(mlp.w1.dtype), top_k_index, E)
    ends = rows.expert_offsets[1:]
    gate = ops.grouped_gemm(rows.x_rows, mlp.w1.view(E, I, H).mT, ends)
    up = ops.grouped_gemm(rows.x_rows, mlp.v1.view(E, I, H).mT, ends)
    y_rows = ops.grouped_gemm((mlp.activation_fn(gate) * up).to(mlp.w2.dtype), mlp.w2.view(E, I, H), ends)
    y = ops.unpermute(y_rows, rows.slot_to_row, top_k_weights)
    return y.to(x.dtype).view(hidden_states.shape[0], -1, H)


ADAPTERS = (
    Adapter(
        kind="DbrxExperts",
        home="transformers.models.dbrx.modeling_dbrx",
        forward=forward,
        columns=columns,
        path="grouped_gemm (gate and up are separate parameters)",
    ),
)
