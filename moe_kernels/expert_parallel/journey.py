# SPDX-License-Identifier: Apache-2.0
"""`Journey`: rows on their way to other ranks and back, for autograd.

The backward of going is coming home, of coming home is going. A journey is begun and ended in two steps, so that
something else can be computed in between: in the forward, and through autograd's own order in the backward too.
"""

from __future__ import annotations

import weakref
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
    guard: called when the backward comes to what lies between this journey, the way out, and the one back; returns what
    to call if it ends there in an exception.
    """

    go: Begin
    home: Begin
    anchor: Tensor | None
    guard: Callable[[], Callable[[], None]] | None = None
    arrive: list[Callable[[], Freight]] = field(default_factory=list)
    ticket: Tensor | None = None
    thread: Tensor | None = None
    alarm: Callable[[], Alarm | None] = lambda: None

    def begin(self, rows: Tensor, weights: Tensor | None = None, ids: Tensor | None = None,
              out: Journey | None = None) -> None:  # fmt: skip
        """Starts. out: the way out, where this is the way back."""
        thread = None
        if out is not None:
            thread, out.thread = out.thread, None  # whose graph holds the journey: no circle stays
        self.ticket = _Begin.apply(self, self.anchor, rows, weights, ids, out, thread)  # type: ignore[no-untyped-call]

    def end(self) -> Freight:
        ticket, self.ticket = self.ticket, None
        rows, weights, ids, thread = _End.apply(self, ticket)  # type: ignore[no-untyped-call]
        self.thread = thread if self.guard is not None else None
        return rows, weights, ids

    def forget(self) -> None:
        """Lets go of the graph of a journey that nobody ends."""
        self.ticket = self.thread = None


class Alarm(bytearray):
    """Memory of a gradient that goes straight from the beginning of the way back to the end of the way out.

    It waits there for the gradients that the experts' own backward makes. An exception in that ends the backward, the
    waiting gradient is let go of, and its memory with it: nothing else tells us, or says it so soon.
    """

    lost: Callable[[], None] | None = None

    def __del__(self) -> None:
        if self.lost is not None:
            self.lost()


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, journey: Journey, anchor: Tensor | None, rows: Tensor, weights: Tensor | None,
                ids: Tensor | None, out: Journey | None, thread: Tensor | None) -> Tensor:  # fmt: skip
        ctx.journey, ctx.out = journey, out
        journey.arrive.append(journey.go(rows, weights, ids))
        return rows.new_zeros(0)

    @staticmethod
    def backward(ctx: Any, _ticket: Tensor) -> tuple[Any, ...]:
        grad_rows, grad_weights, _ = ctx.journey.arrive.pop()()
        waits = None
        if ctx.needs_input_grad[6]:
            alarm = Alarm(4)
            alarm.lost, ctx.out.alarm = ctx.out.guard(), weakref.ref(alarm)
            waits = torch.frombuffer(alarm, dtype=torch.float32)
        return None, None, grad_rows, grad_weights, None, None, waits


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, journey: Journey, ticket: Tensor) -> tuple[Tensor | None, ...]:
        ctx.journey = journey
        rows, weights, ids = journey.arrive.pop()()
        if ids is not None:
            ctx.mark_non_differentiable(ids)
        return rows, weights, ids, torch.zeros(1)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor | None, _ids: None, _waits: Tensor,
                 ) -> tuple[None, Tensor]:  # fmt: skip
        if (alarm := ctx.journey.alarm()) is not None:
            alarm.lost = None
        ctx.journey.arrive.append(ctx.journey.home(grad_rows, grad_weights, None))
        return None, grad_rows.new_zeros(0)
