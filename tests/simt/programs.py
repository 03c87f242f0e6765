# SPDX-License-Identifier: Apache-2.0
"""Compiles the emulator's own test programs: plain C++ and .cu files, no torch."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / "build_support").is_dir():
    sys.path.insert(0, str(ROOT / "build_support"))
    import simt as build_simt  # build_support/simt.py: the flags of the product's own emulator build

    sys.path.pop(0)

SEEDS = range(9)  # every schedule with every landing of copies: see options_from_environment


def missing() -> str:
    """Why the programs cannot be built here, or ""."""
    if not (ROOT / "csrc/simt").is_dir():
        return "the tests run outside a source tree: the emulator is built from csrc/simt"
    compiler = os.environ.get("CXX", "c++").split()[-1]
    return "" if shutil.which(compiler) else f"no C++ compiler: {compiler} is not on PATH"


def build(name: str, sources: Sequence[Path], *, flags: str = "", link_flags: str = "", hooks: bool = True,
          ready: Sequence[Path] = ()) -> Path:  # fmt: skip
    """Links `sources` (.cu through the race detector's hooks, .cpp plainly) with the emulator into a program.

    The emulator itself is compiled once for all programs of the same flags; `ready` are objects that hold it and more.
    Errors: RuntimeError with the compiler's words.
    """
    out = ROOT / "build/simt_tests"
    out.mkdir(parents=True, exist_ok=True)
    cxx = os.environ.get("CXX", "c++")
    host = f"{build_simt.COMMON} -O1 -g1"
    kernel = build_simt.KERNEL if hooks else f"{host} -x c++"
    text = build_simt.RULE.format(name="cu", command=f"{cxx} {kernel} {flags}")
    text += build_simt.RULE.format(name="cpp", command=f"{cxx} {host} {flags}")
    variant = format(zlib.crc32(flags.encode()), "08x")
    objects = [str(path) for path in ready]
    emulator = [] if ready else [ROOT / source for source in build_simt.runtime_sources()]
    for source in [*emulator, *sources]:  # the emulator first: see hooks.cpp
        owner = f"runtime_{variant}" if source.parent == ROOT / "csrc/simt" else name
        objects.append(f"{owner}_{source.stem}.o")
        text += f"build {objects[-1]}: {source.suffix.lstrip('.')} {source}\n"
    text += f"rule link\n  command = {cxx} {link_flags} $in -o $out -ldl -lpthread\n"
    text += f"build {name}: link {' '.join(objects)}\n"
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    command = [build_simt.ninja(), "-C", str(out), "-f", f"{name}.ninja", *jobs]
    with (out / "lock").open("w") as lock:  # programs share the emulator's objects
        fcntl.flock(lock, fcntl.LOCK_EX)
        (out / f"{name}.ninja").write_text(text)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} was not built:\n{done.stdout[-6000:]}{done.stderr}")
    return out / name


def run(program: Path, *arguments: str, seed: int, timeout: float = 120) -> str:
    """The program's output under one seed."""
    environment = {**os.environ, "MOE_KERNELS_SIMT_SEED": str(seed)}
    done = subprocess.run(
        [str(program), *arguments], capture_output=True, text=True, check=False, timeout=timeout, env=environment
    )
    return done.stdout + done.stderr
