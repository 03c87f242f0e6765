# SPDX-License-Identifier: Apache-2.0
"""Noisy top-k gating. Shazeer et al. 2017 (arXiv 1701.06538), equations 3-5; its losses are "importance" and "load"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import check, draws, ops
from ..ops import Routing
from ..schemas import acc_dtype
from .token_choice import Gate, Router, RouterSettings


@dataclass(frozen=True, repr=False)
class NoisyTopK(RouterSettings):
    """In training h = x Wg + n * (softplus(x Wn) + noise_eps), n ~ N(0, 1) an element; softmax over the K best of h."""

    noise_eps: float = 1e-2
    """of tensor2tensor; the paper has none"""

    def __post_init__(self) -> None:
        if not self.noise_eps >= 0:
            check.refuse("NoisyTopK", "noise_eps", "0 or positive", str(self.noise_eps))

    def gate(self, hidden_size: int, num_experts: int, top_k: int, **place: Any) -> NoisyGate:
        return NoisyGate(hidden_size, num_experts, top_k, self, **place)


class Noise(NamedTuple):
    """What noise did to the logits."""

    noisy_logits: Tensor
    """acc [T, E], the logits that were chosen from"""
    std: Tensor
    """acc [T, E]"""


class NoisyGate(Gate):
    """The gate of `NoisyTopK`. Parameters: weight [E, H] and noise_weight [E, H], which start at 0."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, rule: NoisyTopK, **place: Any) -> None:
        super().__init__(hidden_size, num_experts, top_k, Router(), **place)
        self.rule = rule
        self.noise_weight = nn.Parameter(torch.zeros_like(self.weight))
        self.reset_parameters()

    def reset_parameters(self, init: str = "normal") -> None:
        for weight in self.parameters():
            nn.init.zeros_(weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.num_experts}, top_k={self.top_k}, {self.rule}"

    def forward(
        self, x: Tensor, *, padding_mask: Tensor | None = None, token_ids: Tensor | None = None
    ) -> tuple[Tensor, Routing, Noise | None]:
        """The clean logits, the routing by the noisy ones, and the noise."""
        logits = self._product(x)
        if not self.training:
            return logits, ops.route(logits, self.top_k, padding_mask=padding_mask), None
        acc = acc_dtype(x.dtype)
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            raw = F.linear(x.to(acc), self.noise_weight.to(acc))
        n = draws.normal(self.draws.key(draws.NOISE), *logits.shape, device=x.device, dtype=acc)
        noise = add_noise(logits, raw, n, self.rule.noise_eps)
        routing = ops.route(self._mask(noise.noisy_logits), self.top_k, padding_mask=padding_mask)
        return logits, routing, noise


def add_noise(logits: Tensor, raw: Tensor, n: Tensor, eps: float) -> Noise:
    """Clean logits, x Wn and normal draws, all [T, E] -> the noisy logits and the deviation of their noise."""
    std = F.softplus(raw) + eps
    return Noise(logits + n * std, std)
