# SPDX-License-Identifier: Apache-2.0
"""ViTPose++: one expert an image, chosen by the caller's dataset index; every image ran through all of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import ops
from .adapter import Adapter
from .weights import linears, stack, values


def columns(module: Any) -> list[list[Tensor]]:
    layers = linears(module)
    return [values(layers), values(layers, "bias")]


def forward(module: Any, hidden_state: Tensor, indices: Tensor) -> Tensor:
    """x [B, S, H], one index an image [B, 1, 1] -> [B, S, part_features]; an index that is no expert gives 0."""
    B, S, H = hidden_state.shape
    ids = indices.reshape(-1, 1).expand(B, S).reshape(-1, 1)
    weight, bias = (stack(column) for column in columns(module))
    rows = ops.permute(hidden_state.reshape(-1, H).to(weight.dtype), ids, len(weight))
    y_rows = ops.grouped_gemm(rows.x_rows, weight.mT, rows.expert_offsets[1:], bias=bias)
    y = ops.unpermute(y_rows, rows.slot_to_row, hidden_state.new_ones(B * S, 1))
    return y.view(B, S, -1).to(hidden_state.dtype)


ADAPTERS = (
    Adapter(
        kind="VitPoseNaiveMoe",
        home="transformers.models.vitpose_backbone.modeling_vitpose_backbone",
        forward=forward,
        columns=columns,
        per_expert=True,
        path="grouped_gemm",
    ),
)
