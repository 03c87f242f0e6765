# SPDX-License-Identifier: Apache-2.0
"""Expert choice: every expert takes its best tokens. Zhou et al. 2022 (arXiv 2202.09368), section 3.

Letters: T tokens, E experts, n tokens of a group, C tokens an expert takes of it. Scores are a softmax over the
experts; the weight of a token is its score, not renormalised; a token that no expert took has output 0. The choice is
a kernel (`csrc/cpu/expert_choice.cpp`). With max_experts it is the best of a plan that has to be iterated over [T, E]
first: that solver runs as torch operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import check, reference
from ..ops import Routing
from .token_choice import Gate, Router, RouterSettings, count_experts


@dataclass(frozen=True, kw_only=True, repr=False)
class ExpertChoice(RouterSettings):
    """Every expert takes C = int(n * capacity_factor / E) tokens of a group, at least 1.

    A token's experts are not known in advance: without max_experts its slots are as many as the fullest token of the
    forward has on the CPU, and E on other devices or in a compiled graph.
    """

    capacity_factor: float | None = None
    """experts of a token in the mean; None: the layer's top_k"""
    max_experts: int | None = None
    """b: at most so many experts a token, by the entropy-regularised plan of section 3.3; None: any number"""
    entropy: float = 0.001
    """lambda of that plan"""
    iterations: int = 100
    group: str | int = "batch"
    """which tokens compete: the "batch", a "sequence", or so many tokens"""
    allow_noncausal: bool = False
    """an expert sees all tokens of a group: True allows decoding, one token at a time, in spite of that"""

    def __post_init__(self) -> None:
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            check.refuse("ExpertChoice", "capacity_factor", "positive", str(self.capacity_factor))
        if self.max_experts is not None:
            check.count("ExpertChoice", "max_experts", self.max_experts, 1)
        if not self.entropy > 0:
            check.refuse("ExpertChoice", "entropy", "positive", str(self.entropy))
        check.count("ExpertChoice", "iterations", self.iterations, 1)
        check.group("ExpertChoice", self.group)

    def gate(self, hidden_size: int, num_experts: int, top_k: int, **place: Any) -> ExpertChoiceGate:
        return ExpertChoiceGate(hidden_size, num_experts, top_k, self, **place)


class ExpertChoiceGate(Gate):
    """The gate of `ExpertChoice`. Parameter: weight [E, H]."""

    wants = ("sequence_length",)
    own_balance = True

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, rule: ExpertChoice, **place: Any) -> None:
        super().__init__(hidden_size, num_experts, top_k, Router(renormalize=False), **place)
        self.rule = rule
        if rule.max_experts is not None:
            check.count("ExpertChoice", "max_experts", rule.max_experts, 1, num_experts, "E=")
            if self._factor() > rule.max_experts:
                want = "at most max_experts: C * E slots have to fit into max_experts * n"
                check.refuse("ExpertChoice", "capacity_factor", want, str(self._factor()))

    def _factor(self) -> float:
        return self.top_k if self.rule.capacity_factor is None else self.rule.capacity_factor

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.num_experts}, top_k={self.top_k}, {self.rule}"

    def forward(
        self, x: Tensor, *, padding_mask: Tensor | None = None, token_ids: Tensor | None = None,
        sequence_length: int | None = None,
    ) -> tuple[Tensor, Routing]:  # fmt: skip
        rule, T, E = self.rule, x.shape[0], self.num_experts
        if not (self.training or rule.allow_noncausal) and sequence_length == 1:
            want = "longer than 1 in evaluation: an expert that chooses among tokens sees later ones, so decoding one "
            check.refuse("ExpertChoice", "the sequence", want + "token at a time needs allow_noncausal=True", "1")
        n = tokens_of("ExpertChoice", rule.group, T, sequence_length)
        logits = self.logits(x)
        C = min(max(int(n * self._factor() / E), 1), max(n, 1))
        if rule.max_experts is None:
            return logits, choose(logits, C, n, padding_mask=padding_mask)
        s = reference.scores(logits)[1]
        if T == 0:
            return logits, slots_of(s, torch.zeros_like(s, dtype=torch.bool), rule.max_experts)
        choice = s.detach() if padding_mask is None else torch.where(padding_mask[:, None], s.detach(), -1.0)
        plan = capped_plan(choice.reshape(-1, n, E), C, rule.max_experts, rule.entropy, rule.iterations)
        taken = take(plan, C).reshape(T, E)
        taken = taken & best(torch.where(taken, choice, -2.0), rule.max_experts)  # the best C may meet in one token
        if padding_mask is not None:
            taken = taken & padding_mask[:, None]
        return logits, slots_of(s, taken, rule.max_experts)


_CUTS, _SLOTS = torch.ops.moe_kernels.expert_cuts.default, torch.ops.moe_kernels.expert_choice.default


def choose(
    logits: Tensor, count: int, group_size: int, *, padding_mask: Tensor | None = None, slots: int | None = None
) -> Routing:
    """Every expert takes its `count` best tokens of every group.

    Args:
        logits: floating [T, E]. NaN counts as -inf.
        count: C, 1..group_size; ties go to the lowest token.
        group_size: n, the tokens that compete; T is a multiple of it.
        padding_mask: bool [T]; what is no token is never taken.
        slots: K, at least the experts of the fullest token. None: just these on the CPU, E elsewhere and in a graph.
    Returns:
        Routing: a token's experts by descending weight, its softmax score; -1 and 0 behind them. Differentiable in
        logits through topk_weights, keeps O(T*K).

    Errors: RuntimeError where T, count and group_size do not fit. Determinism: bitwise.
    """
    n = max(group_size, 1)
    scores, least, last, per_token, counts = _CUTS(logits.detach(), count, n, padding_mask)
    if slots is None:
        known = logits.device.type == "cpu" and not torch.compiler.is_compiling() and len(per_token) > 0
        slots = max(int(per_token.max()), 1) if known else logits.shape[1]
    weights, ids = _SLOTS(logits, scores, least, last, slots)
    return Routing(weights, ids, counts, None, None)


def tokens_of(op: str, group: str | int, T: int, sequence_length: int | None) -> int:
    """n, the tokens of a group; T is a multiple of it."""
    if group == "sequence" and sequence_length is None:
        check.refuse(op, "x", 'at least 3-D with group="sequence"', "2-D")
    n = T if group == "batch" else sequence_length if group == "sequence" else group
    assert isinstance(n, int)
    if T and T % n:
        check.refuse(op, "T", f"a multiple of group={n}", str(T))
    return n


def take(plan: Tensor, count: int) -> Tensor:
    """plan [B, n, E] -> bool [B, n, E]: the `count` best tokens of every expert, ties to the lowest token."""
    columns = plan.mT.contiguous()
    least = columns.topk(count, -1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = columns > least, columns == least
    room = count - above.sum(-1, keepdim=True)
    return (above | (equal & (equal.cumsum(-1) <= room))).mT


def best(values: Tensor, count: int) -> Tensor:
    """values [T, E] -> bool [T, E]: the `count` best experts of every token."""
    order = reference.select(values, count)
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, order, True)


def slots_of(s: Tensor, taken: Tensor, slots: int) -> Routing:
    """Scores s [T, E] and taken bool [T, E] -> a Routing of so many slots."""
    ids = reference.select(torch.where(taken, s.detach(), -1.0), slots)
    present = taken.gather(1, ids)
    weights = torch.where(present, s.gather(1, ids), 0.0)
    ids = torch.where(present, ids, -1).int()
    return Routing(weights, ids, count_experts(ids, s.shape[1]), None, None)


def capped_plan(s: Tensor, count: int, cap: int, entropy: float, iterations: int) -> Tensor:
    """s [B, n, E] -> A [B, n, E], the plan that maximises sum(s * A) - entropy * sum(A log A) where an expert's column
    sums to `count`, a token's row to at most `cap`, and 0 <= A <= 1.

    Dykstra's alternating projections in the Kullback-Leibler divergence, in logarithms. Padded tokens have s < 0.
    """
    a = s / entropy
    row, box = torch.zeros_like(a[:, :, :1]), torch.zeros_like(a)
    for _ in range(iterations):
        a = a - a.logsumexp(1, keepdim=True) + math.log(count)  # an affine set: it needs no correction
        moved = a + row
        row = (moved.logsumexp(2, keepdim=True) - math.log(cap)).clamp(min=0)
        a = moved - row
        moved = a + box
        box = moved.clamp(min=0)
        a = moved - box
    return a.exp()
