# SPDX-License-Identifier: Apache-2.0
"""Whether to build the CUDA kernels, and for which architectures: pure functions of what was found."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT_ARCHS = "8.0+PTX 9.0a"  # sm_80 also as PTX, for every later GPU; sm_90a for TMA and wgmma


@dataclass(frozen=True)
class Choice:
    """`build` says what happens, `reason` says why, in words for the user."""

    build: bool
    reason: str


def choose(env: Mapping[str, str], torch_version: str, torch_cuda: str | None, nvcc_version: str | None) -> Choice:
    """Decides whether CUDA is built. Errors: ValueError for a wish that cannot be met or understood."""
    wish = env.get("MOE_KERNELS_CUDA", "")
    if wish not in ("", "0", "1"):
        raise ValueError(f"MOE_KERNELS_CUDA must be 0 or 1, got {wish!r}")
    if wish == "0":
        return Choice(False, "MOE_KERNELS_CUDA=0")
    if forced := "MOE_KERNELS_CUDA=1" if wish == "1" else "FORCE_CUDA=1" if env.get("FORCE_CUDA") == "1" else "":
        if nvcc_version is None:
            raise ValueError(f"{forced}, but no nvcc in PYTORCH_NVCC, CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda")
        return Choice(True, forced)
    if torch_cuda is None:
        return Choice(False, f"torch {torch_version} was built without CUDA (MOE_KERNELS_CUDA=1 overrides this)")
    if nvcc_version is None:
        return Choice(False, "no nvcc in PYTORCH_NVCC, CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda")
    if nvcc_version.split(".")[0] != torch_cuda.split(".")[0]:
        return Choice(
            False,
            f"nvcc is {nvcc_version}, but torch {torch_version} is built with CUDA {torch_cuda}: another major "
            "(MOE_KERNELS_CUDA=1 overrides this)",
        )
    return Choice(True, f"nvcc {nvcc_version} fits torch {torch_version} with CUDA {torch_cuda}")


def gencode_flags(arch_list: str) -> list[str]:
    """nvcc flags for a list as in TORCH_CUDA_ARCH_LIST, such as "8.0 9.0a+PTX". Errors: ValueError for another form."""
    flags = []
    for word in arch_list.replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", word)
        if match is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: wanted words such as 8.0, 9.0a or 12.0+PTX, got {word!r}")
        arch = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    if not flags:
        raise ValueError("TORCH_CUDA_ARCH_LIST names no architecture")
    return flags
