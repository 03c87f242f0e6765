# SPDX-License-Identifier: Apache-2.0
"""Rows and bytes that expert parallelism moves for a given choice of experts: exactly, from every rank to every other.

Letters: W ranks, g ranks a node, N nodes, T tokens of a rank, H hidden, K experts a token, E experts. The transports:

    flat        a row for every slot, straight to the rank of its expert
    rank_dedup  a row for every (token, rank): a token goes once to a rank, however many of its experts live there
    two_level   a row for every (token, node) to the rank of the same place on that node ("rail"), and from there one
                for every (token, rank) inside the node ("node")
    allgather   every token to every rank, filled up to the tokens of the fullest rank
    static      with a capacity: so many places for every (rank, expert) and a status row for every rank

The combine moves the same rows the other way. Which rank sends what is decided here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import check

TRANSPORTS = ("flat", "rank_dedup", "two_level", "allgather")
STATIC = "static"
LINKS = ("nic", "nvlink")
"""between nodes, and inside one"""
SCALE_BLOCK = 128
"""elements of a row that share a float32 scale where the row is float8"""


def row_bytes(hidden: int, dtype: torch.dtype, metadata: int = 0) -> int:
    """Bytes of one row on the wire: H elements, the scales of a float8 row, and `metadata`."""
    check.count("row_bytes", "hidden", hidden, 1)
    check.count("row_bytes", "metadata", metadata, 0)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        check.refuse("row_bytes", "dtype", "a floating torch.dtype", check.got(dtype), TypeError)
    scales = 4 * math.ceil(hidden / SCALE_BLOCK) if dtype.itemsize == 1 else 0
    return hidden * dtype.itemsize + scales + metadata


def metadata_bytes(transport: str, top_k: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes that a dispatched row carries beside the hidden state: int32 ids and weights (float64 for a float64 layer,
    else float32), K of both, or one where a row is for one expert (flat, static). A combined row carries nothing."""
    check.choice("metadata_bytes", "transport", transport, (*TRANSPORTS, STATIC))
    return (1 if transport in ("flat", STATIC) else top_k) * (4 + (8 if dtype == torch.float64 else 4))


def owners(num_experts: int, world_size: int) -> Tensor:
    """int64 [E]: the rank of every expert. Contiguous; the first E % W ranks hold one more."""
    check.count("owners", "num_experts", num_experts, 1)
    check.count("owners", "world_size", world_size, 1)
    held = torch.full((world_size,), num_experts // world_size)
    held[: num_experts % world_size] += 1
    return torch.repeat_interleave(torch.arange(world_size), held)


def static_rows(tokens: int, top_k: int, num_experts: int, world_size: int, capacity_factor: float) -> int:
    """Rows from every rank to every other with a static capacity: ceil(T * K / E * factor) places, 1 to T, for each of
    its E / W experts, and one row more that says whether the sender failed."""
    for name, value in (("tokens", tokens), ("top_k", top_k), ("num_experts", num_experts), ("world_size", world_size)):
        check.count("static_rows", name, value, 0 if name == "tokens" else 1)
    if not isinstance(capacity_factor, (int, float)) or not 0 < capacity_factor < 1e6:
        check.refuse("static_rows", "capacity_factor", "a number above 0", check.got(capacity_factor))
    if num_experts % world_size:
        check.refuse("static_rows", "num_experts", f"a multiple of the {world_size} ranks", str(num_experts))
    places = math.ceil(tokens * top_k / num_experts * capacity_factor)
    return num_experts // world_size * min(max(places, 1), max(tokens, 1)) + 1


@dataclass(frozen=True)
class Traffic:
    """What one transport moves in a dispatch. The combine moves `rows` transposed.

    rows: phase -> int64 [W, W], rows from rank to rank, the diagonal what a rank keeps. One phase, named as the
    transport; "rail" and "node" for two_level. row_bytes: of a dispatched row. combine_row_bytes: of one coming back.
    """

    rows: dict[str, Tensor]
    row_bytes: int
    combine_row_bytes: int
    ranks_per_node: int

    def sent(self, rank: int) -> int:
        """Bytes that a rank sends to others in the dispatch."""
        return sum(int(m[rank].sum() - m[rank, rank]) for m in self.rows.values()) * self.row_bytes

    def returned(self, rank: int) -> int:
        """Bytes that a rank sends to others in the combine."""
        return sum(int(m[:, rank].sum() - m[rank, rank]) for m in self.rows.values()) * self.combine_row_bytes

    def bytes_sent(self, rank: int) -> dict[str, int]:
        """Bytes that a rank sends to others in dispatch and combine, a class of link."""
        return {
            link: int(rows[rank].sum()) * self.row_bytes + int(rows[:, rank].sum()) * self.combine_row_bytes
            for link, rows in self.link_rows().items()
        }

    def link_rows(self) -> dict[str, Tensor]:
        """int64 [W, W] a class of link: rows of the dispatch from rank to rank, what stays on a rank left out."""
        total = torch.stack(list(self.rows.values())).sum(0)
        node = torch.arange(len(total)) // self.ranks_per_node
        inside = node[:, None] == node[None, :]
        return {
            "nic": total.where(~inside, torch.zeros_like(total)),
            "nvlink": total.where(inside & ~torch.eye(len(total), dtype=torch.bool), torch.zeros_like(total)),
        }

    def link_bytes(self) -> dict[str, int]:
        """Bytes of the dispatch a class of link, over all ranks."""
        return {link: int(rows.sum()) * self.row_bytes for link, rows in self.link_rows().items()}


def exact_traffic(
    topk_ids: Sequence[Tensor] | Tensor, num_experts: int, *, ranks_per_node: int, hidden: int,
    dispatch_dtype: torch.dtype = torch.bfloat16, combine_dtype: torch.dtype = torch.bfloat16,
    placement: Tensor | None = None, metadata: dict[str, int] | None = None, capacity_factor: float | None = None,
) -> dict[str, Traffic]:  # fmt: skip
    """Rows and bytes of every transport for what each rank's tokens chose.

    Args:
        topk_ids: of every rank in order, int32 or int64 [T, K]; T may differ between ranks. Ids outside [0, E) are
            absent: they move nothing, except with allgather.
        num_experts: E.
        ranks_per_node: g. A W that it does not divide has a smaller last node, and no two_level.
        hidden: H.
        dispatch_dtype, combine_dtype: of the rows that go, and that come back (the layer's own).
        placement: int [E], the rank of every expert; `owners(E, W)` by default.
        metadata: transport -> bytes beside a dispatched row; `metadata_bytes` by default.
        capacity_factor: with it "static" too, of `static_rows`. All ranks need the same T and as many experts then.
    Returns:
        transport -> Traffic.

    Errors: TypeError, ValueError.
    """
    op = "exact_traffic"
    check.count(op, "num_experts", num_experts, 1)
    check.count(op, "ranks_per_node", ranks_per_node, 1)
    ids = list(topk_ids)
    if not ids:
        check.refuse(op, "topk_ids", "of at least one rank", "none")
    for rank, t in enumerate(ids):
        check.tensor(op, f"topk_ids[{rank}]", t, check.IDS, [("T", None), ("K", ids[0].shape[-1] if rank else None)])
    W, K = len(ids), ids[0].shape[1]
    owner = owners(num_experts, W) if placement is None else placement
    check.tensor(op, "placement", owner, check.IDS, [("E", num_experts)])
    check.values(op, "placement", owner, 0, W, "a rank")
    hit = _rank_slots(ids, owner.long().cpu(), W)
    tokens = torch.tensor([max(len(t) for t in ids)])  # a collective of one size everywhere
    moved = {"flat": {"flat": _sum(hit)}, "rank_dedup": {"rank_dedup": _sum([h.clamp(max=1) for h in hit])}}
    if W % ranks_per_node == 0 or ranks_per_node > W:
        moved["two_level"] = _two_level([h > 0 for h in hit], min(ranks_per_node, W))
    moved["allgather"] = {"allgather": tokens.expand(W, W).contiguous()}
    if capacity_factor is not None:
        if len({len(t) for t in ids}) > 1:
            check.refuse(op, "topk_ids", "of one T with a capacity_factor", str([len(t) for t in ids]))
        if len(set(torch.bincount(owner.long().cpu(), minlength=W).tolist())) > 1:
            check.refuse(op, "placement", "as many experts on every rank with a capacity_factor", str(owner.tolist()))
        each = static_rows(len(ids[0]), K, num_experts, W, capacity_factor)
        moved[STATIC] = {STATIC: torch.full((W, W), each)}
    beside = {name: metadata_bytes(name, K, combine_dtype) for name in (*TRANSPORTS, STATIC)} | (metadata or {})
    back = row_bytes(hidden, combine_dtype)
    return {
        name: Traffic(rows, row_bytes(hidden, dispatch_dtype, beside[name]), back, ranks_per_node)
        for name, rows in moved.items()
    }


def _rank_slots(ids: list[Tensor], owner: Tensor, W: int) -> list[Tensor]:
    """int64 [T, W] of every rank: slots of a token whose expert lives on each rank."""
    E, found = len(owner), []
    to = torch.cat([owner, torch.tensor([W])])  # absent ids to a rank that is none
    for t in ids:
        flat = t.long().cpu()
        flat = to[flat.where((flat >= 0) & (flat < E), E)]
        found.append(torch.zeros(len(t), W + 1, dtype=torch.int64).scatter_add_(1, flat, torch.ones_like(flat))[:, :W])
    return found


def _sum(hit: list[Tensor]) -> Tensor:
    return torch.stack([h.sum(0) for h in hit])


def _two_level(hit: list[Tensor], g: int) -> dict[str, Tensor]:
    """rail [W, W], node [W, W] of hit bool [T, W] of every rank."""
    W = len(hit)
    rail, node = torch.zeros(W, W, dtype=torch.int64), torch.zeros(W, W, dtype=torch.int64)
    for source, h in enumerate(hit):
        by_node = h.view(len(h), W // g, g)
        forwarders = torch.arange(W // g) * g + source % g
        rail[source, forwarders] = by_node.any(2).sum(0)
        node.view(W, W // g, g)[forwarders, torch.arange(W // g)] += by_node.sum(0)
    return {"rail": rail, "node": node}
