# SPDX-License-Identifier: Apache-2.0
"""Llama 4: the block runs the chosen experts, not all of them on every token; router and shared expert are called."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .adapter import Adapter
from .mlp import expert_mlp


def columns(module: Any) -> list[list[Tensor]]:
    if type(module.experts).__name__ != "Llama4TextExperts":
        raise TypeError(f"its experts are held as {type(module.experts).__name__}: load the model dequantised")
    parameters = module.experts._parameters
    return [[parameters["gate_up_proj"]], [parameters["down_proj"]]]


def forward(module: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., H] -> y [T, H] and the router's logits; the score multiplies the input of an expert."""
    x = hidden_states.reshape(-1, module.hidden_dim)
    scores, logits = module.router(x)
    ids = logits.topk(module.top_k, dim=1).indices
    experts = module.experts
    routed = expert_mlp(
        x, experts.gate_up_proj, experts.down_proj, scores.gather(1, ids), ids, experts.act_fn,
        transposed=True, weight_on_input=True,
    )  # fmt: skip
    return module.shared_expert(x) + routed, logits


ADAPTERS = (
    Adapter(
        kind="Llama4TextMoe",
        home="transformers.models.llama4.modeling_llama4",
        forward=forward,
        columns=columns,
        act_fn=lambda module: module.experts.act_fn,
        inside=("experts",),
    ),
)
