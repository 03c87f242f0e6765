# SPDX-License-Identifier: Apache-2.0
"""What this machine does in this very run: bytes read per second and multiply-adds per second.

Stand-ins made of torch calls: the sum over a buffer that no cache holds, and one large matmul. They are not the true
limit: a sum reads slower than eight streams at once, so a share above 100 % is possible. They drift with the
neighbours of a shared machine, so they are measured beside the figures they are compared with, never taken from a file.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch


def seconds(call: Callable[[], object], rounds: int = 5) -> float:
    """Median time of a call after one call to warm up."""
    call()
    spent = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        spent.append(time.perf_counter() - started)
    return statistics.median(spent)


@functools.cache
def read_gb_per_s(buffer_bytes: int = 1 << 29) -> float:
    """Plain read: float32 sum over half a gigabyte."""
    buffer = torch.ones(buffer_bytes // 4)
    return buffer_bytes / seconds(lambda: buffer.sum()) / 1e9


@functools.cache
def peak_gflops(dtype: torch.dtype, n: int = 2048) -> float:
    """The best of a square matmul in dtype and in float32 (torch's bfloat16 is slow where the processor has no such dot
    product); torch's own, so a little below the true peak."""
    if dtype in (torch.bfloat16, torch.float16):
        return max(_matmul_gflops(dtype, n), peak_gflops(torch.float32, n))
    return _matmul_gflops(dtype, n)


def _matmul_gflops(dtype: torch.dtype, n: int) -> float:
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    return 2 * n**3 / seconds(lambda: a @ b) / 1e9
