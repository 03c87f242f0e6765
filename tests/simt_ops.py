# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on the emulator, as a backend of the tests: public functions on CPU tensors, a seed a call.

The ops moe_kernels_simt::* have the schemas and the backward of moe_kernels::*. Their library is built from csrc/ when
first asked for (build_support/simt.py), so this needs a source tree and a C++ compiler, no CUDA.
"""

import functools
import importlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from ctypes import CDLL, c_char_p
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

import moe_kernels as mk
from moe_kernels import autograd, capacity, fakes, losses, ops, schemas
from moe_kernels.routers import assignment, expert_choice

ROOT = Path(__file__).resolve().parents[1]
NAMESPACE = "moe_kernels_simt"
CALLED = {
    "route": (ops, "_ROUTE"), "limit_capacity": (capacity, "_LIMIT_CAPACITY"), "permute": (ops, "_PERMUTE"),
    "unpermute": (ops, "_UNPERMUTE"), "grouped_gemm": (ops, "_GROUPED_GEMM"),
    "fused_experts": (ops, "_FUSED_EXPERTS"), "sum_scores": (losses, "_SUM_SCORES"),
    "expert_cuts": (expert_choice, "_CUTS"), "expert_choice": (expert_choice, "_SLOTS"),
    "sinkhorn": (assignment, "_SINKHORN"),
}  # fmt: skip
"""op -> the name under which the package calls it"""
STAGES = (*CALLED, *(f"{stage}_backward" for stage in CALLED if f"{stage}_backward" in schemas.SCHEMAS))
SEED = "MOE_KERNELS_SIMT_SEED"
ARCH = "MOE_KERNELS_SIMT_ARCH"  # of the GPU that the emulator stands for: 80 unless set
ROW = "MOE_KERNELS_SIMT_ROW"  # of kTileRows, by number: computes every grouped product that it does not refuse


@functools.cache
def library() -> CDLL:
    """Builds, loads and registers; the library for its C functions."""
    sys.path.insert(0, str(ROOT / "build_support"))
    path = str(importlib.import_module("simt").build())
    sys.path.pop(0)
    global _DEFINITIONS
    _DEFINITIONS = torch.library.Library(NAMESPACE, "DEF")
    for name in STAGES:
        _DEFINITIONS.define(name + schemas.SCHEMAS[name])
    torch.ops.load_library(path)
    for name in STAGES:
        torch.library.register_fake(f"{NAMESPACE}::{name}", getattr(fakes, f"_{name}"))
    autograd.install(NAMESPACE, [stage for stage in CALLED if stage in autograd.FORMULAS])
    return CDLL(path)


@contextmanager
def audit() -> Iterator[list[dict[str, Any]]]:
    """Counts the memory accesses of the kernels run inside: one record a place in the source, filled at the end."""
    records: list[dict[str, Any]] = []
    library().moe_simt_audit_stop.restype = c_char_p
    library().moe_simt_audit_start()
    try:
        yield records
    finally:
        records += json.loads(library().moe_simt_audit_stop())


def missing() -> str:
    """Why the emulator cannot be built here, or ""."""
    if not (ROOT / "csrc/simt").is_dir():
        return "the tests run outside a source tree: the emulator is built from csrc/simt"
    for tool in (os.environ.get("CXX", "c++").split()[-1], "ninja"):
        if not shutil.which(tool):
            return f"the emulator is built from source, and {tool} is not on PATH"
    return ""


_FIRST_SEED = int(os.environ.get(SEED, "0"))
_seeds = itertools.count(_FIRST_SEED)


def restart(seed: int = _FIRST_SEED) -> None:
    """The seed of the next call. Every test begins with the first, so that it fails alone as it fails among others."""
    global _seeds
    _seeds = itertools.count(seed)


def next_seed() -> int:
    return next(_seeds)


@contextmanager
def patched() -> Iterator[None]:
    """All ops that have CUDA kernels run on the emulator inside, for layers and models too. The next seed."""
    library()
    os.environ[SEED] = str(next_seed())
    with ExitStack() as stack:
        for stage, (module, name) in CALLED.items():
            op = getattr(getattr(torch.ops, NAMESPACE), stage).default
            stack.enter_context(mock.patch.object(module, name, op))
        yield


def _on_emulator(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with every op on the emulator."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with patched():
            return function(*args, **kwargs)

    return run


def _sum_scores(*args: Any) -> Any:
    return torch.ops.moe_kernels_simt.sum_scores.default(*args)


BACKEND = SimpleNamespace(
    name="simt", device="cpu", route=_on_emulator(mk.route), route_with_sums=_on_emulator(mk.route_with_sums),
    sum_scores=_on_emulator(_sum_scores), limit_capacity=_on_emulator(mk.limit_capacity),
    permute=_on_emulator(mk.permute), unpermute=_on_emulator(mk.unpermute),
    grouped_gemm=_on_emulator(mk.grouped_gemm), fused_experts=_on_emulator(mk.fused_experts),
    expert_choice=_on_emulator(expert_choice.choose), sinkhorn=_on_emulator(assignment.balance),
)  # fmt: skip
