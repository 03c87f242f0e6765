# SPDX-License-Identifier: Apache-2.0
"""How many tokens an expert takes: `Capacity`, the rule and whom it drops, and `limit_capacity`, the op below it.

A group is the set of tokens that share one capacity: C = ceil(tokens * K / E * factor), at least min_capacity and at
most the group's tokens. A dropped slot gives no output; the caller of the layer adds the residual stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import check, draws
from .ops import Routing
from .routers import changed, count_experts

ROUNDINGS = ("ceil", "floor", "round")
DROP_POLICIES = ("position", "bpr", "probs", "random", "ntlb", "device")
_LIMIT_CAPACITY = torch.ops.moe_kernels.limit_capacity.default


@dataclass(frozen=True, repr=False)
class Capacity:
    """The capacity rule of a layer. Padded tokens take no capacity, but count as tokens of their group.

    Errors: TypeError, ValueError.
    """

    factor: float | None = None
    """capacity over the balanced share; inf drops nothing"""
    group: str | int = "batch"
    """which tokens share a capacity: the "batch", a "sequence" (the second-last dimension of x), or so many tokens"""
    rounding: str = "ceil"
    """"ceil", "floor", or "round" (half to even)"""
    min_capacity: int = 1
    eval_factor: float | None = None
    """another factor outside training"""
    fixed: int | None = None
    """C itself, instead of a factor (Hugging Face's Switch)"""
    drop_policy: str = "position"
    """who is dropped:
    "position": all first choices in token order, then all second ones, ...; who comes too late (GShard, Switch);
    "bpr": the same, with tokens by descending weight of their first choice (V-MoE); looks ahead, so not for decoders;
    "probs": all but the C highest weights of an expert, ties to the lowest token (Megatron-Core);
    "random": as "position", with tokens in a random order;
    "ntlb": no token left behind: a token takes the first of its K experts that has room, and only that one;
    "device": in training, of the slots sent to one of `devices`, those of lowest score beyond factor * T * K / devices;
    slots of protected tokens stay (DeepSeek-V2, section 2.2.4)"""
    devices: int | None = None
    """D, contiguous groups of experts, for "device" """
    renormalize_after_drop: bool = False
    """scale the weights that a token keeps up to the sum that it had"""

    def __post_init__(self) -> None:
        if (self.factor is None) == (self.fixed is None):
            check.refuse("Capacity", "factor", "given, or fixed, not both", f"factor={self.factor}, fixed={self.fixed}")
        for name in ("factor", "eval_factor"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                check.refuse("Capacity", name, "positive", str(value))
        if self.fixed is not None:
            check.count("Capacity", "fixed", self.fixed, 1)
        check.count("Capacity", "min_capacity", self.min_capacity, 1)
        check.choice("Capacity", "rounding", self.rounding, ROUNDINGS)
        check.choice("Capacity", "drop_policy", self.drop_policy, DROP_POLICIES)
        check.group("Capacity", self.group)
        if self.factor == math.inf and self.drop_policy != "position":
            check.refuse("Capacity", "factor", f"finite for {self.drop_policy}: without a limit nothing drops", "inf")
        if self.factor == math.inf and self.renormalize_after_drop:
            check.refuse(
                "Capacity", "renormalize_after_drop", "False for factor=inf: without a limit nothing drops", "True"
            )
        if (self.devices is None) == (self.drop_policy == "device"):
            check.refuse("Capacity", "devices", 'given with drop_policy="device", and only then', repr(self.devices))
        if self.devices is not None:
            check.count("Capacity", "devices", self.devices, 1)

    def __repr__(self) -> str:
        return changed(self)

    def slots(self, tokens: int, top_k: int, num_experts: int, training: bool = True) -> int:
        """C of a group of so many tokens."""
        if self.fixed is not None:
            capacity: int = self.fixed
        else:
            factor = self.factor if training or self.eval_factor is None else self.eval_factor
            assert factor is not None
            if factor == math.inf:
                return tokens
            share = tokens * top_k / num_experts * factor
            capacity = self._rounded(share)
        most = torch.sym_max(tokens, 1)  # sym_: tokens may be symbolic under torch.compile
        return torch.sym_min(torch.sym_max(capacity, self.min_capacity), most)  # type: ignore[no-any-return]

    def _rounded(self, share: float) -> int:
        capacity = math.ceil(share) if self.rounding == "ceil" else math.floor(share)
        return round(share) if self.rounding == "round" else capacity

    def limit(
        self, routing: Routing, *, sequence_length: int | None = None, training: bool = True,
        scores: Tensor | None = None, protected: Tensor | None = None, counters: draws.Draws | None = None,
    ) -> Routing:  # fmt: skip
        """The routing without the slots that exceed a capacity: id -1, weight 0, dropped True.

        scores: acc [T, K] of the slots, protected: bool [T], both for "device". counters: for "random".
        """
        E, (T, K) = routing.tokens_per_expert.shape[0], routing.topk_ids.shape
        if self.group == "sequence" and sequence_length is None:
            check.refuse("Capacity", "x", 'at least 3-D with group="sequence"', "2-D")
        size = T if self.group == "batch" else sequence_length if self.group == "sequence" else self.group
        if self.drop_policy == "device":
            if not training:
                return routing
            affinity = routing.topk_weights if scores is None else scores
            dropped = self._beyond_budget(routing.topk_ids, affinity.detach(), E, size, protected)  # type: ignore[arg-type]
        else:
            slots = self.slots(size, K, E, training)  # type: ignore[arg-type]
            dropped = self._late(routing, slots, torch.sym_max(size, 1), counters)
        ids, weights = torch.where(dropped, -1, routing.topk_ids), torch.where(dropped, 0.0, routing.topk_weights)
        if self.renormalize_after_drop:
            kept, whole = weights.sum(-1, keepdim=True), routing.topk_weights.sum(-1, keepdim=True)
            weights = weights * torch.where(kept > 0, whole / torch.where(kept > 0, kept, 1.0), 1.0)
        return Routing(weights, ids, count_experts(ids, E), routing.lse, dropped)

    def _late(self, routing: Routing, capacity: int, size: int, counters: draws.Draws | None) -> Tensor:
        ids, E, policy = routing.topk_ids, routing.tokens_per_expert.shape[0], self.drop_policy
        weights = routing.topk_weights.detach()
        if policy == "probs":
            return _by_rank(ids, weights, E, capacity, size)
        if policy == "ntlb":
            return _none_left_behind(ids, E, capacity, size)
        if policy == "position":
            return limit_capacity(ids, E, capacity, group_size=size)
        if policy == "bpr":
            order = weights[:, 0].argsort(descending=True, stable=True)
        else:
            key = (counters or draws.Draws()).key(draws.DROP_ORDER)
            order = draws.uniform(key, ids.shape[0], device=ids.device).argsort(stable=True)
        order = order[(order // size).argsort(stable=True)]  # by group, in this order inside it
        dropped = limit_capacity(ids[order], E, capacity, group_size=size)
        return torch.zeros_like(dropped).index_copy(0, order, dropped)

    def _beyond_budget(
        self, ids: Tensor, affinity: Tensor, num_experts: int, size: int, protected: Tensor | None
    ) -> Tensor:
        assert self.devices is not None and self.factor is not None
        if num_experts % self.devices:
            check.refuse("Capacity", "devices", f"a divisor of E={num_experts}", str(self.devices))
        budget = max(self._rounded(size * ids.shape[1] * self.factor / self.devices), self.min_capacity)
        device = torch.where(ids >= 0, ids // (num_experts // self.devices), -1)
        if protected is None:
            return _by_rank(device, affinity, self.devices, budget, size)
        first = torch.where(protected[:, None], math.inf, affinity)
        return _by_rank(device, first, self.devices, budget, size) & ~protected[:, None]


def _by_rank(ids: Tensor, weights: Tensor, num_experts: int, capacity: int, size: int) -> Tensor:
    """dropped [T, K]: of every expert in every group all slots but the `capacity` ones of highest weight."""
    K = ids.shape[1]
    order = weights.flatten().argsort(descending=True, stable=True)
    order = order[(order // (size * K)).argsort(stable=True)]
    late = limit_capacity(ids.flatten()[order, None], num_experts, capacity, group_size=size * K)
    return torch.zeros_like(late).index_copy(0, order, late).reshape(ids.shape)


def _none_left_behind(ids: Tensor, num_experts: int, capacity: int, size: int) -> Tensor:
    """dropped [T, K]: a token keeps the first slot whose expert has room; slot k is tried after all slots k - 1."""
    kept = torch.full_like(ids, -1)
    for k in range(ids.shape[1]):
        waiting = (kept < 0).all(1)
        kept = kept.index_copy(1, torch.tensor([k], device=ids.device), torch.where(waiting, ids[:, k], -1)[:, None])
        kept = torch.where(limit_capacity(kept, num_experts, capacity, group_size=size), -1, kept)
    return (kept < 0) & (ids >= 0)


def limit_capacity(topk_ids: Tensor, num_experts: int, capacity: int, *, group_size: int | None = None) -> Tensor:
    """Which slots exceed the capacity of their expert, by the policy "position".

    Args:
        topk_ids: int32 or int64 [T, K]; an id outside [0, E) is absent, takes no place and is never dropped.
        num_experts: E.
        capacity: slots that an expert takes of every group.
        group_size: so many tokens in a row make a group, the last may be shorter; None: all tokens are one.
    Returns:
        dropped: bool [T, K]. A group's first choices come in token order, then its second choices, and so on; an expert
        keeps the first `capacity` of them.

    Errors: TypeError, ValueError. With MOE_KERNELS_DEBUG=1 ids outside -1..E-1 raise ValueError.
    Determinism: bitwise. Source: GShard (arXiv 2006.16668), algorithm 1; Switch Transformers.
    """
    check.tensor("limit_capacity", "topk_ids", topk_ids, check.IDS, [("T", None), ("K", None)])
    check.count("limit_capacity", "num_experts", num_experts, 1)
    check.count("limit_capacity", "capacity", capacity, 1)
    if group_size is not None:
        check.count("limit_capacity", "group_size", group_size, 1)
    if check.checked():
        check.values("limit_capacity", "topk_ids", topk_ids, -1, num_experts, "an expert, or -1 for none")
    size = torch.sym_max(topk_ids.shape[0], 1) if group_size is None else group_size
    return _LIMIT_CAPACITY(topk_ids, num_experts, capacity, size)  # type: ignore[no-any-return]
