# SPDX-License-Identifier: Apache-2.0
"""What this machine does in this very run: bytes read per second and multiply-adds per second.

Loops of our own (csrc/cpu/limits.cpp): multiply-adds on registers alone, and a read of half a gigabyte through 16
streams a thread. They drift with the neighbours of a shared machine, so they are measured between the rounds of what
they are compared with, never taken from a file.
"""

from __future__ import annotations

import functools
import statistics
import time

import torch

from moe_kernels import _host

STEPS = 2_000_000
READ_BYTES = 1 << 29
PAUSE = 0.02  # until the threads of the call before have stopped waiting for work


@functools.cache
def _buffer() -> torch.Tensor:
    return torch.ones(READ_BYTES // 4)


def flops_per_s(dtype: torch.dtype = torch.float32, threads: int = 0) -> float:
    """Of multiply-adds in registers; 16-bit types are multiplied as float32."""
    time.sleep(PAUSE)
    return float(_host.multiply_add_rate(threads or torch.get_num_threads(), dtype == torch.float64, STEPS))


def read_bytes_per_s(threads: int = 0) -> float:
    """Of a plain read from memory."""
    time.sleep(PAUSE)
    return float(_host.read_rate(threads or torch.get_num_threads(), _buffer().data_ptr(), READ_BYTES))


@functools.cache
def read_gb_per_s() -> float:
    """Median of five plain reads, once a process."""
    return statistics.median(read_bytes_per_s() for _ in range(5)) / 1e9


@functools.cache
def peak_gflops(dtype: torch.dtype) -> float:
    """Median of five register loops, once a process."""
    return statistics.median(flops_per_s(dtype) for _ in range(5)) / 1e9
