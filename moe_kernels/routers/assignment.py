# SPDX-License-Identifier: Apache-2.0
"""Routing as a balanced assignment of tokens to experts: BASE layers (exact) and Sinkhorn (approximate, in training).

The assignment has no gradient; the weight does, through the score of the chosen expert. Evaluation takes the best
expert of every token, without balance. Letters: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import check, ops, reference
from ..ops import Routing
from .token_choice import Gate, Router, RouterSettings, as_routing


@dataclass(frozen=True, repr=False)
class Base(RouterSettings):
    """One expert a token; in training the assignment of highest total score in which every expert has T // E tokens,
    the first T % E one more. Weight sigmoid(score). Lewis et al. 2021 (arXiv 2103.16716), equations 3-5.

    The paper's x + sigmoid(s) f(x) is this layer plus the residual of the block around it.
    """

    def gate(self, hidden_size: int, num_experts: int, top_k: int, **place: Any) -> AssignmentGate:
        if top_k != 1:
            check.refuse("Base", "top_k", "1: an assignment gives every token one expert", str(top_k))
        return AssignmentGate(hidden_size, num_experts, 1, self, **place)


@dataclass(frozen=True, repr=False)
class Sinkhorn(RouterSettings):
    """In training the K best of a transport plan with equal sums over experts. Clark et al. 2022 (arXiv 2202.01169).

    Weights, not renormalised: sigmoid(logit) for K = 1, softmax over all logits for more.
    """

    tol: float = 1e-4
    """the plan is done when the experts' factors move by less than this in the mean"""
    max_iterations: int = 1000

    def __post_init__(self) -> None:
        if not self.tol > 0:
            check.refuse("Sinkhorn", "tol", "positive", str(self.tol))
        check.count("Sinkhorn", "max_iterations", self.max_iterations, 1)

    def gate(self, hidden_size: int, num_experts: int, top_k: int, **place: Any) -> AssignmentGate:
        return AssignmentGate(hidden_size, num_experts, top_k, self, **place)


class AssignmentGate(Gate):
    """The gate of `Base` and `Sinkhorn`. Parameter: weight [E, H], for `Base` the expert embeddings."""

    own_balance = True

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, rule: Base | Sinkhorn, **place: Any) -> None:
        scoring = "sigmoid" if top_k == 1 else "softmax"
        router = Router(scoring_func=scoring, renormalize=False)
        super().__init__(hidden_size, num_experts, top_k, router, **place)
        self.rule = rule

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.num_experts}, top_k={self.top_k}, {self.rule}"

    def forward(
        self, x: Tensor, *, padding_mask: Tensor | None = None, token_ids: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        logits, rule, options = self.logits(x), self.rule, self.settings.options()
        if not self.training or x.shape[0] == 0:
            return logits, ops.route(logits, self.top_k, padding_mask=padding_mask, **options)
        if isinstance(rule, Sinkhorn):
            plan = balance(logits, self.top_k, rule.tol, rule.max_iterations, padding_mask=padding_mask)
            return logits, Routing(plan.topk_weights, plan.topk_ids, plan.tokens_per_expert, None, None)
        s, valid = reference.scores(logits, self.settings.scoring_func)[1], padding_mask
        if valid is None:
            ids = balanced_assignment(logits.detach())
        else:
            found = balanced_assignment(logits.detach()[valid])
            ids = found.new_zeros(len(logits)).masked_scatter(valid, found)
        return logits, as_routing(s.gather(1, ids[:, None]), ids[:, None], padding_mask, self.num_experts)


_SINKHORN = torch.ops.moe_kernels.sinkhorn.default


def balance(
    logits: Tensor, top_k: int, tol: float = 1e-4, max_iterations: int = 1000, *, padding_mask: Tensor | None = None
) -> reference.Balanced:
    """The K best experts of every token by a transport plan that is balanced over the experts.

    Args:
        logits: floating [T, E]. NaN counts as -inf.
        top_k: K, 1..E; ties of the plan go to the lowest id.
        tol, max_iterations: the iteration ends when the experts' factors move by no more than tol in the mean.
        padding_mask: bool [T]; what is no token has no part in the plan.
    Returns:
        Balanced: topk_weights, topk_ids, tokens_per_expert, plan, iterations. Differentiable in logits through
        topk_weights, keeps O(T*K).

    Errors: RuntimeError for a top_k or a limit out of range. Determinism: bitwise.
    """
    return reference.Balanced(*_SINKHORN(logits, top_k, tol, max_iterations, padding_mask))


def sinkhorn(logits: Tensor, tol: float = 1e-4, max_iterations: int = 1000) -> tuple[Tensor, int]:
    """logits [T, E] -> the plan acc [T, E], rows of which sum to 1/T and columns to 1/E, and the iterations it took."""
    found = balance(logits.detach(), 1, tol, max_iterations)
    return found.plan, int(found.iterations)


def balanced_assignment(scores: Tensor) -> Tensor:
    """scores floating [T, E] -> int64 [T]: one expert a token, T // E tokens an expert and the first T % E one more, of
    the highest total score.

    Successive shortest paths: every token starts at its best expert; then tokens are moved along the cheapest chain of
    experts from a full one to one with room. Scores are rounded to integers of 40 bits (50 for float64), exact below a
    part in 2^40 of the largest score, so that no chain is a matter of rounding. About T * E work a chain.
    """
    if not isinstance(scores, Tensor) or scores.dtype not in check.FLOATS or scores.dim() != 2:
        check.tensor("balanced_assignment", "scores", scores, check.FLOATS, [("T", None), ("E", None)])
    T, E = scores.shape
    if not bool(scores.isfinite().all()):
        check.refuse("balanced_assignment", "scores", "finite", "NaN or infinity")
    bits = 50 if scores.dtype == torch.float64 else 40
    largest = float(scores.abs().max()) if scores.numel() else 0.0
    value = (scores.double().cpu() * (2.0**bits / largest if largest else 1.0)).round().long()
    expert = value.argmax(1)
    room = torch.full((E,), T // E)
    room[: T % E] += 1
    room -= torch.bincount(expert, minlength=E)
    far = torch.iinfo(torch.int64).max // 4
    cost, who = torch.full((E, E), far), torch.zeros((E, E), dtype=torch.int64)
    _refresh(range(E), value, expert, cost, who, far)
    while bool((room < 0).any()):
        distance = torch.where(room < 0, 0, far)
        previous = torch.full((E,), -1)
        for _ in range(E):  # Bellman-Ford; there is no negative circle
            through, at = (distance[:, None] + cost).min(0)
            shorter = through < distance
            if not bool(shorter.any()):
                break
            distance, previous = torch.where(shorter, through, distance), torch.where(shorter, at, previous)
        e = end = int(torch.where(room > 0, distance, far * 2).argmin())
        touched = [e]
        while int(previous[e]) >= 0:
            before = int(previous[e])
            expert[who[before, e]] = e
            e = before
            touched.append(e)
        room[end] -= 1
        room[e] += 1
        _refresh(touched, value, expert, cost, who, far)
    return expert.to(scores.device)


def _refresh(experts: Iterable[int], value: Tensor, expert: Tensor, cost: Tensor, who: Tensor, far: int) -> None:
    """cost[e, f], the least loss of moving one of e's tokens to f, and who[e, f], that token."""
    for e in experts:
        tokens = (expert == e).nonzero()[:, 0]
        if not tokens.numel():
            cost[e] = far
            continue
        cost[e], at = (value[tokens, e, None] - value[tokens]).min(0)
        who[e] = tokens[at]
        cost[e, e] = far
