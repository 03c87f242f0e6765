# SPDX-License-Identifier: Apache-2.0
"""Finds nvcc and compiles .cu files with it, through a ninja file of its own.

torch's build helper is not used for them: on a CPU torch it knows no CUDA, it refuses another CUDA major than torch's,
and it switches the half operators off. The kernels never see torch, so any nvcc will do.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FLAGS = ("-O3", "-std=c++17", "--threads=0", "-Werror=all-warnings", "-Xcompiler=-fPIC,-fvisibility=hidden")

LAUNCHERS = ("-std=c++17", "-fPIC", "-DMOE_NVRTC", "-Wno-unknown-pragmas", "-x", "c++")  # for the C++ compiler


@dataclass(frozen=True)
class Nvcc:
    path: str
    version: str  # "13.0"

    def home(self) -> Path:
        """The toolkit's folder, also when nvcc is a wrapper script: nvcc itself says where it lives."""
        command = [self.path, "-v", "-E", "-x", "cu", os.devnull]
        lines = subprocess.run(command, capture_output=True, text=True, check=False).stderr.splitlines()
        top = next((line.split("=", 1)[1] for line in lines if line.startswith("#$ TOP=")), None)
        return Path(top).resolve() if top else Path(os.path.realpath(self.path)).parents[1]


def find() -> Nvcc | None:
    """The nvcc that the environment names, else the one on PATH, else the usual place. None if there is none."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    named = [os.environ.get("PYTORCH_NVCC"), *(f"{home}/bin/nvcc" for home in homes if home)]
    for path in (*named, "nvcc", "/usr/local/cuda/bin/nvcc"):
        if found := path and shutil.which(path):
            text = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
            if match := re.search(r"release (\d+\.\d+)", text):
                return Nvcc(found, match[1])
    return None


def compile_objects(compiler: Sequence[str], sources: Sequence[str], out: Path) -> list[str]:
    """Compiles every source into `out`, only what changed; returns the object files. MAX_JOBS bounds the jobs.

    `compiler` is nvcc or, for launchers without kernels, the C++ compiler; with its flags.
    """
    out.mkdir(parents=True, exist_ok=True)
    objects = [str(out / Path(source).with_suffix(".o").name) for source in sources]
    rule = (
        f"rule compile\n  command = {' '.join(compiler)} -MD -MF $out.d -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc\n"
    )
    builds = [f"build {obj}: compile {Path(source).resolve()}\n" for obj, source in zip(objects, sources, strict=True)]
    (out / "build.ninja").write_text(rule + "".join(builds))
    jobs = os.environ.get("MAX_JOBS")
    subprocess.run(["ninja", "-C", str(out), *(["-j", jobs] if jobs else [])], check=True)
    return objects
