# SPDX-License-Identifier: Apache-2.0
"""NLLB-MoE: the experts, as transformers computes them; router, capacity and losses stay theirs.

transformers 5 hands its experts a one-hot mask [T, E] and encodes it once more, so that the values 0 and 1 of the mask
are taken for the numbers of two experts: expert 1 runs on what the first choice weighs, expert 0 on all the rest, and
no other expert ever runs. A replacement must not change a model's outputs, so this is what we compute too, and what
the report says. Where that line has changed, the class is refused.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapter import Adapter
from .mlp import expert_mlp
from .weights import linears, stack, values


def columns(module: Any) -> list[list[Tensor]]:
    """Of experts 0 and 1."""
    experts = [module._modules["expert_0"], module._modules["expert_1"]]
    fc1, fc2 = linears(experts, "fc1"), linears(experts, "fc2")
    return [values(fc1), values(fc2), values(fc1, "bias"), values(fc2, "bias")]


def forward(module: Any, hidden_states: Tensor, router_mask: Tensor, router_probs: Tensor) -> Tensor:
    """x [T, H], mask of the first choice [T, E], weights [T, E] -> [T, H]."""
    fc1, fc2, b1, b2 = (stack(column) for column in columns(module))
    first = router_mask.to(router_probs.dtype)
    weights = torch.stack([(router_probs * (1 - first)).sum(1), (router_probs * first).sum(1)], dim=1)
    ids = torch.arange(2, device=weights.device).expand(weights.shape[0], 2)
    expert, rate = module._modules["expert_0"], module.moe_token_dropout
    dropout = expert.dropout.p if expert.dropout.training else 0.0
    options: dict[str, Any] = {"gated": False, "w13_bias": b1, "w2_bias": b2, "dropout": dropout}
    if not module.training or rate == 0:
        scale = 1.0 if module.training else 1.0 - rate
        return expert_mlp(hidden_states, fc1, fc2, weights * scale, ids, expert.act, **options)
    # Dropout on the weighted output of each expert: one expert at a time, so that each has its own mask.
    parts = [
        expert_mlp(hidden_states, fc1, fc2, weights[:, e : e + 1], ids[:, e : e + 1], expert.act, **options)
        for e in (0, 1)
    ]
    return F.dropout(parts[0], rate) + F.dropout(parts[1], rate)


def refuse(module: Any) -> str:
    if module.num_experts < 2:
        return "it has fewer than two experts"
    try:
        source = inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return "the source of its class cannot be read, and there are two ways to compute it"
    if "one_hot(router_mask" not in source:
        return "this version of transformers computes its experts in a way that this adapter does not know"
    return ""


ADAPTERS = (
    Adapter(
        kind="NllbMoeExperts",
        home="transformers.models.nllb_moe.modeling_nllb_moe",
        forward=forward,
        columns=columns,
        per_expert=True,
        act_fn=lambda module: module._modules["expert_0"].act,
        path="fused_experts on experts 0 and 1, the only ones this version of transformers runs",
        refuse=refuse,
    ),
)
