# SPDX-License-Identifier: Apache-2.0
"""Static capacity: `cap` places for every (sending rank, expert), so that no size depends on what was chosen.

One header when something changes (shape, dtype, gradients), then none: no count is read from the device. A rank that
fails still sends its places, with a status byte behind them; the others see it when the rows are there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import ops
from ..capacity import limit_capacity
from .faults import MoECommError
from .hops import INPUTS, PARAMETERS, Call, Leg, _format, acc, look_up
from .journey import Freight, Journey
from .link import Link


@dataclass
class Handshakes:
    """What the ranks have agreed on. sizes: phase -> rows and bytes for each rank in it.

    flagged: bool [W] on the device, ranks that sent a bad status; read by `raise_if_flagged`.
    """

    key: Hashable = None
    needs: int = 0
    known: set[str] = field(default_factory=set)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    flagged: Tensor | None = None

    def send_failure(self, link: Link, phase: str) -> None:
        """Takes the part of a rank that failed in the exchange that the others have begun."""
        rows, width = self.sizes[phase]
        data = torch.ones(rows * link.size, width, dtype=torch.uint8, device=link.device)
        link.all_to_all(data, [rows] * link.size, [rows] * link.size, phase)()

    def raise_if_flagged(self, link: Link, phase: str) -> None:
        """Reads `flagged`: on a GPU this waits for it."""
        if self.flagged is not None and self.flagged.any():
            link.verdicts += 1
            rank, self.flagged = link.ranks[int(self.flagged.nonzero()[0])], None
            raise MoECommError(rank, "error", phase, "it failed; its own error says why")


class Slotted(Leg):
    """The hop of a static capacity. Slots beyond it are dropped as `limit_capacity` drops them, rank by rank."""

    def __init__(self, call: Call, owner: Tensor, place: Tensor, capacity: int, shakes: Handshakes) -> None:
        self.call, self.owner, self.cap, self.shakes = call, owner, capacity, shakes
        self.held = int(owner.shape[0]) // call.link.size
        self.order = owner * self.held + place
        self.places = owner.shape[0] * capacity

    def dispatch(self, x: Tensor, weights: Tensor, ids: Tensor) -> None:
        (T, K), E = ids.shape, self.owner.shape[0]
        self._handshake(
            "dispatch", (T, K, x.shape[1], x.dtype, self.cap, self.call.needs, self.call.fields["grad_mode"])
        )
        self.dropped = limit_capacity(ids.int(), E, self.cap, group_size=max(T, 1))
        kept = look_up(self.order, torch.where(self.dropped, -1, ids))
        x_rows, row_to_slot, slot_to_row, offsets = ops.permute(x, kept.int(), E)
        flat = kept.flatten()
        present = flat >= 0
        to = flat * self.cap + slot_to_row - offsets.long()[flat.clamp(min=0)]
        self.slot_to_place = torch.where(present, to, -1).int()
        slot = row_to_slot.long()
        rubbish = torch.full_like(slot, self.places)
        row_to_place = torch.where(slot >= 0, to[slot.clamp(min=0)], rubbish)
        slot_place = torch.where(present, to, self.places)
        rows = x.new_zeros(self.places + 1, x.shape[1]).index_copy(0, row_to_place, x_rows)[:-1]
        w = weights.new_zeros(self.places + 1, 1).index_copy(0, slot_place, weights.reshape(-1, 1))[:-1]
        sent = ids.new_full((self.places + 1, 1), -1, dtype=torch.int32)
        sent = sent.index_copy(0, slot_place, ids.reshape(-1, 1).int())[:-1]
        self.shape = (T, K)
        self.journey = Journey(
            lambda rows, weights, ids: self._carry("dispatch", rows, weights, ids),
            lambda rows, weights, _: self._agreed_carry("dispatch backward", rows, weights),
            self.call.anchor(INPUTS),
            lambda: self.call.link.guard(self._lost),
        )
        self.journey.begin(rows, w, sent)

    def arrived(self) -> Freight:
        return self.journey.end()

    def combine(self, rows: Tensor) -> None:
        out, self.journey = (
            self.journey,
            Journey(
                lambda rows, _w, _i: self._agreed_carry("combine", rows, None),
                lambda rows, _w, _i: self._agreed_carry("combine backward", rows, None),
                self.call.anchor(INPUTS | PARAMETERS),
            ),
        )
        self.journey.begin(rows, out=out)

    def combined(self) -> Tensor:
        rows, _, _ = self.landed()
        ones = torch.ones(self.shape, dtype=acc(rows), device=rows.device)
        return ops.unpermute(rows, self.slot_to_place, ones)

    def _handshake(self, phase: str, key: Hashable) -> None:
        """The one header, where something changed."""
        if self.shakes.key != key:
            self.shakes.key, self.shakes.known = key, set()
            self.shakes.sizes.clear()
        if phase not in self.shakes.known:
            per_rank = self.places // self.call.link.size
            self.call.agree(phase, self.places, [per_rank] * self.call.link.size)
            self.shakes.known.add(phase)
            self.shakes.needs = self.call.needs
        self.call.needs, self.call.agreed = self.shakes.needs, True

    def _agreed_carry(self, phase: str, rows: Tensor, weights: Tensor | None) -> Callable[[], Freight]:
        with self.call.link.turn(phase):
            return self._carry(phase, rows, weights, None)

    def _carry(self, phase: str, rows: Tensor, weights: Tensor | None, ids: Tensor | None) -> Callable[[], Freight]:
        """The places of all ranks change hands, each rank's with one more row: its status."""
        link, form = self.call.link, _format(self.call, phase, rows, weights, ids)
        data = form.pack(rows, weights, ids).view(link.size, -1, sum(form.sizes))
        data = torch.nn.functional.pad(data, (0, 0, 0, 1))
        count = data.shape[1]
        self.shakes.sizes[phase] = (count, data.shape[2])
        if phase == "dispatch":
            back = rows.shape[1] * rows.element_size()
            self.shakes.sizes["combine"] = (count, back)
            self.shakes.sizes["dispatch backward"] = (count, back + (0 if weights is None else weights.element_size()))
        ended = link.all_to_all(data.flatten(0, 1), [count] * link.size, [count] * link.size, phase)

        def end() -> Freight:
            whole = ended().view(data.shape)
            self._read_status(whole[:, -1, 0], phase)
            return form.unpack(whole[:, :-1].reshape(-1, data.shape[2]))

        return end

    def _lost(self) -> None:
        """The backward of the experts ended in an exception here: the others read so in the exchange after it."""
        with suppress(MoECommError), self.call.link.lock:
            self.shakes.send_failure(self.call.link, "dispatch backward")

    def _read_status(self, status: Tensor, phase: str) -> None:
        bad = status != 0
        self.shakes.flagged = bad if self.shakes.flagged is None else self.shakes.flagged | bad
        if bad.device.type == "cpu":
            self.shakes.raise_if_flagged(self.call.link, phase)
