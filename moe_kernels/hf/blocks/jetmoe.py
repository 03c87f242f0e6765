# SPDX-License-Identifier: Apache-2.0
"""JetMoE: the MoE MLP as one op; the two projections of its mixture of attention heads as grouped GEMMs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import ops
from .adapter import Adapter
from .mlp import expert_mlp

HOME = "transformers.models.jetmoe.modeling_jetmoe"


def mlp_forward(module: Any, layer_input: Tensor) -> Tensor:
    """x [B, S, H] -> [B, S, H]."""
    x = layer_input.reshape(-1, layer_input.shape[-1])
    order, _, gates, sizes, _ = module.router(x)  # slots by expert, their weights, slots of each expert
    K = module.router.top_k
    expert = torch.arange(len(sizes), device=x.device).repeat_interleave(torch.tensor(sizes, device=x.device))
    ids = torch.empty_like(expert).scatter(0, order, expert).view(-1, K)
    weights = torch.empty_like(gates).scatter(0, order, gates).view(-1, K)
    w13, w2 = module.input_linear.weight, module.output_linear.weight
    y = expert_mlp(x, w13, w2, weights, ids, module.activation).view(layer_input.shape)
    return y + module.bias  # type: ignore[no-any-return]


def linear_forward(module: Any, inputs: Tensor, expert_size: list[int]) -> Tensor:
    """Rows in the order of the experts [P, in] -> [P, out]."""
    ends = torch.tensor(expert_size).cumsum(0).to(inputs.device, torch.int32)
    return ops.grouped_gemm(inputs.to(module.weight.dtype), module.weight.mT, ends)


ADAPTERS = (
    Adapter(
        kind="JetMoeMoE",
        home=HOME,
        forward=mlp_forward,
        columns=lambda m: [[m.input_linear._parameters["weight"]], [m.output_linear._parameters["weight"]]],
        act_fn=lambda m: m.activation,
        inside=("input_linear", "output_linear"),
    ),
    Adapter(
        kind="JetMoeParallelExperts",
        home=HOME,
        forward=linear_forward,
        columns=lambda m: [[m._parameters["weight"]]],
        path="grouped_gemm",
    ),
)
