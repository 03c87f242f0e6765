# SPDX-License-Identifier: Apache-2.0
"""Balance losses: small frozen settings, each callable on a layer's `LossInputs` and returning a 0-d tensor.

Letters: T tokens, E experts, K experts a token, B groups of tokens, D devices. f is an expert's share of the slots,
counted before any drop; P its mean probability. The gradient flows through P only, or through the logits (`ZLoss`).
Masked tokens are left out everywhere; without tokens a loss is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import check, ops, reference
from .ops import Routing
from .routers import Router
from .schemas import SCORING_CODE, acc_dtype

SCOPES = ("micro_batch", "sequence", "global_batch")


@dataclass(frozen=True, eq=False)
class LossInputs:
    """What the losses of one forward see."""

    logits: Tensor
    """floating [T, E]"""
    routing: Routing
    """as chosen, before any drop"""
    router: Router = field(default_factory=Router)
    sequence_length: int | None = None
    """tokens of a sequence; T is a multiple of it. None: all are one sequence."""
    padding_mask: Tensor | None = None
    """bool [T], True for a token"""
    noise_std: Tensor | None = None
    """[T, E] standard deviation of the noise that was added to the logits"""
    noisy_logits: Tensor | None = None
    """[T, E] the logits that were chosen from"""
    global_counts: GlobalCounts | None = None
    """of the layer: what the scope "global_batch" adds to"""
    score_sums: Tensor | None = None
    """acc [B, E] of `route_with_sums` for `sums_wanted`, or None: a loss that wants sums reads the logits again"""
    normalized_sums: bool = True
    """what they were asked for with"""

    def scores(self) -> Tensor:
        """acc [T, E]: what the score function makes of the logits."""
        return reference.scores(self.logits, self.router.scoring_func, self.router.logit_softcap)[1]

    def probabilities(self) -> Tensor:
        """acc [T, E]: the scores of a token, divided by their sum. For losses of your own."""
        s = self.scores()
        if self.router.scoring_func == "softmax":
            return s
        total = s.sum(-1, keepdim=True)
        return s / torch.where(total > 0, total, 1.0)

    def groups(self, scope: str) -> int:
        """B: how many groups of tokens the scope makes."""
        return groups_of(scope, self.logits.shape[0], self.sequence_length)

    def valid(self, scope: str) -> Tensor:
        """acc [B, 1] tokens of every group that are no padding, at least 1."""
        (T, _), B, acc = self.logits.shape, self.groups(scope), acc_dtype(self.logits.dtype)
        if self.padding_mask is None:
            return torch.full((B, 1), max(T // B, 1), dtype=acc, device=self.logits.device)
        return self.padding_mask.reshape(B, -1).sum(1, keepdim=True).clamp(min=1).to(acc)

    def mean(self, p: Tensor, scope: str) -> Tensor:
        """p [T, n] -> [B, n], the mean over a group's tokens."""
        return self._sum(p, scope) / self.valid(scope)

    def mean_scores(self, scope: str, normalize: bool = True) -> Tensor:
        """P acc [B, E], the mean over a group's tokens of the scores, each divided by its token's sum if normalize."""
        return self._score_sums(scope, normalize) / self.valid(scope)

    def counts(self, ids: Tensor, scope: str) -> Tensor:
        """ids [T, k], -1 for absent -> acc [B, E] slots of every expert in every group."""
        E, B = self.logits.shape[1], self.groups(scope)
        if B == 1 and ids is self.routing.topk_ids:
            return self.routing.tokens_per_expert[None].to(acc_dtype(self.logits.dtype))
        ids = torch.where((ids >= 0) & (ids < E), ids, E).long().reshape(B, -1)
        ones = torch.ones_like(ids, dtype=acc_dtype(self.logits.dtype))
        return ones.new_zeros((B, E + 1)).scatter_add(1, ids, ones)[:, :E]

    def balance(self, f: Tensor, scope: str, normalize: bool = True) -> Tensor:
        """f acc [B, E] -> the mean over the groups that have a token of sum_i f_i P_i."""
        if self.padding_mask is None:  # groups of one size: two operations with a gradient
            return (f / max(self.logits.shape[0], 1) * self._score_sums(scope, normalize)).sum()
        return self.over_groups((f * self.mean_scores(scope, normalize)).sum(1), scope)

    def over_groups(self, per_group: Tensor, scope: str) -> Tensor:
        """per_group [B] -> its mean over the groups that have a token."""
        if self.padding_mask is None or self.groups(scope) == 1:
            return per_group.mean()
        some = self.padding_mask.reshape(self.groups(scope), -1).any(1)
        return torch.where(some, per_group, 0.0).sum() / some.sum().clamp(min=1)

    def _score_sums(self, scope: str, normalize: bool) -> Tensor:
        """acc [B, E]: P times the tokens of the group."""
        code, sums, B = SCORING_CODE[self.router.scoring_func], self.score_sums, self.groups(scope)
        if sums is None or (code != 0 and normalize != self.normalized_sums):
            sums = _SUM_SCORES(self.logits, code, normalize, self.router.logit_softcap, B, self.padding_mask)
        elif sums.shape[0] != B:  # they are those of sequences
            sums = sums.sum(0, keepdim=True)
        return sums

    def _sum(self, t: Tensor, scope: str) -> Tensor:
        """t [T, n] -> acc [B, n]"""
        t = t.to(acc_dtype(self.logits.dtype))
        if self.padding_mask is not None:
            t = torch.where(self.padding_mask[:, None], t, 0.0)
        return t.reshape(self.groups(scope), -1, t.shape[1]).sum(1) if t.shape[0] else t.sum(0, keepdim=True)


_SUM_SCORES = torch.ops.moe_kernels.sum_scores.default
Loss = Callable[[LossInputs], Tensor]


def groups_of(scope: str, tokens: int, sequence_length: int | None) -> int:
    """B: how many groups the scope makes of the tokens."""
    return tokens // sequence_length if scope == "sequence" and sequence_length and tokens else 1


def sums_wanted(losses: Iterable[Loss]) -> tuple[str, bool] | None:
    """(scope, normalize) of the sums of scores that serve the most of `losses`, or None: what a loss names as `sums`.

    Sums of sequences serve the whole batch too; the scores of a softmax are normalised either way.
    """
    wanted = [loss.sums for loss in losses if getattr(loss, "sums", None) is not None]  # type: ignore[attr-defined]
    if not wanted:
        return None
    scope = "sequence" if any(scope == "sequence" for scope, _ in wanted) else "micro_batch"
    return scope, any(normalize for _, normalize in wanted)


class GlobalCounts:
    """A layer's slots of every expert since the last optimizer step, over all ranks (arXiv 2501.11873).

    A forward inside a backward is a recomputation: it sees the same counts and adds nothing.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        """float64 [E+1], the tokens last"""
        self.group: Any = None
        """the process group of the data-parallel ranks; None: all ranks"""

    def reset(self) -> None:
        """A new optimizer step begins."""
        self.total = None

    def add(self, counts: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """counts acc [1, E], tokens acc [1, 1] of this forward -> those of the step so far."""
        if self.total is None or not recomputing():
            seen = torch.cat([counts, tokens], 1)[0].detach().double()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(seen, group=self.group)
            self.total = seen if self.total is None else self.total + seen
        whole = self.total.to(counts.dtype)
        return whole[None, :-1], whole[None, -1:]


def recomputing() -> bool:
    """Whether this is a forward inside a backward, as activation checkpointing runs it."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@dataclass(frozen=True)
class Switch:
    """coef * E * sum_i f_i P_i, f_i = slots_i / (K T). Fedus et al. 2021, eq. 4. Balanced: coef."""

    coef: float = 0.01
    divide_by_k: bool = True
    """False: f_i = slots_i / T, as Hugging Face and flaxformer have it; balanced: coef * K"""
    scope: str = "micro_batch"
    """of f: "micro_batch"; "sequence", a mean over sequences; or "global_batch": slots of all ranks and of all
    micro-batches since the last `Balance.step`, P of this one (arXiv 2501.11873)"""

    def __post_init__(self) -> None:
        check.choice("Switch", "scope", self.scope, SCOPES)

    @property
    def sums(self) -> tuple[str, bool]:
        return self.scope, True

    def __call__(self, inputs: LossInputs) -> Tensor:
        E, ids = inputs.logits.shape[1], inputs.routing.topk_ids
        slots, tokens = inputs.counts(ids, self.scope), inputs.valid(self.scope)
        if self.scope == "global_batch" and inputs.global_counts is not None:  # None: not in training
            slots, tokens = inputs.global_counts.add(slots, tokens)
        scale = self.coef * E / (ids.shape[1] if self.divide_by_k else 1)
        return inputs.balance(slots / tokens * scale, self.scope)


@dataclass(frozen=True)
class GShard:
    """coef * mean over experts of (c_e / T) * P_e, c_e the first choices. Lepikhin et al. 2020, algorithm 1."""

    sums: ClassVar[tuple[str, bool]] = ("micro_batch", True)
    coef: float = 0.01

    def __call__(self, inputs: LossInputs) -> Tensor:
        scope = "micro_batch"
        c = inputs.counts(inputs.routing.topk_ids[:, :1], scope) / inputs.valid(scope)
        return inputs.balance(c * (self.coef / inputs.logits.shape[1]), scope)


@dataclass(frozen=True)
class ZLoss:
    """coef * mean over tokens of logsumexp(logits)^2. Zoph et al. 2022, eq. 5."""

    coef: float = 0.001

    def __call__(self, inputs: LossInputs) -> Tensor:
        lse = inputs.routing.lse  # the kernel's, where the score is a softmax
        if lse is None:
            l = reference.scores(inputs.logits, logit_softcap=inputs.router.logit_softcap)[0]
            lse = reference.log_sum_exp(l, torch.zeros_like(inputs.routing.topk_ids))
        if inputs.padding_mask is None:
            return lse.square().sum() * (self.coef / max(lse.shape[0], 1))
        return self.coef * inputs.mean(lse.square()[:, None], "micro_batch").sum()


@dataclass(frozen=True)
class DeepSeekV2Expert:
    """coef * sum_i f_i P_i a sequence, f_i = E/(K T) slots_i. DeepSeek-V2, section 2.2.3, eq. 23."""

    sums: ClassVar[tuple[str, bool]] = ("sequence", False)
    coef: float = 0.003

    def __call__(self, inputs: LossInputs) -> Tensor:
        return inputs.balance(self.coef * _share(inputs), "sequence", False)


@dataclass(frozen=True)
class DeepSeekV2Device:
    """coef * sum_d f'_d P'_d a sequence: mean f and summed P of a device's experts. DeepSeek-V2, eq. 27."""

    sums: ClassVar[tuple[str, bool]] = ("sequence", False)
    coef: float = 0.05
    devices: int | None = None
    """D, None: the router's num_expert_group"""

    def __call__(self, inputs: LossInputs) -> Tensor:
        D = _devices("DeepSeekV2Device", self.devices, inputs)
        f = _share(inputs).unflatten(1, (D, -1)).mean(2)
        return inputs.balance(self.coef * f.repeat_interleave(inputs.logits.shape[1] // D, 1), "sequence", False)


@dataclass(frozen=True)
class DeepSeekV2Comm:
    """coef * sum_d f''_d P'_d a sequence, f''_d = D/(M T) tokens sent to device d. DeepSeek-V2, eq. 30."""

    sums: ClassVar[tuple[str, bool]] = ("sequence", False)
    coef: float = 0.02
    devices: int | None = None
    """D, None: the router's num_expert_group"""
    limit: int | None = None
    """M, the devices that a token may use; None: the router's topk_group"""

    def __call__(self, inputs: LossInputs) -> Tensor:
        D = _devices("DeepSeekV2Comm", self.devices, inputs)
        (T, E), ids = inputs.logits.shape, inputs.routing.topk_ids.long()
        M = self.limit or inputs.router.topk_group or 1
        device = torch.where((ids >= 0) & (ids < E), ids // (E // D), D)
        sent = inputs.logits.new_zeros((T, D + 1)).detach().scatter(1, device, 1.0)[:, :D]  # a token counts once
        f = D / M * inputs.mean(sent, "sequence")
        return inputs.balance(self.coef * f.repeat_interleave(E // D, 1), "sequence", False)


@dataclass(frozen=True)
class DeepSeekV3:
    """coef * sum_i f_i P_i a sequence, P_i of the scores over their sum. DeepSeek-V3, section 2.1.2, eq. 17-20."""

    sums: ClassVar[tuple[str, bool]] = ("sequence", True)
    coef: float = 1e-4
    count: str = "paper"
    """f from the K best scores without bias and groups ("paper", eq. 18), or from the experts that were "selected" """

    def __post_init__(self) -> None:
        check.choice("DeepSeekV3", "count", self.count, ("paper", "selected"))

    def __call__(self, inputs: LossInputs) -> Tensor:
        ids = None
        if self.count == "paper":
            logits, K, mask = inputs.logits.detach(), inputs.routing.topk_ids.shape[1], inputs.padding_mask
            scoring = inputs.router.scoring_func
            ids = ops.route(logits, K, scoring_func=scoring, padding_mask=mask).topk_ids
        return inputs.balance(self.coef * _share(inputs, ids), "sequence")


@dataclass(frozen=True)
class Importance:
    """coef * CV^2 of the experts' summed weights. Shazeer et al. 2017, eq. 6-7."""

    coef: float = 0.1

    def __call__(self, inputs: LossInputs) -> Tensor:
        weights, ids = inputs.routing.topk_weights, inputs.routing.topk_ids.long()
        (T, E) = inputs.logits.shape
        gates = weights.new_zeros((T, E + 1)).scatter_add(1, torch.where(ids < 0, E, ids), weights)
        return self.coef * squared_cv(gates.sum(0)[:E])


@dataclass(frozen=True)
class Load:
    """coef * CV^2 of the experts' smooth load under noisy gating. Shazeer et al. 2017, eq. 8-11.

    A layer refuses it with any other router: without noise the load is a count, which has no gradient.
    """

    coef: float = 0.1

    def __call__(self, inputs: LossInputs) -> Tensor:
        return self.coef * squared_cv(smooth_load(inputs))


def smooth_load(inputs: LossInputs) -> Tensor:
    """acc [E]: sum over tokens of the chance that an expert is among the K best if only its own noise is drawn anew.

    Shazeer et al. 2017, equations 8-10. With K = E, and without noise as in evaluation, it is a count.
    """
    noisy, std = inputs.noisy_logits, inputs.noise_std
    (T, K), E = inputs.routing.topk_ids.shape, inputs.logits.shape[1]
    if noisy is None or std is None or K == E:
        return inputs.counts(inputs.routing.topk_ids, "micro_batch")[0]
    best = noisy.topk(K + 1, dim=-1)  # only values are used: ties do not matter
    ids = inputs.routing.topk_ids.long()
    inside = torch.zeros((T, E + 1), dtype=torch.bool, device=ids.device)
    inside = inside.scatter(1, torch.where(ids < 0, E, ids), True)[:, :E]
    threshold = torch.where(inside, best.values[:, K:], best.values[:, K - 1 : K])
    p = torch.special.ndtr((inputs.logits - threshold) / std)
    return inputs.mean(p, "micro_batch")[0] * inputs.valid("micro_batch")[0]


def squared_cv(t: Tensor) -> Tensor:
    """Population variance over (mean^2 + 1e-10)."""
    return t.var(correction=0) / (t.mean().square() + 1e-10)


def _share(inputs: LossInputs, ids: Tensor | None = None) -> Tensor:
    """f [B, E] = E/(K T) * slots, a sequence."""
    ids = inputs.routing.topk_ids if ids is None else ids
    scale = inputs.logits.shape[1] / ids.shape[1]
    return inputs.counts(ids, "sequence") * (scale / inputs.valid("sequence"))


def _devices(name: str, devices: int | None, inputs: LossInputs) -> int:
    D, E = devices or inputs.router.num_expert_group or 1, inputs.logits.shape[1]
    if E % D:
        check.refuse(name, "devices", f"a divisor of E={E}", str(D))
    return D


LOSSES: dict[str, type] = {
    "switch": Switch, "gshard": GShard, "z_loss": ZLoss, "deepseek_v2_expert": DeepSeekV2Expert,
    "deepseek_v2_device": DeepSeekV2Device, "deepseek_v2_comm": DeepSeekV2Comm, "deepseek_v3": DeepSeekV3,
    "importance": Importance, "load": Load,
}  # fmt: skip


def resolve(op: str, losses: str | Loss | Iterable[str | Loss]) -> tuple[Loss, ...]:
    """Losses by name, with their default coefficients, or as they are."""
    several = (losses,) if isinstance(losses, str) or callable(losses) else tuple(losses)
    found = []
    for loss in several:
        if isinstance(loss, str):
            check.choice(op, "losses", loss, tuple(LOSSES))
            loss = LOSSES[loss]()
        elif isinstance(loss, type) or not callable(loss):
            want = "names or callables LossInputs -> 0-d tensor"
            check.refuse(op, "losses", want, loss.__name__ if isinstance(loss, type) else check.got(loss), TypeError)
        found.append(loss)
    return tuple(found)
