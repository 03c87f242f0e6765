# SPDX-License-Identifier: Apache-2.0
"""`Journey`: rows on their way to other ranks and back, for autograd.

The backward of going is coming home, of coming home is going. A journey is begun and ended in two steps, so that
something else can be computed in between: in the forward, and through autograd's own order in the backward too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Freight = tuple[Tensor, Tensor | None, Tensor | None]
"""rows [R, H], weights [R, K], ids int32 [R, K]"""
Begin = Callable[[Tensor, Tensor | None, Tensor | None], Callable[[], Freight]]


@dataclass
class Journey:
    """go(rows, weights, ids) starts it and returns what ends it; home(grad_rows, grad_weights, None) its backward.

    anchor: a tensor that requires a gradient on every rank or on none, so that all ranks run the backward or none.
    """

    go: Begin
    home: Begin
    anchor: Tensor | None
    arrive: list[Callable[[], Freight]] = field(default_factory=list)

    def begin(self, rows: Tensor, weights: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        """Starts; returns a ticket for `end`."""
        return _Begin.apply(self, self.anchor, rows, weights, ids)  # type: ignore[no-any-return, no-untyped-call]

    def end(self, ticket: Tensor) -> Freight:
        return _End.apply(self, ticket)  # type: ignore[no-any-return, no-untyped-call]


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, journey: Journey, anchor: Tensor | None, rows: Tensor, weights: Tensor | None,
                ids: Tensor | None) -> Tensor:  # fmt: skip
        ctx.journey = journey
        journey.arrive.append(journey.go(rows, weights, ids))
        return rows.new_zeros(0)

    @staticmethod
    def backward(ctx: Any, _ticket: Tensor) -> tuple[Tensor | None, ...]:
        grad_rows, grad_weights, _ = ctx.journey.arrive.pop()()
        return None, None, grad_rows, grad_weights, None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, journey: Journey, ticket: Tensor) -> Freight:
        ctx.journey = journey
        rows, weights, ids = journey.arrive.pop()()
        if ids is not None:
            ctx.mark_non_differentiable(ids)
        return rows, weights, ids

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor | None, _ids: None) -> tuple[None, Tensor]:
        ctx.journey.arrive.append(ctx.journey.home(grad_rows, grad_weights, None))
        return None, grad_rows.new_zeros(0)
