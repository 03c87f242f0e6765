# SPDX-License-Identifier: Apache-2.0
"""`python -m moe_kernels doctor`: what is here, which backend each op uses and why, and what to do about the rest."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform

import torch

from . import _build, auto_pack, hf, ops

OPS = ("route", "permute", "grouped_gemm", "unpermute", "fused_experts", "pack_experts")
VARIABLES = ("MOE_KERNELS_STRICT", "MOE_KERNELS_DEBUG", "MOE_KERNELS_ISA", "MOE_KERNELS_CACHE", auto_pack.VARIABLE)
OPTIONAL = {
    "transformers": 'the demo and experts_implementation="moe_kernels": pip install "transformers>=5.0"',
    "safetensors": "reading checkpoints: pip install safetensors",
    "matplotlib": "the demo's picture: pip install matplotlib",
    "tqdm": "progress bars: pip install tqdm",
}


def installed(name: str) -> str:
    """The version of an installed distribution, or an empty string."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def processors() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def report() -> tuple[list[str], list[str]]:
    """The lines of the report, and the advice: one line for each thing that could be better."""
    info = _build.info()
    advice: list[str] = []
    lines = [
        f"moe_kernels   {info['version']}",
        f"python        {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch         {torch.__version__} (CUDA {torch.version.cuda or 'no'})",
        *_build_lines(info),
        f"threads       {torch.get_num_threads()} of {processors()} processors",
        "variables     " + (", ".join(f"{v}={os.environ[v]}" for v in VARIABLES if v in os.environ) or "none set"),
        "",
        "Backend of each op:",
    ]
    if not _build.ops_loaded:
        advice.append(_build.reason)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for op in OPS:
        for device in devices:
            backend, why = ops.backend_of(op, device)
            lines.append(f"  {op:<14}{device:<6}{backend}" + (f" ({why})" if why else ""))
    lines += ["", "Layers pack their weights in inference on a CPU:", *(f"  {line}" for line in auto_pack.report())]
    lines += ["", "Hugging Face:", f"  {_hugging_face()}", "", "Optional packages:"]
    for name, purpose in OPTIONAL.items():
        version = installed(name)
        lines.append(f"  {name:<14}{version or 'not installed'}")
        if not version:
            advice.append(f"{name} is not installed; it is needed for {purpose}")
    version = installed("transformers")
    if version and int(version.split(".")[0]) < 5:
        advice.append(f'transformers {version} has no experts interface: pip install "transformers>=5.0"')
    if torch.get_num_threads() < processors():
        advice.append(
            f"torch uses {torch.get_num_threads()} threads although {processors()} processors are free to it: "
            "see OMP_NUM_THREADS and torch.set_num_threads"
        )
    return lines, advice


def _hugging_face() -> str:
    """The state of the switch after transformers has really been loaded."""
    if not installed("transformers"):
        return f"transformers is not installed; {hf.hook_state()}"
    try:
        importlib.import_module(hf.MOE_MODULE)
    except Exception as error:
        return f"transformers could not be loaded: {error}"
    return hf.hook_state()


def _build_lines(info: dict[str, object]) -> list[str]:
    levels = info.get("isa_levels") or []
    names = ", ".join(str(level) for level in levels) if isinstance(levels, list | tuple) else str(levels)
    host = f" ({info['host_reason']})" if info.get("host_reason") else ""
    return [
        f"library       {info['library'] or 'not loaded'}",
        f"built with    torch {info['torch_built']}, {info['compiler']}",
        f"CUDA kernels  {info['cuda_route']}",
        f"instructions  {info['isa']} (this processor can: {names or 'unknown'}){host}",
    ]


def run() -> int:
    """Print it all. Returns 0 if the compiled kernels are in use, else 1."""
    lines, advice = report()
    print("\n".join(lines))
    print("\nWhat to do:")
    print("\n".join(f"  - {line}" for line in advice) if advice else "  nothing, all is well")
    return 0 if _build.ops_loaded else 1
