# SPDX-License-Identifier: Apache-2.0
"""The CUDA launchers on the emulator, called by their structs on CPU tensors: see tests/simt/direct.cpp.

The structs are read from the headers, so a field that is added or moved there is added or moved here.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import simt_ops
import torch
from torch import Tensor

from moe_kernels.schemas import DTYPE_CODE

sys.path.insert(0, str(simt_ops.ROOT / "tests/simt"))
import programs

CUDA = simt_ops.ROOT / "csrc/cuda"
KERNELS = (
    "grouped_wgrad", "grouped_wgrad_sm90", "decode", "decode_sm90", "grouped_gemm", "grouped_gemm_bf16",
    "grouped_gemm_f16", "grouped_gemm_tf32", "grouped_fma", "tensor_map", "grouped_gemm_sm90",
    "grouped_gemm_sm90_bf16", "grouped_gemm_sm90_f16", "gathered_gemm_sm90_bf16", "gathered_gemm_sm90_f16",
)  # fmt: skip


# ---- structs of the headers as ctypes

_TYPES: dict[str, Any] = {
    "int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "double": ctypes.c_double, "bool": ctypes.c_bool,
    "DType": ctypes.c_int32, "Activation": ctypes.c_int32, "Epilogue": ctypes.c_int32,
}  # fmt: skip


def _struct(name: str) -> type[ctypes.Structure]:
    """The struct `name` of moe.h or a launcher's header, its members in order."""
    for header in (
        CUDA.parent / "moe.h",
        *(CUDA / f"{name}.h" for name in ("grouped_wgrad", "decode", "grouped_gemm")),
    ):
        text = re.sub(r"//.*", "", header.read_text())
        if found := re.search(rf"^struct {name} {{(.*?)^}};", text, re.M | re.S):
            break
    else:
        raise AssertionError(f"no struct {name} in the headers")
    fields = []
    for declaration in filter(None, (part.strip() for part in found[1].split(";"))):
        kind, _, members = declaration.removeprefix("const ").partition(" ")
        for member in re.split(r",\s*", members):
            pointer = kind.endswith("*") or member.startswith("*")
            fields.append((member.lstrip("* "), ctypes.c_void_p if pointer else type_of(kind)))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


@functools.cache
def type_of(name: str) -> Any:
    return _TYPES.get(name) or _struct(name)


def make(struct: str, **values: Any) -> Any:
    """A struct with these members; a tensor stands for its address, a dtype for its code, what is not named is 0."""
    made = type_of(struct)()
    for name, value in values.items():
        if isinstance(value, Tensor):
            value = value.data_ptr()
        setattr(made, name, DTYPE_CODE.get(value, value) if isinstance(value, torch.dtype) else value)
    return made


# ---- calls


@functools.cache
def library() -> ctypes.CDLL:
    """Builds and loads the launchers. Errors: RuntimeError with the compiler's words."""
    sources = [*(CUDA / f"{name}.cu" for name in KERNELS), simt_ops.ROOT / "tests/simt/direct.cpp"]
    found = ctypes.CDLL(str(programs.build("direct.so", sources, link_flags="-shared")))
    found.moe_test_register.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_bool]
    found.moe_test_unregister.argtypes = [ctypes.c_void_p]
    found.moe_simt_audit_stop.restype = ctypes.c_char_p
    return found


def function(name: str, result: Any) -> Any:
    found = getattr(library(), f"moe_test_{name}")
    found.restype = result
    return found


def extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.itemsize if tensor.numel() else 0


def call(name: str, args: ctypes.Structure, reads: dict[str, Tensor | None], writes: dict[str, Tensor]) -> None:
    """Runs a launcher. A kernel may read `reads`, and what it has itself written of `writes`; nothing else exists.

    Errors: RuntimeError with the emulator's report.
    """
    lib = library()
    wanted = function(f"size_{name}", ctypes.c_size_t)()
    assert wanted == ctypes.sizeof(args), f"{name}: {ctypes.sizeof(args)} bytes here, {wanted} in the header"
    os.environ[simt_ops.SEED] = str(simt_ops.next_seed())
    buffers = [(key, t, True) for key, t in reads.items() if t is not None]
    buffers += [(key, t, False) for key, t in writes.items()]
    for key, tensor, written in buffers:
        lib.moe_test_register(tensor.data_ptr(), extent(tensor), key.encode(), written)
    try:
        report = function(name, ctypes.c_char_p)(ctypes.byref(args)).decode()
    finally:
        for _, tensor, _ in buffers:
            lib.moe_test_unregister(tensor.data_ptr())
    if report:
        raise RuntimeError(f"{name}: {report}")


def uses_mma(name: str, args: ctypes.Structure) -> bool:
    return bool(function(f"{name}_uses_mma", ctypes.c_bool)(ctypes.byref(args)))


@contextmanager
def audit() -> Iterator[list[dict[str, Any]]]:
    """As simt_ops.audit, of the kernels that `call` runs."""
    records: list[dict[str, Any]] = []
    library().moe_simt_audit_start()
    try:
        yield records
    finally:
        records += json.loads(library().moe_simt_audit_stop())
