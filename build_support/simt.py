# SPDX-License-Identifier: Apache-2.0
"""Builds the CUDA kernels for the emulator: one library whose ops, moe_kernels_simt::*, run them on CPU tensors.

    python build_support/simt.py         prints the path of build/simt/_simt.so, built where anything changed

Kernels are compiled with -fsanitize=thread and never linked with it: the calls it leaves at every access are the
emulator's own race detector.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build/simt"
COMMON = "-std=c++17 -fPIC -fvisibility=hidden -DMOE_SIMT -Wall -Wno-unknown-pragmas -Wno-psabi"
KERNEL = f"{COMMON} -O1 -g -ffp-contract=off -fsanitize=thread --param tsan-distinguish-volatile=1 "
KERNEL += "--param tsan-instrument-func-entry-exit=0 -x c++"
RULE = "rule {name}\n  command = {command} -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n"


def ninja() -> str:
    """The ninja of this Python's environment, or of PATH."""
    beside = Path(sys.executable).with_name("ninja")
    return str(beside) if beside.exists() else "ninja"


def kernel_sources() -> list[str]:
    """The .cu files of csrc/sources.txt."""
    lines = (line.split("#")[0].split() for line in (ROOT / "csrc/sources.txt").read_text().splitlines())
    return [path for library, path in filter(None, lines) if library == "cuda" and path.endswith(".cu")]


def build() -> Path:
    """Returns the library, built if it was older than a source. Errors: RuntimeError with the compiler's words."""
    from torch.utils.cpp_extension import include_paths, library_paths

    cxx = os.environ.get("CXX", "c++")
    include = " ".join(f"-isystem {shlex.quote(path)}" for path in include_paths())
    binding = f"{COMMON} -O2 -g0 -DTORCH_TARGET_VERSION=0x020b000000000000 {include}"
    runtime = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc/simt").glob("*.cpp"))]
    steps = {
        "runtime": (f"{cxx} {COMMON} -O2 -g1", runtime),  # first on the link line: see csrc/simt/hooks.cpp
        "kernel": (f"{cxx} {KERNEL}", kernel_sources()),
        "binding": (f"{cxx} {binding}", [f"csrc/bindings/{name}.cpp" for name in ("ops", "expert_ops", "gemm_ops")]),
    }
    text, objects = "", []
    for name, (command, sources) in steps.items():
        text += RULE.format(name=name, command=command)
        for source in sources:
            objects.append(f"{name}_{Path(source).stem}.o")
            text += f"build {objects[-1]}: {name} {ROOT / source}\n"
    libraries = " ".join(f"-L{shlex.quote(path)}" for path in library_paths())
    text += f"rule link\n  command = {cxx} -shared $in -o $out {libraries} -ltorch_cpu -ldl -lpthread\n"
    text += f"build _simt.so: link {' '.join(objects)}\n"
    BUILD.mkdir(parents=True, exist_ok=True)
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    with (BUILD / "lock").open("w") as lock:  # tests run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        (BUILD / "build.ninja").write_text(text)
        done = subprocess.run([ninja(), "-C", str(BUILD), *jobs], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the emulator's library was not built:\n{done.stdout[-4000:]}{done.stderr}")
    return BUILD / "_simt.so"


if __name__ == "__main__":
    print(build())
