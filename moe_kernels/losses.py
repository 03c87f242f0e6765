# SPDX-License-Identifier: Apache-2.0
"""Balance losses: small frozen settings, each callable on a layer's `LossInputs` and returning a 0-d tensor.

Letters: T tokens, E experts, K experts a token, B groups of tokens, D devices. f is an expert's share of the slots,
counted before any drop; P its mean probability. The gradient flows through P only, or through the logits (`ZLoss`).
Masked tokens are left out everywhere; without tokens a loss is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import check, ops, reference
from .ops import Routing
from .routers import Router
from .schemas import acc_dtype

SCOPES = ("micro_batch", "sequence")


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

    def scores(self) -> Tensor:
        """acc [T, E]: what the score function makes of the logits."""
        return reference.scores(self.logits, self.router.scoring_func, self.router.logit_softcap)[1]

    def probabilities(self) -> Tensor:
        """acc [T, E]: the scores of a token, divided by their sum."""
        s = self.scores()
        if self.router.scoring_func == "softmax":
            return s
        total = s.sum(-1, keepdim=True)
        return s / torch.where(total > 0, total, 1.0)

    def groups(self, scope: str) -> int:
        """B: how many groups of tokens the scope makes."""
        T, S = self.logits.shape[0], self.sequence_length
        return T // S if scope == "sequence" and S and T else 1

    def valid(self, scope: str) -> Tensor:
        """acc [B, 1] tokens of every group that are no padding, at least 1."""
        return self._sum(self.logits.new_ones((self.logits.shape[0], 1)).detach(), scope).clamp(min=1)

    def mean(self, p: Tensor, scope: str) -> Tensor:
        """p [T, E] -> P [B, E], the mean over a group's tokens."""
        return self._sum(p, scope) / self.valid(scope)

    def counts(self, ids: Tensor, scope: str) -> Tensor:
        """ids [T, k], -1 for absent -> acc [B, E] slots of every expert in every group."""
        E, B = self.logits.shape[1], self.groups(scope)
        ids = torch.where((ids >= 0) & (ids < E), ids, E).long().reshape(B, -1)
        ones = torch.ones_like(ids, dtype=acc_dtype(self.logits.dtype))
        return ones.new_zeros((B, E + 1)).scatter_add(1, ids, ones)[:, :E]

    def over_groups(self, per_group: Tensor, scope: str) -> Tensor:
        """per_group [B] -> its mean over the groups that have a token."""
        if self.padding_mask is None or self.groups(scope) == 1:
            return per_group.mean()
        some = self.padding_mask.reshape(self.groups(scope), -1).any(1)
        return torch.where(some, per_group, 0.0).sum() / some.sum().clamp(min=1)

    def _sum(self, t: Tensor, scope: str) -> Tensor:
        """t [T, n] -> acc [B, n]"""
        t = t.to(acc_dtype(self.logits.dtype))
        if self.padding_mask is not None:
            t = torch.where(self.padding_mask[:, None], t, 0.0)
        return t.reshape(self.groups(scope), -1, t.shape[1]).sum(1) if t.shape[0] else t.sum(0, keepdim=True)


Loss = Callable[[LossInputs], Tensor]


@dataclass(frozen=True)
class Switch:
    """coef * E * sum_i f_i P_i, f_i = slots_i / (K T). Fedus et al. 2021, eq. 4. Balanced: coef."""

    coef: float = 0.01
    divide_by_k: bool = True
    """False: f_i = slots_i / T, as Hugging Face and flaxformer have it; balanced: coef * K"""
    scope: str = "micro_batch"
    """"micro_batch", or "sequence": a mean over sequences"""

    def __post_init__(self) -> None:
        check.choice("Switch", "scope", self.scope, SCOPES)

    def __call__(self, inputs: LossInputs) -> Tensor:
        E, ids = inputs.logits.shape[1], inputs.routing.topk_ids
        f = inputs.counts(ids, self.scope) / inputs.valid(self.scope) / (ids.shape[1] if self.divide_by_k else 1)
        P = inputs.mean(inputs.probabilities(), self.scope)
        return self.coef * E * inputs.over_groups((f * P).sum(1), self.scope)


@dataclass(frozen=True)
class GShard:
    """coef * mean over experts of (c_e / T) * P_e, c_e the first choices. Lepikhin et al. 2020, algorithm 1."""

    coef: float = 0.01

    def __call__(self, inputs: LossInputs) -> Tensor:
        scope = "micro_batch"
        c = inputs.counts(inputs.routing.topk_ids[:, :1], scope) / inputs.valid(scope)
        return self.coef * (c * inputs.mean(inputs.probabilities(), scope)).mean()


@dataclass(frozen=True)
class ZLoss:
    """coef * mean over tokens of logsumexp(logits)^2. Zoph et al. 2022, eq. 5."""

    coef: float = 0.001

    def __call__(self, inputs: LossInputs) -> Tensor:
        lse = inputs.routing.lse  # the kernel's, where the score is a softmax
        if lse is None:
            l = reference.scores(inputs.logits, logit_softcap=inputs.router.logit_softcap)[0]
            lse = reference.log_sum_exp(l, torch.zeros_like(inputs.routing.topk_ids))
        return self.coef * inputs.mean(lse.square()[:, None], "micro_batch").sum()


@dataclass(frozen=True)
class DeepSeekV2Expert:
    """coef * sum_i f_i P_i a sequence, f_i = E/(K T) slots_i. DeepSeek-V2, section 2.2.3, eq. 23."""

    coef: float = 0.003

    def __call__(self, inputs: LossInputs) -> Tensor:
        f, P = _shares(inputs)
        return self.coef * inputs.over_groups((f * P).sum(1), "sequence")


@dataclass(frozen=True)
class DeepSeekV2Device:
    """coef * sum_d f'_d P'_d a sequence: mean f and summed P of a device's experts. DeepSeek-V2, eq. 27."""

    coef: float = 0.05
    devices: int | None = None
    """D, None: the router's num_expert_group"""

    def __call__(self, inputs: LossInputs) -> Tensor:
        f, P = _shares(inputs)
        D = _devices("DeepSeekV2Device", self.devices, inputs)
        f, P = f.unflatten(1, (D, -1)).mean(2), P.unflatten(1, (D, -1)).sum(2)
        return self.coef * inputs.over_groups((f * P).sum(1), "sequence")


@dataclass(frozen=True)
class DeepSeekV2Comm:
    """coef * sum_d f''_d P'_d a sequence, f''_d = D/(M T) tokens sent to device d. DeepSeek-V2, eq. 30."""

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
        f, P = D / M * inputs.mean(sent, "sequence"), _shares(inputs)[1].unflatten(1, (D, -1)).sum(2)
        return self.coef * inputs.over_groups((f * P).sum(1), "sequence")


@dataclass(frozen=True)
class DeepSeekV3:
    """coef * sum_i f_i P_i a sequence, P_i of the scores over their sum. DeepSeek-V3, section 2.1.2, eq. 17-20."""

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
        f, P = _shares(inputs, inputs.probabilities(), ids)
        return self.coef * inputs.over_groups((f * P).sum(1), "sequence")


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

    Errors: ValueError where the router adds no noise: the load would be a count, which has no gradient.
    """

    coef: float = 0.1

    def __call__(self, inputs: LossInputs) -> Tensor:
        noisy, std = inputs.noisy_logits, inputs.noise_std
        if noisy is None or std is None:
            raise ValueError("Load: needs the noise of noisy gating, but this router adds none: choose importance")
        K, E = inputs.routing.topk_ids.shape[1], inputs.logits.shape[1]
        if K == E:
            return self.coef * squared_cv(inputs.counts(inputs.routing.topk_ids, "micro_batch")[0])
        best = noisy.sort(dim=-1, descending=True, stable=True).values
        inside = noisy >= best[:, K - 1 : K]
        threshold = torch.where(inside, best[:, K : K + 1], best[:, K - 1 : K])
        p = torch.special.ndtr((inputs.logits - threshold) / std)
        return self.coef * squared_cv(inputs.mean(p, "micro_batch")[0] * inputs.valid("micro_batch")[0])


def squared_cv(t: Tensor) -> Tensor:
    """Population variance over (mean^2 + 1e-10)."""
    return t.var(correction=0) / (t.mean().square() + 1e-10)


def _shares(inputs: LossInputs, p: Tensor | None = None, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """f [B, E] = E/(K T) * slots and P [B, E], a sequence."""
    ids, p = inputs.routing.topk_ids if ids is None else ids, inputs.scores() if p is None else p
    scale = p.shape[1] / ids.shape[1]
    return inputs.counts(ids, "sequence") * (scale / inputs.valid("sequence")), inputs.mean(p, "sequence")


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
