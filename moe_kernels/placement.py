# SPDX-License-Identifier: Apache-2.0
"""Which rank holds which experts: balanced by their load, with copies of the busy ones, and moved while a model lives.

    counts = monitor.history(layer, "counts").sum(0)
    new = balance(counts, num_slots=288, world_size=32, num_nodes=4, num_groups=8)
    apply_placement(parameters, old, new, optimizer=optimizer)        # on every rank
    slots = new.slots_of(topk_ids, source=rank)                       # what the layer then routes to

Letters: E experts, R slots (one copy of an expert's weights each), W ranks of R/W slots. The method is the one
published for DeepSeek-V3: pack whole groups of experts to nodes, copy the expert of the highest load a copy, pack the
copies to ranks, heaviest first into the emptiest rank that has room.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import check


@dataclass(frozen=True, eq=False)
class Placement:
    """experts int64 [R]: the expert in every slot; rank r holds the slots r*R/W .. (r+1)*R/W - 1. Every expert of
    0 .. E-1 has a slot.

    Errors: TypeError, ValueError.
    """

    experts: Tensor
    world_size: int

    def __post_init__(self) -> None:
        check.count("Placement", "world_size", self.world_size, 1)
        check.tensor("Placement", "experts", self.experts, check.IDS, [("R", None)])
        object.__setattr__(self, "experts", self.experts.long().cpu())
        R = len(self.experts)
        if R == 0 or R % self.world_size:
            check.refuse("Placement", "experts", f"a multiple of world_size={self.world_size} slots", str(R))
        check.values("Placement", "experts", self.experts, 0, R, "an expert")
        if bool((self.copies == 0).any()):
            missing = (self.copies == 0).nonzero().flatten().tolist()
            check.refuse("Placement", "experts", "every expert of 0..E-1", f"none of {missing[:8]}")

    @property
    def num_experts(self) -> int:
        return int(self.experts.max()) + 1

    @property
    def slots_a_rank(self) -> int:
        return len(self.experts) // self.world_size

    @property
    def copies(self) -> Tensor:
        """int64 [E]."""
        return torch.bincount(self.experts)

    def of_rank(self, rank: int) -> Tensor:
        """int64 [R/W]: the experts of a rank, in the order of its slots."""
        return self.experts.view(self.world_size, -1)[rank]

    def slot_load(self, load: Tensor | Sequence[float]) -> Tensor:
        """float64 [R]: load [E] shared evenly by the copies."""
        return (torch.as_tensor(load).double().cpu() / self.copies)[self.experts]

    def rank_load(self, load: Tensor | Sequence[float]) -> Tensor:
        """float64 [W]."""
        return self.slot_load(load).view(self.world_size, -1).sum(1)

    def slots_of(self, topk_ids: Tensor, *, source: int = 0) -> Tensor:
        """Slots in place of experts: like topk_ids [T, K]; the tokens of a rank take the copies in turn.

        source: the rank of the tokens, so that ranks begin with different copies. Absent ids become -1. Differentiable
        code is not touched: the weights stay as they are.
        """
        check.tensor("slots_of", "topk_ids", topk_ids, check.IDS, [("T", None), ("K", None)])
        first, table = self._table(topk_ids.device)
        here = (topk_ids >= 0) & (topk_ids < self.num_experts)
        ids = topk_ids.long().where(here, 0)
        turn = torch.arange(len(ids), device=ids.device)[:, None] + source
        copies = self.copies.to(ids.device)[ids]
        return table[first[ids] + turn % copies].where(here, -1).to(topk_ids.dtype)

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """first [E]: where an expert's slots begin in table [R]."""
        first = self.copies.cumsum(0) - self.copies
        return first.to(device), torch.argsort(self.experts, stable=True).to(device)


def balance(load: Tensor | Sequence[float], *, num_slots: int, world_size: int, num_nodes: int = 1,
            num_groups: int = 1) -> Placement:  # fmt: skip
    """Places E experts into num_slots slots of equal count a rank, so that the fullest rank has little to do.

    Args:
        load: [E] counts or shares of the experts, such as a Monitor's.
        num_slots: R, at least E and a multiple of world_size; R - E are copies.
        world_size: W, a multiple of num_nodes.
        num_nodes: N.
        num_groups: of consecutive experts. A multiple of num_nodes keeps every group, with its copies, on one node,
            for routing that is confined to groups; any other number places each expert anywhere.
    Returns:
        Placement. Its fullest rank has never more than the same packing gives without copies.

    Errors: ValueError, TypeError.
    """
    counts = torch.as_tensor(load).double().cpu()
    if counts.dim() != 1 or not len(counts) or not bool(counts.isfinite().all()) or bool((counts < 0).any()):
        check.refuse("balance", "load", "[E] finite counts, none negative", check.got(torch.as_tensor(load)))
    E = len(counts)
    for name, value in (("world_size", world_size), ("num_nodes", num_nodes), ("num_groups", num_groups)):
        check.count("balance", name, value, 1)
    check.count("balance", "num_slots", num_slots, E)
    if num_slots % world_size or world_size % num_nodes:
        want = "a multiple of world_size, and that of num_nodes"
        check.refuse("balance", "num_slots", want, f"{num_slots} slots, {world_size} ranks, {num_nodes} nodes")
    if E % num_groups:
        check.refuse("balance", "num_groups", f"a divisor of E={E}", str(num_groups))
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    groups = counts.view(num_groups, -1)
    nodes = _pack(groups.sum(1).tolist(), num_nodes, num_groups // num_nodes)
    slots: list[int] = []
    for node in nodes:
        experts = torch.arange(E).view(num_groups, -1)[node].flatten().tolist()
        slots += _fill(experts, counts.tolist(), num_slots // num_nodes, world_size // num_nodes)
    return Placement(torch.tensor(slots), world_size)


def _pack(loads: Sequence[float], packs: int, room: int) -> list[list[int]]:
    """Items into packs of at most `room`: the heaviest first, into the emptiest pack with room."""
    if room == 1 and len(loads) == packs:
        return [[i] for i in range(packs)]
    filled: list[list[int]] = [[] for _ in range(packs)]
    total = [0.0] * packs
    for item in sorted(range(len(loads)), key=lambda i: -loads[i]):
        pack = min((p for p in range(packs) if len(filled[p]) < room), key=lambda p: total[p])
        filled[pack].append(item)
        total[pack] += loads[item]
    return filled


def _fill(experts: list[int], counts: Sequence[float], slots: int, ranks: int) -> list[int]:
    """The experts of one node into its slots, rank by rank: with copies, unless that leaves a fuller rank than none."""
    room, even = slots // ranks, -(-len(experts) // ranks)
    copies = dict.fromkeys(experts, 1)
    items = list(experts)
    while len(items) < slots:
        busiest = max(experts, key=lambda e: counts[e] / copies[e])
        copies[busiest] += 1
        items.append(busiest)
    copied = [[items[i] for i in pack] for pack in _pack([counts[e] / copies[e] for e in items], ranks, room)]
    single = [[experts[i] for i in pack] for pack in _pack([counts[e] for e in experts], ranks, even)]

    fullest = max(sum(counts[e] / copies[e] for e in pack) for pack in copied)
    if fullest > max(sum(counts[e] for e in pack) for pack in single):
        # copies beside their own expert change nothing; in a rank without experts they take from the heaviest
        heaviest = max(experts, key=lambda e: counts[e])
        copied = [pack + [pack[0] if pack else heaviest] * (room - len(pack)) for pack in single]
    return [e for pack in copied for e in pack]


# ---- moving


def apply_placement(tensors: Iterable[Tensor], old: Placement, new: Placement, *, group: Any = None,
                    optimizer: torch.optim.Optimizer | None = None) -> int:  # fmt: skip
    """Moves experts between ranks until every rank holds what `new` says. Every rank of the group calls it.

    Each tensor keeps its identity, so optimizers and graphs that hold it stay valid. Rows travel as bytes; all ranks
    first agree that they mean the same, and either all move or all raise.

    Args:
        tensors: stacked expert tensors [R/W, ...] of this rank, such as w13, w2 and their biases, in the same order
            everywhere. Gradients move along. The router is none of them: it goes on to choose experts, not slots.
        old, new: placements of the same experts on the same ranks and number of slots.
        group: process group of W ranks; None: all.
        optimizer: its state for these parameters moves along, where it has the parameter's first size.
    Returns:
        Bytes that this rank sent to others.

    Errors: TypeError, ValueError for what is wrong here; RuntimeError for what is wrong on another rank.
    """
    W = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
    rank = dist.get_rank(group) if W > 1 else 0
    rows: list[Tensor] = []
    problem: Exception | None = None
    try:
        rows = _rows(tensors, old, new, W, optimizer)
    except (TypeError, ValueError) as error:
        problem = error
    _agree(problem, _signature(old, new, rows) if problem is None else 0, W, group)
    sources, targets = routes(old, new, rank), routes(old, new)
    return sum(_move(t, sources, targets, rank, W, group) for t in rows)


def routes(old: Placement, new: Placement, rank: int | None = None) -> list[int]:
    """For every slot of `new` (or of one rank of it) the slot of `old` that it is filled from: the same slot, else
    one of the same rank, else the expert's copies in turn."""
    where: dict[int, list[int]] = {}
    for slot, expert in enumerate(old.experts.tolist()):
        where.setdefault(expert, []).append(slot)
    n, turn, found = new.slots_a_rank, dict.fromkeys(where, 0), []
    for slot, expert in enumerate(new.experts.tolist()):
        near = [s for s in where[expert] if s // n == slot // n]
        if slot in near:
            found.append(slot)
        elif near:
            found.append(near[0])
        else:
            found.append(where[expert][turn[expert] % len(where[expert])])
            turn[expert] += 1
    return found if rank is None else found[rank * n : (rank + 1) * n]


def _rows(tensors: Iterable[Tensor], old: Placement, new: Placement, W: int,
          optimizer: torch.optim.Optimizer | None) -> list[Tensor]:  # fmt: skip
    """Everything that moves, each with a first size of R/W."""
    op = "apply_placement"
    for name, p in (("old", old), ("new", new)):
        if not isinstance(p, Placement):
            check.refuse(op, name, "a Placement", check.got(p), TypeError)
        if p.world_size != W:
            check.refuse(op, name, f"of the group's {W} ranks", str(p.world_size))
    if old.num_experts != new.num_experts or len(old.experts) != len(new.experts):
        want = f"of old's E={old.num_experts} experts in R={len(old.experts)} slots"
        check.refuse(op, "new", want, f"E={new.num_experts}, R={len(new.experts)}")
    n = old.slots_a_rank
    found: list[Tensor] = []
    for i, t in enumerate(tensors):
        if not isinstance(t, Tensor) or not t.dim() or t.shape[0] != n:
            check.refuse(op, f"tensors[{i}]", f"a tensor [R/W={n}, ...]", check.got(t))
        found.append(t.detach())
        if t.grad is not None:
            found.append(t.grad.detach())
        state = optimizer.state.get(t, {}) if optimizer is not None else {}
        found += [v.detach() for _, v in sorted(state.items())
                  if isinstance(v, Tensor) and v.dim() and v.shape[0] == n]  # fmt: skip
    if not found:
        check.refuse(op, "tensors", f"at least one tensor [R/W={n}, ...]", "none")
    return found


def _signature(old: Placement, new: Placement, rows: list[Tensor]) -> int:
    what = (old.experts.tolist(), new.experts.tolist(), [(str(t.dtype), list(t.shape)) for t in rows])
    return zlib.crc32(repr(what).encode())


def _agree(problem: Exception | None, signature: int, W: int, group: Any) -> None:
    """Raises on all ranks or on none, before anything moves."""
    if W > 1:
        mine = torch.tensor([problem is not None, signature], device=_device(group))
        every = torch.empty(W * 2, dtype=torch.int64, device=mine.device)
        dist.all_gather_into_tensor(every, mine.long(), group=group)
        failed, said = every.view(W, 2).T.tolist()
        if problem is None and any(failed):
            raise RuntimeError(f"apply_placement: rank {failed.index(1)} of the group refused its arguments")
        if problem is None and len(set(said)) > 1:
            usual = max(set(said), key=lambda s: (said.count(s), -said.index(s)))
            other = next(r for r, s in enumerate(said) if s != usual)
            raise RuntimeError(f"apply_placement: rank {other} of the group has other placements, shapes or dtypes")
    if problem is not None:
        raise problem


def _device(group: Any) -> torch.device:
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


def _move(t: Tensor, sources: list[int], targets: list[int], rank: int, W: int, group: Any) -> int:
    """Fills t [R/W, ...] in place; sources: of this rank's slots, targets: of all slots. Returns the bytes sent."""
    n = len(sources)
    data = t.contiguous().view(n, t[0].numel()).view(torch.uint8)
    # rows go in the order of the slots that they fill, first by receiving rank
    out = [[s % n for s in targets[p * n : (p + 1) * n] if s // n == rank] for p in range(W)]
    came = sorted(range(n), key=lambda slot: (sources[slot] // n, slot))
    send = data[torch.tensor([s for rows in out for s in rows], dtype=torch.int64, device=t.device)]
    receive = send
    if W > 1:
        receive = torch.empty_like(data)
        counts = [sum(s // n == p for s in sources) for p in range(W)]
        dist.all_to_all_single(receive, send, counts, [len(rows) for rows in out], group=group)
    filled = torch.empty_like(data)
    filled[torch.tensor(came, device=t.device)] = receive
    t.copy_(filled.view(t.dtype).view(t.shape))
    return (len(send) - len(out[rank])) * data.shape[1]
