# SPDX-License-Identifier: Apache-2.0
"""One experts layer of a published model at full size, bfloat16: "grouped_mm" and ours on the same weights."""

from __future__ import annotations

import contextlib
import importlib
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import hf
from .progress import progress
from .training import BASELINE

# Five roundings to bfloat16 on one side (gate/up, activation, product, expert output, weighting), three on the other.
ROUNDINGS = 8


@dataclass(frozen=True)
class Layer:
    name: str
    module: str
    classes: tuple[str, str]  # experts class, configuration class
    hidden: int
    width: int
    experts: int
    top_k: int
    words: tuple[str, str]  # what the configuration calls E and I

    @property
    def weight_bytes(self) -> int:
        return 2 * 3 * self.experts * self.hidden * self.width


_QWEN3 = ("Qwen3MoeExperts", "Qwen3MoeConfig"), ("num_experts", "moe_intermediate_size")
_MIXTRAL = ("MixtralExperts", "MixtralConfig"), ("num_local_experts", "intermediate_size")
_OLMOE = ("OlmoeExperts", "OlmoeConfig"), ("num_experts", "intermediate_size")
QWEN3 = Layer("Qwen3-30B-A3B", "qwen3_moe", _QWEN3[0], 2048, 768, 128, 8, _QWEN3[1])
MIXTRAL = Layer("Mixtral 8x7B", "mixtral", _MIXTRAL[0], 4096, 14336, 8, 2, _MIXTRAL[1])
SMALL = Layer("OLMoE-1B-7B, 8 of 64 experts", "olmoe", _OLMOE[0], 2048, 1024, 8, 2, _OLMOE[1])  # where memory is short


def free_bytes() -> int:
    """Memory that can be taken without swapping: the smaller of what the system has and what a container may use."""
    free = 0
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
    if not free:
        with contextlib.suppress(ImportError):
            free = int(importlib.import_module("psutil").virtual_memory().available)
    if not free:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    with contextlib.suppress(OSError, ValueError):  # cgroup v2; "max" is no number and means no limit
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text() for name in ("memory.max", "memory.current"))
        free = min(free, int(limit) - int(used))
    return free


def fill(weight: torch.Tensor, scale: float) -> None:
    """Random values fast: one block of noise, repeated with a length that no row is a multiple of."""
    flat = weight.view(-1)
    noise = torch.randn(min(flat.numel(), 4_194_301), generator=torch.Generator().manual_seed(7))
    block = (noise * scale).to(weight.dtype)
    for start in range(0, flat.numel(), block.numel()):
        part = flat[start : start + block.numel()]
        part.copy_(block[: part.numel()])


def experts_module(layer: Layer, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Hugging Face's experts module of the layer, random weights."""
    home = importlib.import_module(f"transformers.models.{layer.module}.modeling_{layer.module}")
    words = dict(zip(layer.words, (layer.experts, layer.width), strict=True))
    config = getattr(importlib.import_module("transformers"), layer.classes[1])(
        hidden_size=layer.hidden, num_experts_per_tok=layer.top_k, **words
    )
    with torch.device("meta"):
        module = getattr(home, layer.classes[0])(config)
    module = module.to(dtype).to_empty(device="cpu").requires_grad_(False).eval()
    fill(module.gate_up_proj, layer.hidden**-0.5)
    fill(module.down_proj, layer.width**-0.5)
    return module


def routed(layer: Layer, tokens: int, round_: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    """x, ids and weights of one round: every round other experts, so that no cache remembers them."""
    generator = torch.Generator().manual_seed(round_)
    x = torch.randn(tokens, layer.hidden, generator=generator).to(dtype)
    chosen = torch.rand(tokens, layer.experts, generator=generator).topk(layer.top_k)
    return x, chosen.indices, chosen.values / chosen.values.sum(-1, keepdim=True)


def compare(layer: Layer, module: Any, tokens: int, *, rounds: int, budget: float) -> dict[str, Any]:
    """Time of both and whether they agree, at `tokens` tokens; medians of interleaved rounds that vary the routing."""

    def run(name: str, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        module.config._experts_implementation = name
        y: torch.Tensor = module(*inputs)
        return y

    names = [BASELINE, hf.NAME]
    with torch.no_grad():
        warm = routed(layer, tokens, 0)
        theirs, ours = run(BASELINE, warm).double(), run(hf.NAME, warm).double()
        error = float((ours - theirs).norm() / theirs.norm())
        spent: dict[str, list[float]] = {name: [] for name in names}
        deadline = time.perf_counter() + budget
        for round_ in range(1, rounds + 1):
            inputs = routed(layer, tokens, round_)
            for name in names if round_ % 2 else names[::-1]:
                started = time.perf_counter()
                run(name, inputs)
                spent[name].append(time.perf_counter() - started)
            if time.perf_counter() > deadline and round_ >= 3:
                break
    medians = {name: statistics.median(times) for name, times in spent.items()}
    limit = ROUNDINGS * torch.finfo(torch.bfloat16).eps / 2
    return {
        "layer": layer.name,
        "tokens": tokens,
        "kind": "decode" if tokens <= 16 else "prefill",
        "ms": {name: 1e3 * seconds for name, seconds in medians.items()},
        "speedup": medians[BASELINE] / medians[hf.NAME],
        "rounds": len(spent[BASELINE]),
        "error": error,
        "bound": limit,
        "ok": error <= limit,
    }


def compare_all(*, quick: bool) -> dict[str, Any]:
    """Every layer that fits into half of the free memory, at decode and prefill sizes."""
    plans = [(QWEN3, (1, 16, 128) if quick else (1, 16, 512))] + ([] if quick else [(MIXTRAL, (1, 16, 512))])
    found: list[dict[str, Any]] = []
    skipped = [] if not quick else [f"{MIXTRAL.name}: only without --quick"]
    for layer, tokens in plans:
        need, free = int(1.5 * layer.weight_bytes), free_bytes()
        if need > free:
            skipped.append(f"{layer.name}: needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
            if SMALL.name not in [row["layer"] for row in found] and 1.5 * SMALL.weight_bytes < free:
                layer, tokens = SMALL, (1, 16, 128)
            else:
                continue
        module = experts_module(layer)
        for t in progress(tokens, layer.name):
            found.append(compare(layer, module, t, rounds=9 if quick else 25, budget=3.0 if quick else 8.0))
        del module
    return {"rows": found, "skipped": skipped}
