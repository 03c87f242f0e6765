# SPDX-License-Identifier: Apache-2.0
"""Compiles the kernels with NVRTC, the compiler in a library: the same text, no host header, no toolkit."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = (
    "route", "sum_scores", "limit_capacity", "permute", "unpermute", "expert_choice", "sinkhorn", "fused_experts",
    "grouped_fma", "grouped_gemm",
)  # fmt: skip
SOURCE = "".join(f'#include "cuda/{stage}.cuh"\n' for stage in STAGES)
KERNELS = (
    "moe::cuda::route_kernel<moe::bf16>",
    "moe::cuda::route_backward_kernel<float>",
    "moe::cuda::sum_scores_kernel<moe::f16>",
    "moe::cuda::sum_scores_backward_kernel<moe::bf16>",
    "moe::cuda::add_rows_kernel<float>",
    "moe::cuda::limit_capacity_kernel",
    "moe::cuda::limit_drop_kernel",
    "moe::cuda::expert_scores_kernel<moe::bf16>",
    "moe::cuda::expert_cuts_kernel<float>",
    "moe::cuda::expert_slots_kernel<double>",
    "moe::cuda::sinkhorn_kernel<moe::f16>",
    "moe::cuda::permute_index_kernel",
    "moe::cuda::permute_place_kernel",
    "moe::cuda::permute_rows_kernel<uint4>",
    "moe::cuda::unpermute_kernel<moe::f16, 8>",
    "moe::cuda::unpermute_backward_kernel<double, 2>",
    "moe::cuda::expert_sums_kernel<moe::bf16>",
    "moe::cuda::weight_gradient_kernel<double>",
    "moe::cuda::grouped_fma_kernel<float, 2>",
    "moe::cuda::grouped_fma_kernel<moe::f16, 1>",
    "moe::cuda::grouped_rows_kernel<moe::bf16, 7, true>",
    "moe::cuda::grouped_rows_kernel<float, 6, false>",
)


def library() -> ctypes.CDLL:
    """Errors: RuntimeError that says what to install."""
    found = importlib.util.find_spec("nvidia")
    for folder in (found.submodule_search_locations or []) if found else []:
        for path in sorted(Path(folder).glob("*/lib/libnvrtc.so.*")):
            return ctypes.CDLL(str(path))
    raise RuntimeError("cuda: no libnvrtc: pip install nvidia-cuda-nvrtc (Makefile has the version)")


def compile_for(arch: str) -> str:
    """The compiler's words about all kernels for one architecture, empty if it had none. Errors: RuntimeError."""
    nvrtc, program, size = library(), ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), SOURCE.encode(), b"kernels.cu", 0, None, None)
    for kernel in KERNELS:  # a template is compiled where someone names it
        nvrtc.nvrtcAddNameExpression(program, kernel.encode())
    options = [f"--gpu-architecture=sm_{arch}", "-std=c++17", f"-I{ROOT / 'csrc'}", "-default-device"]
    result = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * 4)(*(o.encode() for o in options)))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if result:
        raise RuntimeError(f"NVRTC for sm_{arch}:\n{log.value.decode()}")
    return log.value.decode().strip()
