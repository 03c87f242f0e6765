# SPDX-License-Identifier: Apache-2.0
"""How rows reach the ranks of their experts: one exchange each, made of the package's own permute and unpermute.

    Hop        a row for every (token, rank), or for every slot, to the ranks that own its experts
    Gathered   every token to every rank; the results are summed on their way back
    Slotted    a fixed number of places for every (rank, expert), whatever was chosen: no count leaves the device

`dispatch` begins, `arrived` ends the way out; `combine` begins, `combined` ends the way back. Two hops in a row, node
first and rank second, are the two-level transport.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from . import header
from .journey import Freight, Journey
from .link import Link
from .rows import Format

LOST = "an exception in the backward of its experts; it raised that itself"
INPUTS, PARAMETERS = 1, 2
"""bits of the field `needs`: what wants a gradient on a rank"""


@dataclass
class Call:
    """One forward of the layer: what its hops share.

    fields: of the header, the same for every exchange. needs, width: of this rank; after the first header, of all:
    whose gradients are wanted, and the most experts of a token.
    """

    link: Link
    fields: dict[str, header.Value]
    wire: torch.dtype
    needs: int
    tokens: int
    width: int
    agreed: bool = False

    def guard(self, phase: str) -> Callable[[], None]:
        """What to call if the backward of the experts ends in an exception: the others hear of it in that phase."""
        return self.link.guard(lambda: self.link.fail_alone(phase, LOST))

    def agree(self, phase: str, rows: int, counts: list[int]) -> list[list[int]]:
        own = {"rows": rows, "tokens": self.tokens, "needs": self.needs, "width": self.width}
        fields = self.fields | {"phase": phase, **own}
        records = self.link.agree(fields, counts, phase)
        self.link.owes = True
        if not self.agreed:
            self.agreed = True
            for record in records:
                self.needs |= header.field(record, "needs")
                self.width = max(self.width, header.field(record, "width"))
        return records

    def anchor(self, mask: int) -> Tensor | None:
        """For a journey whose backward all ranks run or none."""
        wanted = bool(self.needs & mask) and bool(self.fields["grad_mode"])
        return torch.zeros((), requires_grad=True) if wanted else None


class Exchange:
    """Rows to and from: send[p] of them to position p, receive[p] from it."""

    def __init__(self, call: Call, name: str, send: list[int], receive: list[int]) -> None:
        self.call, self.name, self.send, self.receive = call, name, send, receive

    def out(self, phase: str, rows: Tensor, weights: Tensor | None, ids: Tensor | None) -> Callable[[], Freight]:
        return self._carry(phase, self.send, self.receive, rows, weights, ids)

    def back(self, phase: str, rows: Tensor, weights: Tensor | None = None) -> Callable[[], Freight]:
        return self._carry(phase, self.receive, self.send, rows, weights, None)

    def _carry(self, phase: str, send: list[int], receive: list[int], rows: Tensor, weights: Tensor | None,
               ids: Tensor | None) -> Callable[[], Freight]:  # fmt: skip
        form = _format(self.call, phase, rows, weights, ids)
        ended = self.call.link.all_to_all(form.pack(rows, weights, ids), send, receive, phase)
        return lambda: form.unpack(ended())

    def agree(self, phase: str, send: list[int], receive: list[int]) -> None:
        """The header of every exchange but the first: the counts are known and must come again."""
        records = self.call.agree(phase, sum(send), send)
        at = self.call.link.position
        found = [header.counts(record)[at] for record in records]
        if found != receive:
            raise RuntimeError(f"rows to come differ from the dispatch: {found}, not {receive}")

    def dispatch(self) -> Journey:
        """Its header has been exchanged already: it brought `receive`."""
        return Journey(
            lambda rows, weights, ids: self.out(f"dispatch{self.name}", rows, weights, ids),
            lambda rows, weights, _: self._home(f"dispatch{self.name} backward", rows, weights),
            self.call.anchor(INPUTS),
            lambda: self.call.guard(f"dispatch{self.name} backward"),
        )

    def combine(self) -> Journey:
        return Journey(
            lambda rows, _weights, _ids: self._home(f"combine{self.name}", rows, None),
            lambda rows, _weights, _ids: self._again(f"combine{self.name} backward", rows),
            self.call.anchor(INPUTS | PARAMETERS),
        )

    def _home(self, phase: str, rows: Tensor, weights: Tensor | None) -> Callable[[], Freight]:
        with self.call.link.turn(phase):
            self.agree(phase, self.receive, self.send)
            return self.back(phase, rows, weights)

    def _again(self, phase: str, rows: Tensor) -> Callable[[], Freight]:
        with self.call.link.turn(phase):
            self.agree(phase, self.send, self.receive)
            return self.out(phase, rows, None, None)


def _format(call: Call, phase: str, rows: Tensor, weights: Tensor | None, ids: Tensor | None) -> Format:
    wire = call.wire if phase.startswith("dispatch") and ids is not None else rows.dtype
    kind = torch.float32 if weights is None else weights.dtype
    n_ids, n_weights = (0 if t is None else t.shape[1] for t in (ids, weights))
    return Format(rows.shape[1], rows.dtype, wire, n_ids, n_weights, kind)


class Leg:
    """What begins a way out and a way back: the last journey."""

    journey: Journey

    def landed(self) -> Freight:
        """The end of the last journey, which is let go of: it holds us."""
        journey = self.journey
        del self.journey
        return journey.end()

    def forget(self) -> None:
        """After an error: lets go of what was begun."""
        if hasattr(self, "journey"):
            self.journey.forget()


class Hop(Leg):
    """Every row to the positions that `owner` int64 [E] gives for its experts, -1 for those that are nowhere.

    once: one copy of a token a position, with all of its ids there; else one a slot.
    """

    def __init__(self, call: Call, owner: Tensor, once: bool, name: str = "") -> None:
        self.call, self.owner, self.once, self.name = call, owner, once, name

    def dispatch(self, x: Tensor, weights: Tensor, ids: Tensor) -> None:
        W, (T, K) = self.call.link.size, ids.shape
        to = look_up(self.owner, ids)
        first = torch.where(repeated(to), -1, to) if self.once else to
        x_rows, row_to_slot, self.slot_to_row, offsets = ops.permute(x, first.int(), W)
        send = offsets.diff().tolist()
        P = sum(send)
        records = self.call.agree(f"dispatch{self.name}", T * (1 if self.once else K), send)
        receive = [header.counts(record)[self.call.link.position] for record in records]
        slot = row_to_slot[:P].long()
        if self.once:
            token = slot // K
            here = to[token] == first.flatten()[slot][:, None]
            ids, weights = torch.where(here, ids[token], -1), torch.where(here, weights[token], 0)
            ids, weights = widened(ids, weights, self.call.width)
        else:
            ids, weights = ids.flatten()[slot][:, None], weights.flatten()[slot][:, None]
        self.shape = (T, K)
        self.exchange = Exchange(self.call, self.name, send, receive)
        self.journey = self.exchange.dispatch()
        self.journey.begin(x_rows[:P], weights, ids.int())

    def arrived(self) -> Freight:
        return self.journey.end()

    def combine(self, rows: Tensor) -> None:
        out, self.journey = self.journey, self.exchange.combine()
        self.journey.begin(rows, out=out)

    def combined(self) -> Tensor:
        rows, _, _ = self.landed()
        ones = torch.ones(self.shape, dtype=acc(rows), device=rows.device)
        return ops.unpermute(rows, self.slot_to_row, ones)


class TwoLevel:
    """To the rank of the same place on every node that owns an expert of the token, and from there inside the node."""

    def __init__(self, call: Call, owner: Tensor, place: int, ranks_per_node: int) -> None:
        node, here = owner // ranks_per_node, call.link.position // ranks_per_node
        rail = torch.where(owner < 0, -1, node * ranks_per_node + place)
        inside = torch.where((owner >= 0) & (node == here), owner, -1)
        self.rail, self.node = Hop(call, rail, True, " rail"), Hop(call, inside, True, " node")

    def forget(self) -> None:
        self.rail.forget()
        self.node.forget()

    def dispatch(self, x: Tensor, weights: Tensor, ids: Tensor) -> None:
        self.rail.dispatch(x, weights, ids)

    def arrived(self) -> Freight:
        self.node.dispatch(*self.rail.arrived())  # type: ignore[arg-type]
        return self.node.arrived()

    def combine(self, rows: Tensor) -> None:
        self.node.combine(rows)

    def combined(self) -> Tensor:
        self.rail.combine(self.node.combined())
        return self.rail.combined()


class Gathered(Leg):
    """All tokens to all ranks. Ranks with fewer tokens than the most are filled up with rows of no expert."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def dispatch(self, x: Tensor, weights: Tensor, ids: Tensor) -> None:
        self.tokens = x.shape[0]
        records = self.call.agree("dispatch", self.tokens, [self.tokens] * self.call.link.size)
        self.most = max(header.field(record, "rows") for record in records)
        more = (0, 0, 0, self.most - self.tokens)
        ids, weights = widened(ids, weights, self.call.width)
        self.journey = Journey(
            lambda rows, w, i: self._gather("dispatch", rows, w, i),
            lambda rows, w, _: self._sum("dispatch backward", rows, w),
            self.call.anchor(INPUTS),
            lambda: self.call.guard("dispatch backward"),
        )
        self.journey.begin(F.pad(x, more), F.pad(weights, more), F.pad(ids.int(), more, value=-1))

    def arrived(self) -> Freight:
        return self.journey.end()

    def combine(self, rows: Tensor) -> None:
        out, self.journey = (
            self.journey,
            Journey(
                lambda rows, _w, _i: self._sum("combine", rows, None),
                lambda rows, _w, _i: self._gather_grad(rows),
                self.call.anchor(INPUTS | PARAMETERS),
            ),
        )
        self.journey.begin(rows, out=out)

    def combined(self) -> Tensor:
        return self.landed()[0][: self.tokens]

    def _gather(self, phase: str, rows: Tensor, weights: Tensor | None, ids: Tensor | None) -> Callable[[], Freight]:
        form = _format(self.call, phase, rows, weights, ids)
        ended = self.call.link.all_gather(form.pack(rows, weights, ids), phase)
        return lambda: form.unpack(ended())

    def _gather_grad(self, rows: Tensor) -> Callable[[], Freight]:
        with self.call.link.turn("combine backward"):
            self._agree("combine backward")
            return self._gather("combine backward", rows, None, None)

    def _sum(self, phase: str, rows: Tensor, weights: Tensor | None) -> Callable[[], Freight]:
        with self.call.link.turn(phase):
            self._agree(phase)
            ended = self.call.link.reduce_scatter(rows.contiguous(), phase)
            if weights is None:
                return lambda: (ended(), None, None)
            weighed = self.call.link.reduce_scatter(weights.contiguous(), phase)
            return lambda: (ended(), weighed(), None)

    def _agree(self, phase: str) -> None:
        self.call.agree(phase, self.most, [self.most] * self.call.link.size)


def look_up(table: Tensor, ids: Tensor) -> Tensor:
    """table[ids], -1 for an id that has no entry."""
    known = (ids >= 0) & (ids < table.shape[0])
    return torch.where(known, table[torch.where(known, ids, 0).long()], -1)


def widened(ids: Tensor, weights: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """With columns of no expert, up to the most that a token of any rank has."""
    more = (0, width - ids.shape[1])
    return F.pad(ids, more, value=-1), F.pad(weights, more)


def repeated(to: Tensor) -> Tensor:
    """bool [T, K]: the same value stands further left in the row."""
    return (to[:, :, None] == to[:, None, :]).tril(-1).any(2)


def acc(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32
