# SPDX-License-Identifier: Apache-2.0
"""Two-level gating: a gate of groups, then a gate in each chosen group. Shazeer et al. 2017, appendix B."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import check, ops
from ..ops import Routing
from .token_choice import Gate, Router, RouterSettings, as_routing, draw


@dataclass(frozen=True, kw_only=True, repr=False)
class TwoLevel(RouterSettings):
    """A softmax over the top_groups best of `groups` groups, times one over the K / top_groups best experts of each.

    Expert id = group * (E / groups) + expert. Slots run group by group, best group first.
    """

    groups: int
    top_groups: int

    def __post_init__(self) -> None:
        check.count("TwoLevel", "groups", self.groups, 1)
        check.count("TwoLevel", "top_groups", self.top_groups, 1, self.groups, "groups=")

    def gate(self, hidden_size: int, num_experts: int, top_k: int, **place: Any) -> TwoLevelGate:
        return TwoLevelGate(hidden_size, num_experts, top_k, self, **place)


class TwoLevelGate(Gate):
    """The gate of `TwoLevel`. Parameters: group_weight [groups, H], weight [E, H]."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, rule: TwoLevel, **place: Any) -> None:
        G = rule.groups
        if num_experts % G:
            check.refuse("TwoLevel", "groups", f"a divisor of E={num_experts}", str(G))
        if top_k % rule.top_groups or top_k // rule.top_groups > num_experts // G:
            want = f"a multiple of top_groups={rule.top_groups}, at most {num_experts // G} experts of each"
            check.refuse("TwoLevel", "top_k", want, str(top_k))
        super().__init__(hidden_size, num_experts, top_k, Router(), **place)
        self.rule = rule
        self.group_weight = nn.Parameter(torch.empty_like(self.weight[:G]))
        draw(self, "normal")

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.num_experts}, top_k={self.top_k}, {self.rule}"

    def reset_parameters(self, init: str = "normal") -> None:
        super().reset_parameters(init)
        if init == "zero_router" and hasattr(self, "group_weight"):
            nn.init.zeros_(self.group_weight)

    def forward(
        self, x: Tensor, *, padding_mask: Tensor | None = None, token_ids: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """The logits are log(P(group) P(expert | group)), so their softmax is the joint probability of an expert."""
        T, E, A = x.shape[0], self.num_experts, self.rule.groups
        inner = self.logits(x).reshape(T, A, E // A)
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            outer = F.linear(x.to(inner.dtype), self.group_weight.to(inner.dtype))
        groups = ops.route(outer, self.rule.top_groups)
        chosen = groups.topk_ids.long()
        size = self.top_k // self.rule.top_groups
        rows = inner.gather(1, chosen[:, :, None].expand(-1, -1, E // A)).flatten(0, 1)
        experts = ops.route(rows, size)
        weights = groups.topk_weights[:, :, None] * experts.topk_weights.reshape(T, self.rule.top_groups, size)
        ids = chosen[:, :, None] * (E // A) + experts.topk_ids.reshape(T, self.rule.top_groups, size)
        joint = outer.log_softmax(-1)[:, :, None] + inner.log_softmax(-1)
        return joint.reshape(T, E), as_routing(weights.flatten(1), ids.flatten(1), padding_mask, E)
