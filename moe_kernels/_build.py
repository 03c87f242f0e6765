# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled library and says what it is, or in plain words why it is not there. Nothing here raises."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import nvrtc
from ._version import __version__

FLOOR = (2, 11)  # the library uses torch's stable calls of this version; setup.py's TORCH_TARGET says the same

ops_loaded = False
reason = "moe_kernels: the compiled library has not been asked for yet"

_PACKAGE = Path(__file__).resolve().parent
_AGAIN = "Run `pip install --force-reinstall --no-deps .` in the source checkout, with this Python and this torch"
_library: Path | None = None


def _libraries(package: Path, stem: str) -> list[Path]:
    return sorted(path for path in package.glob(f"{stem}.*") if path.suffix in (".so", ".pyd"))


def _load_failure(error: str, built_with: str) -> str:
    """The loader's message, turned into what happened and what to run."""
    symbol = re.search(r"undefined symbol: (\w+)|Symbol not found: (\w+)", error)
    if symbol:
        return (
            f"the compiled library does not fit this torch: built with torch {built_with}, running torch "
            f"{torch.__version__}, which lacks {symbol[1] or symbol[2]}. {_AGAIN}"
        )
    if re.search(r"invalid ELF header|wrong ELF class|file too short|incompatible architecture|not a mach-o", error):
        return (
            f"the compiled library is damaged or was built for another machine than this {platform.machine()}: "
            f"{error}. {_AGAIN}"
        )
    return f"the compiled library could not be loaded: {error}. {_AGAIN}"


def _not_built(package: Path, search: Sequence[str]) -> str:
    """Why `package` has no library: it hides an installed one, or nobody built it."""
    for entry in search:
        other = Path(entry or ".").resolve() / package.name
        if other != package and _libraries(other, "_ops"):
            return (
                f"the source checkout {package.parent} shadows the installed package {other}, which has the compiled "
                "library. Start Python in another folder, or run `pip install -e .` in the checkout"
            )
    where = "here" if (package.parent / "setup.py").exists() else "in the source checkout"
    return f"the compiled library was not built in {package}. Run `pip install .` {where}, then start Python elsewhere"


def _other_python(package: Path, stem: str) -> str:
    """Says so when `stem` was built, but only for other Pythons."""
    there = [path.name for path in _libraries(package, stem)]
    if not there or any(stem + suffix in there for suffix in importlib.machinery.EXTENSION_SUFFIXES):
        return ""
    return f"{there[0]} was built for another Python than this {sys.implementation.cache_tag}. {_AGAIN}"


def _torch_too_old(version: str) -> str:
    parts = re.match(r"(\d+)\.(\d+)", version)
    if parts is None or (int(parts[1]), int(parts[2])) >= FLOOR:
        return ""
    return f"torch {version} is too old for the compiled library. Run `pip install 'torch>={FLOOR[0]}.{FLOOR[1]}'`"


def _record() -> dict[str, Any]:
    """What setup.py wrote down; empty in a checkout that was never built."""
    try:
        record = importlib.import_module(f"{__package__}._build_info").INFO
    except Exception:
        return {}
    return record if isinstance(record, dict) else {}


def load() -> None:
    """Loads the compiled kernels into torch, once; afterwards `ops_loaded` and `reason` tell how it went."""
    global ops_loaded, reason, _library
    if ops_loaded:
        return
    libraries = _libraries(_PACKAGE, "_ops")
    problem = _torch_too_old(torch.__version__) or _other_python(_PACKAGE, "_ops")
    if not libraries:
        problem = _not_built(_PACKAGE, sys.path)
    if not problem:
        try:
            torch.ops.load_library(libraries[0])
        except Exception as error:
            said = str(error.__cause__ or error)  # torch hides the loader's message behind its own
            problem = _load_failure(said, str(_record().get("torch", "of unknown version")))
        else:
            _library, ops_loaded = libraries[0], True
            if not _record().get("cuda"):
                nvrtc.load(next(iter(_libraries(_PACKAGE, "_nvrtc")), None))
    reason = f"moe_kernels: {problem}" if problem else ""


def _host_info() -> dict[str, object]:
    """The facts that the host module knows, or why it could not be asked."""
    try:
        host = importlib.import_module(f"{__package__}._host")
        return {"isa_levels": host.isa_levels(), "isa": host.active_isa()}
    except ImportError as error:
        return {"isa": "unknown", "host_reason": _other_python(_PACKAGE, "_host") or str(error)}
    except RuntimeError as error:  # MOE_KERNELS_ISA names no level
        return {"isa": "unknown", "host_reason": str(error)}


def cuda_route() -> str:
    """Which compiler made, or will make, the CUDA kernels; "no: ..." with the reasons where there are none."""
    record = _record()
    if record.get("cuda"):
        return f"nvcc {record['cuda']} for {record['arch_list']}"
    why = record.get("cuda_reason", "not built")
    return f"{nvrtc.about()} ({why})" if nvrtc.active else f"no: by nvcc: {why}; by NVRTC: {nvrtc.reason}"


def info() -> dict[str, object]:
    """The build and the machine as a flat dictionary; every key is always there, unknown ones say so."""
    record = _record()
    return {
        "version": __version__,
        "ops_loaded": ops_loaded,
        "reason": reason,
        "library": str(_library) if _library else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_built": record.get("torch", "unknown"),
        "compiler": record.get("compiler", "unknown"),
        "flags": record.get("flags", []),
        "cuda": record.get("cuda"),
        "cuda_reason": record.get("cuda_reason", "not built"),
        "arch_list": record.get("arch_list", ""),
        "nvrtc": nvrtc.active,
        "cuda_route": cuda_route(),
        "isa": "unknown",
        "isa_levels": [],
        "host_reason": "",
        **_host_info(),
    }
