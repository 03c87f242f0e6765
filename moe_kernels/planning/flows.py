# SPDX-License-Identifier: Apache-2.0
"""How many rows each transport puts on each class of link: expected for a load, or counted for given ids.

Every figure is of an average rank, with the factor by which the busiest one is above it. Letters: traffic.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import check
from . import chances
from .traffic import LINKS, exact_traffic, owners

Ids = Sequence[Tensor] | Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes of a plan. g is at most W; the last node may be smaller."""

    T: int
    E: int
    K: int
    W: int
    g: int

    @property
    def node(self) -> Tensor:
        """int64 [W]: the node of every rank."""
        return torch.arange(self.W) // self.g

    @property
    def N(self) -> int:
        return math.ceil(self.W / self.g)


@dataclass(frozen=True)
class Flow:
    """Rows that an average rank sends in a dispatch, a class of link, and the busiest rank's over the average."""

    rows: dict[str, float]
    skew: dict[str, float]


@dataclass(frozen=True)
class Received:
    """Rows that the fullest rank receives in a dispatch: expected, in 99 of 100 steps, ever."""

    mean: float
    p99: float
    worst: int


@dataclass(frozen=True)
class Flows:
    """transports, received: by transport. slots float64 [W], load float64 [E]: expected slots of a token on a rank, and
    of an expert."""

    transports: dict[str, Flow]
    received: dict[str, Received]
    slots: Tensor
    load: Tensor

    @property
    def imbalance(self) -> float:
        """Slots of the fullest rank over the mean."""
        return float(self.slots.max() / self.slots.mean()) if float(self.slots.sum()) else 1.0


@dataclass(frozen=True)
class _Reach:
    """Of one token: hit [W] and node_hit [N] chances to need a rank and a node, slots [W] and their variance on a rank;
    held int [W]: experts of a rank."""

    hit: Tensor
    node_hit: Tensor
    slots: Tensor
    variance: Tensor
    held: Tensor


def flows(shape: Shape, *, load: Tensor | Sequence[float] | None = None, nodes_per_token: int | None = None,
          topk_ids: Ids | None = None, placement: Tensor | None = None) -> Flows:  # fmt: skip
    """The arguments of `plan`.

    Errors: TypeError, ValueError.
    """
    owner = owners(shape.E, shape.W) if placement is None else placement
    check.tensor("plan", "placement", owner, check.IDS, [("E", shape.E)])
    check.values("plan", "placement", owner, 0, shape.W, "a rank")
    owner = owner.long().cpu()
    given = {"topk_ids": topk_ids, "load": load, "nodes_per_token": nodes_per_token}
    first, *others = [name for name, value in given.items() if value is not None] or [""]
    if others:
        check.refuse("plan", others[0], f"None where {first} is given", "both")
    if topk_ids is not None:
        return _counted(shape, topk_ids, owner)
    if nodes_per_token is not None:
        if placement is not None:
            check.refuse("plan", "placement", "None where nodes_per_token is given", "both")
        return _expected(shape, _confined(shape, nodes_per_token))
    held = torch.bincount(owner, minlength=shape.W)
    node_held = torch.bincount(shape.node[owner], minlength=shape.N)
    if load is None:
        hit, node_hit = (chances.hit_uniform(sizes, shape.E, shape.K) for sizes in (held, node_held))
        variance = chances.slots_variance(held, shape.E, shape.K)
        return _expected(shape, _Reach(hit, node_hit, held.double() * (shape.K / shape.E), variance, held))
    share = _shares(load, shape)
    hit, node_hit = chances.hits_of_load(share, shape.K, [(owner, shape.W), (shape.node[owner], shape.N)])
    slots, variance = (torch.zeros(shape.W, dtype=torch.float64).scatter_add_(0, owner, each)
                       for each in (share, share * (1 - share)))  # fmt: skip
    return _expected(shape, _Reach(hit, node_hit, slots, variance, held), share)


def _confined(shape: Shape, nodes_per_token: int) -> _Reach:
    """K experts of M nodes; any M nodes alike."""
    check.count("plan", "nodes_per_token", nodes_per_token, 1)
    E, K, W, N, M = shape.E, shape.K, shape.W, shape.N, min(nodes_per_token, shape.N)
    if E % W or W % shape.g:
        want = "None unless world_size divides E and gpus_per_node divides world_size"
        check.refuse("plan", "nodes_per_token", want, f"{nodes_per_token} with E={E}, world_size={W}")
    pool = M * (E // N)
    if pool < K:
        check.refuse("plan", "nodes_per_token", f"enough for K={K} experts", f"{M} nodes of {E // N} experts")
    held = torch.full((W,), E // W)
    here, mean = M / N, K * held.double() / pool
    variance = here * (chances.slots_variance(held, pool, K) + mean**2) - (here * mean) ** 2
    node_hit = here * chances.hit_uniform(torch.full((N,), E // N), pool, K)
    return _Reach(here * chances.hit_uniform(held, pool, K), node_hit, here * mean, variance, held)


def _shares(load: Tensor | Sequence[float], shape: Shape) -> Tensor:
    """float64 [E] that sums to K."""
    counts = torch.as_tensor(load).double().cpu()
    if counts.shape != (shape.E,):
        check.refuse("plan", "load", f"[E={shape.E}] counts or shares", str(list(counts.shape)))
    if not bool(counts.isfinite().all()) or bool((counts < 0).any()) or float(counts.sum()) <= 0:
        check.refuse(
            "plan", "load", "finite, not negative, and not all 0", f"values from {counts.min()} to {counts.max()}"
        )
    shares = counts * (shape.K / counts.sum())
    if float(shares.max()) > 1 + 1e-6:
        want = f"at most 1/K={1 / shape.K:.3g} of the slots for an expert, as a token takes it once"
        check.refuse("plan", "load", want, f"{float(shares.max()) / shape.K:.3g}")
    return shares.clamp(max=1)


def _expected(shape: Shape, reach: _Reach, load: Tensor | None = None) -> Flows:
    T, W, N, g = shape.T, shape.W, shape.N, shape.g
    node = shape.node

    def straight(each: Tensor) -> Flow:
        """Rows that go from their source right to each rank, `each` [W] a token."""
        by_node = torch.zeros(N, dtype=torch.float64).scatter_add_(0, node, each)
        inside = float(by_node[node].mean())
        rows = {"nic": T * (float(each.sum()) - inside), "nvlink": T * (inside - float(each.mean()))}
        return Flow(rows, dict.fromkeys(LINKS, _skew(each)))

    transports = {"flat": straight(reach.slots), "rank_dedup": straight(reach.hit)}
    if W % g == 0:
        reached = float(reach.node_hit.sum())
        rows = {"nic": T * reached * (N - 1) / N, "nvlink": T * float(reach.hit.sum()) * (g - 1) / g}
        transports["two_level"] = Flow(rows, {"nic": _skew(reach.node_hit), "nvlink": _skew(reach.hit)})
    transports["allgather"] = _gathered(shape)

    tokens = torch.tensor(float(W * T))
    fullest = int(reach.slots.argmax())
    slots, variance = float(tokens * reach.slots[fullest]), float(tokens * reach.variance[fullest])
    worst = W * T * int(reach.held.clamp(max=shape.K).max())
    received = {"flat": Received(slots, chances.p99(slots, variance, worst), worst)}
    pairs = _bernoulli(W * T, float(reach.hit.max()))
    received |= {"rank_dedup": pairs, "allgather": Received(W * T, W * T, W * T)}
    if W % g == 0:
        received["two_level"] = _both(shape, _bernoulli(N * T, float(reach.node_hit.max())), pairs)
    uniform = torch.full((shape.E,), shape.K / shape.E, dtype=torch.float64)
    return Flows(transports, received, reach.slots, uniform if load is None else load)


def _bernoulli(tokens: int, chance: float) -> Received:
    mean = tokens * chance
    return Received(mean, chances.p99(mean, mean * (1 - chance), tokens), tokens)


def _both(shape: Shape, rail: Received, node: Received) -> Received:
    """two_level holds what came over the rail and what came inside the node; a level of one rank holds nothing."""
    if shape.N == 1:
        return node
    if shape.g == 1:
        return rail
    return Received(rail.mean + node.mean, rail.p99 + node.p99, rail.worst + node.worst)


def _gathered(shape: Shape) -> Flow:
    node_size = torch.bincount(shape.node)[shape.node].double().mean()
    rows = {"nic": shape.T * (shape.W - float(node_size)), "nvlink": shape.T * (float(node_size) - 1)}
    return Flow(rows, dict.fromkeys(LINKS, 1.0))


def _skew(each: Tensor) -> float:
    return float(each.max() / each.mean()) if float(each.sum()) else 1.0


def _counted(shape: Shape, topk_ids: Ids, owner: Tensor) -> Flows:
    ids, W = list(topk_ids), shape.W
    if len(ids) != W:
        check.refuse("plan", "topk_ids", f"of world_size={W} ranks", f"{len(ids)}")
    traffic = exact_traffic(ids, shape.E, ranks_per_node=shape.g, hidden=1, placement=owner)
    if ids[0].shape[1] != shape.K or max(len(t) for t in ids) != shape.T:
        check.refuse("plan", "topk_ids", f"[T, K={shape.K}], of the fullest rank T={shape.T}", str(list(ids[0].shape)))
    transports, received = {}, {}
    for name, moved in traffic.items():
        links = moved.link_rows()
        mean = {link: float(rows.sum()) / W for link, rows in links.items()}
        busiest = {link: max(int(rows.sum(d).max()) for d in (0, 1)) for link, rows in links.items()}
        transports[name] = Flow(mean, {link: busiest[link] / mean[link] if mean[link] else 1.0 for link in LINKS})
        phases = [rows.sum(0) for phase, rows in moved.rows.items() if _kept(shape, phase)]
        most = int(torch.stack(phases).sum(0).max())
        received[name] = Received(most, most, _worst(shape, name, owner))
    chosen = torch.cat([t.flatten() for t in ids]).long().cpu()
    counts = torch.bincount(chosen[(chosen >= 0) & (chosen < shape.E)], minlength=shape.E)
    tokens = max(1, sum(len(t) for t in ids))
    slots = torch.zeros(W, dtype=torch.float64).scatter_add_(0, owner, counts.double())
    return Flows(transports, received, slots / tokens, counts / tokens)


def _kept(shape: Shape, phase: str) -> bool:
    return not (phase == "rail" and shape.N == 1) and not (phase == "node" and shape.g == 1 and shape.N > 1)


def _worst(shape: Shape, transport: str, owner: Tensor) -> int:
    tokens = shape.W * shape.T
    if transport == "flat":
        return tokens * min(shape.K, int(torch.bincount(owner, minlength=shape.W).max()))
    if transport == "two_level":
        rail, node = (Received(0, 0, n) for n in (shape.N * shape.T, tokens))
        return _both(shape, rail, node).worst
    return tokens
