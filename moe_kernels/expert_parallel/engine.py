# SPDX-License-Identifier: Apache-2.0
"""`Engine`: one layer's expert parallelism: where experts live, how rows get there, in which order things happen."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import check
from ..capacity import Capacity
from ..planning import Plan, plan
from ..schemas import acc_dtype
from . import header
from .hops import INPUTS, PARAMETERS, Call, Gathered, Hop, TwoLevel, look_up
from .link import LINKS, Link, connect
from .slots import Handshakes, Slotted

TRANSPORTS = ("auto", "flat", "rank_dedup", "two_level", "allgather")
DISPATCH_DTYPES = (None, torch.float8_e4m3fn)


def schedule(chunks: int) -> list[tuple[str, int]]:
    """The order in which every rank starts its exchanges (D, C) and products (G): D0 D1 G0 C0 D2 G1 C1 D3 G2 C2 ...

    So the next chunk's dispatch and the last one's combine travel beside every product. The order depends on nothing
    but the number of chunks, so no two ranks wait for each other.
    """
    order: list[tuple[str, int]] = [("dispatch", 0)]
    for i in range(chunks):
        if i + 1 < chunks:
            order.append(("dispatch", i + 1))
        order.append(("experts", i))
        order.append(("combine", i))
    return order


@dataclass
class Engine:
    """Settings of a layer over a group of ranks, and what its last forward did.

    owner, place: int64 [E], position in the group and index there of every expert, -1 for one that is nowhere.
    any_top_k: the router gives tokens a number of experts that differs from rank to rank.
    """

    ranks: list[int]
    owner: Tensor
    place: Tensor
    transport: str
    capacity_factor: float | None
    chunks: int | None
    timeout: float
    dispatch_dtype: torch.dtype | None
    ranks_per_node: int
    lane: str
    any_top_k: bool = False
    intermediate_size: int = 0
    chosen: Plan | None = None
    seen: tuple[int, int, torch.dtype, int] | None = None
    dropped: Tensor | None = None
    bytes_sent: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LINKS, 0))
    shakes: Handshakes = field(default_factory=Handshakes)
    link: Link | None = None
    trace: list[tuple[str, int]] = field(default_factory=list)
    layout: int = 0

    def __post_init__(self) -> None:
        self.layout = header.code(f"{self.owner.tolist()} {self.place.tolist()}")

    @property
    def position(self) -> int:
        return self.ranks.index(dist.get_rank()) if len(self.ranks) > 1 else 0

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: the connection stays here."""
        return self.__dict__ | {"link": None, "shakes": Handshakes(), "dropped": None, "trace": []}

    def run(
        self, experts: nn.Module, x: Tensor, weights: Any, ids: Any, weight_on_input: bool = False,
        meanwhile: Callable[[], Any] | None = None,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """y [T, H], and what `meanwhile` returned, called while the first rows travel.

        experts: (x [R, H], topk_weights [R, K], topk_ids int32 [R, K], weight_on_input) -> [R, H] for any R; ids are
        places on this rank, -1 for an expert of another. Under torch.compile this is a graph break.
        """
        if torch.compiler.is_compiling():
            return self._run_uncompiled(experts, x, weights, ids, weight_on_input, meanwhile)
        return self._run(experts, x, weights, ids, weight_on_input, meanwhile)

    def _run(
        self, experts: nn.Module, x: Tensor, weights: Tensor, ids: Tensor, weight_on_input: bool,
        meanwhile: Callable[[], Any] | None,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        link = self._connected(x)
        before = Counter(link.sent)
        with link.turn("dispatch", self._report):
            x, weights, call = self._begun(x, weights, ids, any(p.requires_grad for p in experts.parameters()))
            chunks = self._resolve(call, x, ids)
            hops = [self._hop(call) for _ in range(chunks)]
            try:
                y, extra = self._steps(experts, hops, (x, weights, ids, weight_on_input), meanwhile)
            except BaseException:
                for hop in hops:
                    hop.forget()
                raise
        now = link.sent
        self.bytes_sent = {
            name: sum(now[key] - before[key] for key in now if key[1] == name and not key[0].endswith("backward"))
            for name in LINKS
        }
        return y, extra

    _run_uncompiled = torch._disable_dynamo(_run)  # type: ignore[attr-defined]  # imports the compiler when called

    def go(self, x: Tensor, weights: Tensor, ids: Tensor) -> tuple[Any, Tensor, Tensor, Tensor]:
        """The way out alone, for who computes the experts himself: (hop for `come_back`, rows [R, H], weights [R, K],
        ids int32 [R, K], places on this rank or -1)."""
        with self._connected(x).turn("dispatch", self._report):
            x, weights, call = self._begun(x, weights, ids, True)
            self._resolve(call, x, ids)
            hop = self._hop(call)
            hop.dispatch(x, weights, ids)
            self.trace.append(("dispatch", 0))
            rows, w, found = hop.arrived()
            assert w is not None and found is not None
            return hop, rows, w, self._local(found)

    def come_back(self, hop: Any, rows: Tensor) -> Tensor:
        """The way back of `go`: y [T, H]."""
        assert self.link is not None
        with self.link.turn("combine", self._report):
            hop.combine(rows)
            y: Tensor = hop.combined()
            return y

    def _connected(self, x: Any) -> Link:
        device = x.device if isinstance(x, Tensor) else torch.device("cpu")
        if self.link is not None:
            self.link.say()
        if self.link is None or self.link.broken or self.link.device.type != device.type:
            self.link = connect(self.ranks, self.timeout, self.ranks_per_node, self.lane, device)
        self.trace = []
        return self.link

    def _begun(self, x: Tensor, weights: Tensor, ids: Tensor, needs: bool) -> tuple[Tensor, Tensor, Call]:
        """After the checks: x, the weights as they travel, and the call."""
        x, weights = self._checked(x, weights, ids)
        self.seen = (x.shape[0], x.shape[1], x.dtype, ids.shape[1])
        return x, weights, self._call(x, weights, ids, needs)

    def _report(self, error: Exception) -> None:
        """This rank failed: it says so in the exchange that the others are in or will come to."""
        assert self.link is not None
        phase = "combine" if self.trace else "dispatch"
        if self.capacity_factor is not None and phase in self.shakes.sizes:
            self.shakes.send_failure(self.link, phase)
        else:
            self.link.report(error, phase)

    def _checked(self, x: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        name = "ExpertParallel"
        check.tensor(name, "x", x, check.FLOATS, [("T", None), ("H", None)])
        T = x.shape[0]
        check.tensor(name, "topk_ids", ids, check.IDS, [("T", T), ("K", None)], x.device)
        check.count(name, "K, the second size of topk_ids,", ids.shape[1], 1)
        check.tensor(name, "topk_weights", weights, check.FLOATS, [("T", T), ("K", ids.shape[1])], x.device)
        if self.owner.device != x.device:
            self.owner, self.place = self.owner.to(x.device), self.place.to(x.device)
        return x, weights.to(acc_dtype(x.dtype))

    def _call(self, x: Tensor, weights: Tensor, ids: Tensor, needs: bool) -> Call:
        assert self.link is not None
        grad = torch.is_grad_enabled()
        bits = (INPUTS * (x.requires_grad or weights.requires_grad) + PARAMETERS * needs) if grad else 0
        wire = x.dtype if self.dispatch_dtype is None else self.dispatch_dtype
        fields: dict[str, header.Value] = {
            "layer": self.layout,
            "transport": self._transport_field(),
            "experts": self.owner.shape[0], "hidden": x.shape[1], "top_k": 0 if self.any_top_k else ids.shape[1],
            "dtype": str(x.dtype),
            "wire": str(wire), "capacity": self._capacity(x, ids), "grad_mode": grad,
        }  # fmt: skip
        return Call(self.link, fields, wire, bits, x.shape[0], ids.shape[1])

    def _transport_field(self) -> str:
        return f"{self.transport} {self.capacity_factor} {self.ranks_per_node} {self.chunks}"

    def _capacity(self, x: Tensor, ids: Tensor) -> int:
        if self.capacity_factor is None:
            return 0
        return Capacity(self.capacity_factor).slots(x.shape[0], ids.shape[1], self.owner.shape[0])

    def _resolve(self, call: Call, x: Tensor, ids: Tensor) -> int:
        """Chooses transport and chunks in the first forward, by the mean of the ranks' tokens; returns the chunks."""
        if self.transport == "auto" and self.capacity_factor is None:
            own: dict[str, header.Value] = {"tokens": x.shape[0], "width": ids.shape[1], "phase": "plan"}
            records = call.link.agree(call.fields | own, [0] * call.link.size, "plan")
            tokens = math.ceil(sum(header.field(record, "tokens") for record in records) / len(records))
            width = max(header.field(record, "width") for record in records)
            self.chosen = self.planned((tokens, x.shape[1], x.dtype, width))
            self.transport, self.chunks = self.chosen.transport, self.chunks or self.chosen.chunks
            call.fields["transport"] = self._transport_field()
        return self.chunks or 1

    @property
    def plan(self) -> Plan | None:
        """What "auto" went by; with a transport by name, what the planner says of this rank's last forward."""
        if self.chosen is not None or self.seen is None:
            return self.chosen
        return self.planned(self.seen)

    def planned(self, of: tuple[int, int, torch.dtype, int]) -> Plan:
        """What the planner says of a layer with so many tokens a rank, hidden size, dtype and experts a token."""
        tokens, hidden, dtype, top_k = of
        E = self.owner.shape[0]
        return plan(
            tokens, hidden, self.intermediate_size or hidden, E, min(top_k, E), len(self.ranks),
            gpus_per_node=self.ranks_per_node, dispatch_dtype=self.dispatch_dtype or dtype, combine_dtype=dtype,
            capacity_factor=self.capacity_factor,
            placement=None if bool((self.owner < 0).any()) else self.owner.cpu(),
        )  # fmt: skip

    def _hop(self, call: Call) -> Hop | TwoLevel | Gathered | Slotted:
        if self.capacity_factor is not None:
            return Slotted(call, self.owner, self.place, int(call.fields["capacity"]), self.shakes)
        if self.transport == "allgather":
            return Gathered(call)
        if self.transport == "two_level":
            return TwoLevel(call, self.owner, self.position % self.ranks_per_node, self.ranks_per_node)
        return Hop(call, self.owner, self.transport == "rank_dedup")

    def _steps(
        self, experts: nn.Module, hops: Sequence[Any], inputs: tuple[Tensor, Tensor, Tensor, bool],
        meanwhile: Callable[[], Any] | None,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        x, weights, ids, on_input = inputs
        chunks, extra = len(hops), None
        parts = [torch.tensor_split(t, chunks) if chunks > 1 else (t,) for t in (x, weights, ids)]
        for step, i in schedule(chunks):
            if step == "dispatch":
                hops[i].dispatch(*(part[i] for part in parts))
                self.trace.append((step, i))
                if i == 0 and meanwhile is not None:
                    extra = meanwhile()
            elif step == "experts":
                rows, w, found = hops[i].arrived()
                assert w is not None and found is not None
                rows = experts(rows, w, self._local(found), on_input)
                self.trace.append((step, i))
            else:
                hops[i].combine(rows)
                self.trace.append((step, i))
        y = [hop.combined() for hop in hops]
        if isinstance(hops[0], Slotted):
            self.dropped = hops[0].dropped
        return (torch.cat(y) if chunks > 1 else y[0]), extra

    def _local(self, ids: Tensor) -> Tensor:
        """Global ids -> places on this rank; -1 for experts of others."""
        here = look_up(self.owner, ids) == self.position
        return torch.where(here, look_up(self.place, ids), -1).int()

    def raise_if_failed(self) -> None:
        """On a GPU: raises for rows that never came, and with a static capacity for a rank that failed."""
        if self.link is not None:
            self.shakes.raise_if_flagged(self.link, "dispatch")
            self.link.say()


def places(owner: Tensor, world_size: int) -> Tensor:
    """int64 [E]: the index of an expert among those of its rank, in ascending order; -1 for one that is nowhere."""
    found = torch.full_like(owner, -1)
    for rank in range(world_size):
        mine = (owner == rank).nonzero()[:, 0]
        found[mine] = torch.arange(len(mine))
    return found
