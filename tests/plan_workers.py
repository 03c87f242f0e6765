# SPDX-License-Identifier: Apache-2.0
"""What the processes of test_calibrate.py and test_placement.py do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_kernels.calibrate import calibrate
from moe_kernels.planner import Links


def measure(rank: int, folder: Path) -> list[Any]:
    """All ranks on one node; one rank a node; two nodes of half the ranks."""
    base = Links(tflops=7.0, nic_us=123.0)
    W = dist.get_world_size()
    return [calibrate(gpus_per_node=g, sizes=(1 << 10, 1 << 20), repeats=3, base=base) for g in (W, 1, W // 2)]


def delayed(rank: int, folder: Path) -> Any:
    """An all-to-all that takes 2 ms and a nanosecond a byte, on a clock of its own."""
    import time

    real, now = dist.all_to_all_single, [0.0]

    def slow(out: Any, send: Any, *splits: Any, group: Any = None) -> None:
        real(out, send, *splits, group=group)
        now[0] += 2e-3 + 1e-9 * send.numel()

    dist.all_to_all_single, clock = slow, time.perf_counter
    time.perf_counter = lambda: now[0]
    try:
        return calibrate(gpus_per_node=1, repeats=2)
    finally:
        dist.all_to_all_single, time.perf_counter = real, clock
