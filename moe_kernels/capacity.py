# SPDX-License-Identifier: Apache-2.0
"""How many tokens an expert takes: `Capacity`, the rule, and `limit_capacity`, which says what it drops.

A group is the set of tokens that share one capacity: C = ceil(tokens * K / E * factor), at least min_capacity and at
most the group's tokens. A dropped slot gives no output; the caller of the layer adds the residual stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import check
from .routers import changed

ROUNDINGS = ("ceil", "floor", "round")
DROP_POLICIES = ("position",)
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
    """"position": all first choices in token order, then all second ones, ...; who comes too late is dropped"""
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
        if self.group not in ("batch", "sequence"):
            if isinstance(self.group, str):
                check.refuse("Capacity", "group", '"batch", "sequence" or a number of tokens', repr(self.group))
            check.count("Capacity", "group", self.group, 1)

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
            capacity = math.ceil(share) if self.rounding == "ceil" else math.floor(share)
            capacity = round(share) if self.rounding == "round" else capacity
        most = torch.sym_max(tokens, 1)  # sym_: tokens may be symbolic under torch.compile
        return torch.sym_min(torch.sym_max(capacity, self.min_capacity), most)  # type: ignore[no-any-return]


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
