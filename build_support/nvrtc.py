# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel that a launch can ask for with NVRTC, as a build without nvcc does at first use."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nvcc
import simt

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build/nvrtc"


def launchers() -> Path:
    """The launchers of all kernels as a library of its own, without torch: it knows their names."""
    cxx = shlex.split(os.environ.get("CXX", "c++"))
    sources = [*simt.kernel_sources(), "csrc/nvrtc/driver.cpp"]
    objects = nvcc.compile_objects([*cxx, "-O1", *nvcc.LAUNCHERS], [str(ROOT / path) for path in sources], BUILD)
    library = BUILD / "launchers.so"
    subprocess.run([*cxx, "-shared", *objects, "-ldl", "-o", str(library)], check=True)
    return library


def compile_all() -> list[str]:
    """The names of the kernels, each compiled for the first architecture that runs it; the others are nvcc's to check.
    Errors: RuntimeError, the compiler's words."""
    os.environ["MOE_KERNELS_CACHE"] = str(BUILD / "cubins")  # a second run compiles what has changed
    sys.path.insert(0, str(ROOT))
    from moe_kernels import nvrtc

    def compile_one(name: str) -> None:
        arch = "sm_90a" if "_sm90_" in name else "sm_80"
        image, lowered = nvrtc.kernel_image(name, arch, ROOT / "csrc")
        if lowered not in image or not image.startswith(b"\x7fELF"):
            raise RuntimeError(f"NVRTC for {arch}: no {lowered.decode()} in the cubin of {name}")

    names = nvrtc.kernels(launchers())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, names))
    return names
