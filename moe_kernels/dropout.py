# SPDX-License-Identifier: Apache-2.0
"""`Dropout`: three ways to leave parts of a layer out in training. Counter-based draws; nothing in evaluation."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from . import check, draws
from .routers import changed


@dataclass(frozen=True, kw_only=True, repr=False)
class Dropout:
    """Probabilities, 0 is off.

    Errors: ValueError outside 0..1, 1 excluded.
    """

    inner: float = 0.0
    """of a hidden unit inside an expert, after the activation and the gate; the others are scaled by 1 / (1 - p)
    (Switch Transformers, section 2.4: 0.4)"""
    expert: float = 0.0
    """of an expert for a whole step: its logits are -inf, so that other experts take its tokens; K experts always stay,
    with groups enough in every one. No scaling."""
    output: float = 0.0
    """of a slot: its output is 0, its weight is not given to others (NLLB's expert output masking)"""

    def __post_init__(self) -> None:
        for f in fields(self):
            if not 0 <= getattr(self, f.name) < 1:
                check.refuse("Dropout", f.name, "in 0..1, 1 excluded", str(getattr(self, f.name)))

    def __repr__(self) -> str:
        return changed(self)

    def hidden_mask(self, counters: draws.Draws, topk_ids: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """-> dtype [T, K, I], 0 or 1 / (1 - inner)."""
        u = draws.uniform(counters.key(draws.INNER), *topk_ids.shape, width, device=topk_ids.device)
        return (u >= self.inner).to(dtype) / (1 - self.inner)

    def output_ids(self, counters: draws.Draws, topk_ids: Tensor) -> Tensor:
        """topk_ids [T, K] with -1 for the slots without an output."""
        u = draws.uniform(counters.key(draws.OUTPUT), *topk_ids.shape, device=topk_ids.device)
        return torch.where(u >= self.output, topk_ids, -1)
