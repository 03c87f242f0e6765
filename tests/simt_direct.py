# SPDX-License-Identifier: Apache-2.0
"""The CUDA launchers on the emulator, called by their structs on CPU tensors: see tests/simt/direct.cpp."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import Structure, c_bool, c_char_p, c_double, c_int32, c_int64, c_size_t, c_void_p
from typing import Any

import simt_ops
import torch

sys.path.insert(0, str(simt_ops.ROOT / "tests/simt"))
import programs  # noqa: E402

CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # enum DType


class Weight(Structure):
    _fields_ = [("data", c_void_p), ("expert_stride", c_int64), ("row_stride", c_int64), ("col_stride", c_int64),
                ("panel_stride", c_int64), ("padded", c_bool)]  # fmt: skip


class WgradSide(Structure):
    _fields_ = [("data", c_void_p), ("row_stride", c_int64), ("col_stride", c_int64), ("gather", c_void_p),
                ("per_token", c_int64)]  # fmt: skip


class GroupedWgrad(Structure):
    _fields_ = [("E", c_int64), ("S", c_int64), ("N", c_int64), ("K", c_int64), ("dtype", c_int32),
                ("out_dtype", c_int32), ("allow_tf32", c_bool), ("accumulate", c_bool), ("n_side", WgradSide),
                ("k_side", WgradSide), ("row_to_slot", c_void_p), ("topk_weights", c_void_p), ("ends", c_void_p),
                ("out", c_void_p), ("out_expert", c_int64), ("out_row", c_int64), ("out_col", c_int64)]  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL:
    """Builds and loads the launchers. Errors: RuntimeError with the compiler's words."""
    root = simt_ops.ROOT
    kernels = ("grouped_wgrad", "grouped_gemm", "grouped_gemm_bf16", "grouped_gemm_f16", "grouped_gemm_tf32", "grouped_fma")
    sources = [*(root / f"csrc/cuda/{name}.cu" for name in kernels), root / "tests/simt/direct.cpp"]
    found = ctypes.CDLL(str(programs.build("direct.so", sources, link_flags="-shared")))
    found.moe_test_register.argtypes = [c_void_p, c_size_t, c_char_p, c_bool]
    found.moe_test_unregister.argtypes = [c_void_p]
    found.moe_simt_audit_stop.restype = c_char_p
    return found


def extent(tensor: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.itemsize if tensor.numel() else 0


def call(name: str, args: Structure, *, reads: dict[str, torch.Tensor], writes: dict[str, torch.Tensor]) -> None:
    """Runs a launcher. A kernel may read `reads`, and what it has itself written of `writes`; nothing else exists.

    Errors: RuntimeError with the emulator's report.
    """
    lib = library()
    size = getattr(lib, f"moe_test_size_{name}")
    size.restype = c_size_t
    assert size() == ctypes.sizeof(args), f"simt_direct.py and the header disagree about {name}"
    os.environ[simt_ops.SEED] = str(next(simt_ops._seeds))
    buffers = [(t, key, True) for key, t in reads.items()] + [(t, key, False) for key, t in writes.items()]
    for tensor, key, written in buffers:
        lib.moe_test_register(tensor.data_ptr(), extent(tensor), key.encode(), written)
    try:
        run = getattr(lib, f"moe_test_{name}")
        run.restype, run.argtypes = c_char_p, [c_void_p]
        report = run(ctypes.addressof(args)).decode()
    finally:
        for tensor, _, _ in buffers:
            lib.moe_test_unregister(tensor.data_ptr())
    if report:
        raise RuntimeError(f"{name}: {report}")


@contextmanager
def audit() -> Iterator[list[dict[str, Any]]]:
    """As simt_ops.audit, of the kernels that `call` runs."""
    records: list[dict[str, Any]] = []
    library().moe_simt_audit_start()
    try:
        yield records
    finally:
        records += json.loads(library().moe_simt_audit_stop())


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


_ = c_double
