# SPDX-License-Identifier: Apache-2.0
"""`calibrate`: the constants of a plan's `Links`, fitted to a few timed all-to-alls of this very cluster.

    links = calibrate(gpus_per_node=8)            # on every rank of the group
    plan(..., links=links)

Three patterns are timed: every rank with its own node, with the ranks of its place on the other nodes, and one byte
with all ranks of other nodes. The slowest rank counts, the median of the repeats. Letters: traffic.py.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import check
from .planner import Links

SIZES = (1 << 12, 1 << 16, 1 << 20, 1 << 22)


def calibrate(group: Any = None, *, gpus_per_node: int = 8, sizes: Sequence[int] = SIZES, repeats: int = 5,
              device: str | torch.device = "cpu", base: Links | None = None) -> Links:  # fmt: skip
    """Measures the links between the ranks of a group. Every rank has to call it, with the same arguments.

    Args:
        group: process group; None: all ranks.
        gpus_per_node: g; ranks r // g share a node.
        sizes: bytes that a rank sends to each of its peers, two or more that differ.
        repeats: of each; the first of repeats + 1 warms up.
        device: "cuda" for a group over NCCL.
        base: what the group has no link for, and tflops, come from here; `Links()` by default.
    Returns:
        Links, the same on every rank.

    Errors: TypeError, ValueError; RuntimeError without torch.distributed.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("calibrate: needs a process group: call torch.distributed.init_process_group first")
    check.count("calibrate", "gpus_per_node", gpus_per_node, 1)
    check.count("calibrate", "repeats", repeats, 1)
    sizes = sorted(set(sizes))
    if len(sizes) < 2 or sizes[0] < 1 or any(not isinstance(s, int) for s in sizes):
        check.refuse("calibrate", "sizes", "two or more numbers of bytes", str(list(sizes)))
    rank, W = dist.get_rank(group), dist.get_world_size(group)
    g = min(gpus_per_node, W)
    if W % g:
        check.refuse("calibrate", "gpus_per_node", f"a divisor of the {W} ranks", str(g))
    peers = {
        "nvlink": [r for r in range(W) if r // g == rank // g and r != rank],
        "nic": [r for r in range(W) if r % g == rank % g and r != rank],
        "peer": [r for r in range(W) if r // g != rank // g],
    }
    found: dict[str, float] = {}
    for link in ("nvlink", "nic"):
        if peers[link]:
            us = [_time(group, peers[link], size, repeats, device) for size in sizes]
            found[f"{link}_us"], found[f"{link}_gbs"] = fit([s * len(peers[link]) for s in sizes], us)
    extra = len(peers["peer"]) - len(peers["nic"])
    if extra > 0:
        few, many = (_time(group, peers[name], 1, repeats, device) for name in ("nic", "peer"))
        found["peer_us"] = max(0.0, many - few) / extra
        found["nic_us"] = max(0.0, found["nic_us"] - found["peer_us"] * len(peers["nic"]))
    return dataclasses.replace(base or Links(), **found)


def fit(sizes: Sequence[float], us: Sequence[float]) -> tuple[float, float]:
    """(alpha us, GB/s) of us = alpha + bytes / beta, least squares of the relative error; alpha is not negative.

    Times that do not grow with the size give the speed of the largest.
    """
    # plain sums: the same bits on every rank, so that all come to the same plan
    weights = [t**-2 for t in us]
    total = sum(weights)
    mean_size, mean_us = (sum(w * v for w, v in zip(weights, values)) / total for values in (sizes, us))
    spread = sum(w * (n - mean_size) ** 2 for w, n in zip(weights, sizes))
    slope = sum(w * (n - mean_size) * (t - mean_us) for w, n, t in zip(weights, sizes, us)) / spread
    alpha = mean_us - slope * mean_size
    if alpha < 0:  # the line through the origin
        alpha, slope = 0.0, sum(n / t for n, t in zip(sizes, us)) / sum((n / t) ** 2 for n, t in zip(sizes, us))
    if slope <= 0:
        slope = us[-1] / sizes[-1]
    return alpha, 1 / (slope * 1e3)


def _time(group: Any, peers: list[int], size: int, repeats: int, device: str | torch.device) -> float:
    """Microseconds of an all-to-all in which every rank sends `size` bytes to each of its peers."""
    splits = [0] * dist.get_world_size(group)
    for r in peers:
        splits[r] = size
    send = torch.zeros(size * len(peers), dtype=torch.uint8, device=device)
    received = torch.empty_like(send)
    times = []
    for _ in range(repeats + 1):
        dist.barrier(group)
        start = time.perf_counter()
        dist.all_to_all_single(received, send, splits, splits, group=group)
        if received.is_cuda:
            torch.cuda.synchronize(received.device)
        times.append((time.perf_counter() - start) * 1e6)
    slowest: Tensor = torch.tensor(times[1:], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group)
    return float(statistics.median(slowest.tolist()))
