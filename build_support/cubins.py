# SPDX-License-Identifier: Apache-2.0
"""Compiles every CUDA kernel for every architecture on its own, strictly: warnings and spills are errors.

    python build_support/cubins.py       build/cuda/<kernel>.sm_80.cubin, .sm_90a.cubin, .compute_80.ptx and, from that
                                         PTX, .sm_120.cubin: what a later GPU would make of it

Exit status 0: all compiled. 1: an error, printed. 77: skipped, this machine has no nvcc.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nvcc
import nvrtc
import simt

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build/cuda"
ARCHS = ("80", "90a")
PTX, LATER = "80", "120"  # the PTX in a wheel, and a GPU newer than every cubin in it
STRICT = "-O3 -std=c++17 -Werror=all-warnings -Xptxas=-Werror,-warn-spills"
NOTES = re.compile(r"\b(warning|advisory|ignored)\b", re.IGNORECASE)  # ptxas drops a request with a mere note
SKIPPED = 77


def build(compiler: nvcc.Nvcc) -> list[Path]:
    """The cubins, compiled where a source is newer. Errors: RuntimeError with the compiler's words."""
    text = (
        f"rule cubin\n  command = {compiler.path} {STRICT} -cubin -arch=sm_$arch -MD -MF $out.d $in -o $out\n"
        f"  depfile = $out.d\n  deps = gcc\n"
        f"rule ptx\n  command = {compiler.path} {STRICT} -ptx -arch=compute_$arch -MD -MF $out.d $in -o $out\n"
        f"  depfile = $out.d\n  deps = gcc\n"
        f"rule later\n  command = {compiler.path} -Xptxas=-Werror,-warn-spills -cubin -arch=sm_$arch $in -o $out\n"
    )
    cubins = []
    for source in simt.kernel_sources():
        stem = Path(source).stem
        for arch in ARCHS:
            text += f"build {stem}.sm_{arch}.cubin: cubin {ROOT / source}\n  arch = {arch}\n"
            cubins.append(BUILD / f"{stem}.sm_{arch}.cubin")
        text += f"build {stem}.compute_{PTX}.ptx: ptx {ROOT / source}\n  arch = {PTX}\n"
        text += f"build {stem}.sm_{LATER}.cubin: later {stem}.compute_{PTX}.ptx\n  arch = {LATER}\n"
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "build.ninja").write_text(text)
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    done = subprocess.run(["ninja", "-C", str(BUILD), *jobs], capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    notes = [line for line in said.splitlines() if NOTES.search(line) and "command" not in line and "nvcc" not in line]
    if done.returncode or notes:
        raise RuntimeError("\n".join(notes) or said[-6000:])
    return cubins


def main() -> int:
    found = nvcc.find()
    if found is None:
        print("cuda: SKIPPED, nothing was compiled: no nvcc in PYTORCH_NVCC, CUDA_HOME, CUDA_PATH, PATH or /usr/local")
        return SKIPPED
    begin = time.monotonic()
    try:
        cubins = build(found)
        kernels = nvrtc.compile_all()
    except RuntimeError as error:
        print(error)
        return 1
    archs = ", ".join(f"sm_{arch}" for arch in ARCHS)
    print(f"cuda: {len(cubins)} cubins for {archs} and PTX for later ones, nvcc {found.version}, no warning, no spill")
    print(f"cuda: {len(kernels)} kernels by NVRTC, each for the first architecture that runs it")
    print(f"cuda: {time.monotonic() - begin:.0f} s, in {BUILD.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
