# SPDX-License-Identifier: Apache-2.0
"""The expert MLP against Hugging Face's default, "grouped_mm", on the same weights, and the memory of a forward."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import roofline
import torch
from shapes import MIXTRAL, QWEN3, SHAPES, Shape, routed

from moe_kernels.demo import full_size

LAYERS = {QWEN3.name: full_size.QWEN3, MIXTRAL.name: full_size.MIXTRAL}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NAMES = ("moe_kernels", "grouped_mm")


class Weights:
    """One experts module at a time: a full-size layer is up to 5.6 GB."""

    def __init__(self) -> None:
        self.key: tuple[str, str] | None = None
        self.module: Any = None

    def get(self, shape: Shape, dtype: str) -> Any:
        if self.key != (shape.name, dtype):
            self.module = None
            gc.collect()
            need, free = int(1.3 * shape.weight_bytes(DTYPES[dtype])), full_size.free_bytes()
            if need > free:
                pytest.skip(f"{shape.name} {dtype} needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
            self.module = full_size.experts_module(LAYERS[shape.name], DTYPES[dtype])
            self.key = (shape.name, dtype)
        return self.module


@pytest.fixture(scope="module")
def weights() -> Iterator[Weights]:
    pytest.importorskip("transformers")
    holder = Weights()
    yield holder
    holder.module = None


def caller(module: Any, name: str) -> Callable[..., torch.Tensor]:
    def call(*inputs: torch.Tensor) -> torch.Tensor:
        module.config._experts_implementation = name
        return module(*inputs)

    return call


def inputs_of(shape: Shape, tokens: int, dtype: torch.dtype) -> Callable[[int], tuple[torch.Tensor, ...]]:
    def prepare(round_: int) -> tuple[torch.Tensor, ...]:
        x = torch.randn(tokens, shape.H, generator=torch.Generator().manual_seed(round_)).to(dtype)
        return (x, *routed(shape, tokens, round_))

    return prepare


def bound_ms(shape: Shape, tokens: int, dtype: torch.dtype, matmuls: int = 1) -> float:
    """The slower of reading the weights of the experts that were hit and of multiplying."""
    hit = len(routed(shape, tokens, 1)[0].unique())
    read = hit / shape.E * shape.weight_bytes(dtype) / (roofline.read_gb_per_s() * 1e9)
    flops = matmuls * 2 * 3 * tokens * shape.K * shape.H * shape.I / (roofline.peak_gflops(dtype) * 1e9)
    return 1e3 * max(read, flops)


CASES = [(shape, dtype, tokens) for shape in (QWEN3, MIXTRAL) for dtype in DTYPES for tokens in (1, 16, 512)]
LABELS = [f"{shape.name}-{dtype}-T{tokens}" for shape, dtype, tokens in CASES]


@pytest.mark.parametrize(("shape", "dtype", "tokens"), CASES, ids=LABELS)
def test_forward(shape: Shape, dtype: str, tokens: int, weights: Weights, against: Callable[..., float]) -> None:
    module = weights.get(shape, dtype).requires_grad_(False)
    ours, theirs = (caller(module, name) for name in NAMES)
    rounds = 21 if tokens <= 16 else (9 if shape is QWEN3 else 5)
    with torch.no_grad():
        limit = bound_ms(shape, tokens, DTYPES[dtype])
        prepare = inputs_of(shape, tokens, DTYPES[dtype])
        against(ours, theirs, "grouped_mm", prepare=prepare, rounds=rounds, bound_ms=limit)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("name", [QWEN3.name, MIXTRAL.name])
def test_forward_backward(name: str, dtype: str, weights: Weights, against: Callable[..., float]) -> None:
    shape, tokens = SHAPES[name], 512
    if 3.2 * shape.weight_bytes(DTYPES[dtype]) > full_size.free_bytes() + shape.weight_bytes(DTYPES[dtype]):
        pytest.skip(f"{name} {dtype}: no memory for its gradients")
    module = weights.get(shape, dtype).requires_grad_(True)

    def both(implementation: str) -> Callable[..., None]:
        forward = caller(module, implementation)

        def call(x: torch.Tensor, ids: torch.Tensor, topk_weights: torch.Tensor) -> None:
            module.zero_grad(set_to_none=True)
            y = forward(x.requires_grad_(), ids, topk_weights.requires_grad_())
            y.backward(torch.ones_like(y))

        return call

    limit = bound_ms(shape, tokens, DTYPES[dtype], matmuls=3)
    prepare = inputs_of(shape, tokens, DTYPES[dtype])
    against(both(NAMES[0]), both(NAMES[1]), "grouped_mm", prepare=prepare, rounds=5, bound_ms=limit)
    module.zero_grad(set_to_none=True)


PEAK = """
import sys, torch
from moe_kernels.demo import full_size
sys.path.insert(0, {folder!r})
from shapes import SHAPES, routed
import moe_kernels as mk
shape, dtype, tokens = SHAPES[{name!r}], getattr(torch, {dtype!r}), 512
w13 = torch.empty(shape.E, 2 * shape.I, shape.H, dtype=dtype); full_size.fill(w13, 0.02)
w2 = torch.empty(shape.E, shape.H, shape.I, dtype=dtype); full_size.fill(w2, 0.02)
x, (ids, weights) = torch.randn(tokens, shape.H).to(dtype), routed(shape, tokens)
def status(word):
    return int(next(l for l in open("/proc/self/status") if l.startswith(word)).split()[1]) * 1024
with torch.no_grad():
    mk.fused_experts(x[:1], w13, w2, weights[:1], ids[:1])
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    y = mk.fused_experts(x, w13, w2, weights, ids)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", [QWEN3.name, MIXTRAL.name])
def test_peak_memory_of_a_forward(name: str, dtype: str, remember: Callable[..., None]) -> None:
    """At most 1.2 x (S x 2I + S x H) elements beyond the inputs, plus O(S) and a megabyte for the process itself."""
    shape, tokens = SHAPES[name], 512
    need = int(1.2 * shape.weight_bytes(getattr(torch, dtype)))
    if need > full_size.free_bytes():
        pytest.skip(f"{need / 1e9:.1f} GB needed")
    script = PEAK.format(folder=str(Path(__file__).parent), name=name, dtype=dtype)
    exact = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed blocks go back, so that the peak shows new ones
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=exact)
    assert done.returncode == 0, done.stderr
    S = tokens * shape.K
    bar = 1.2 * (S * 2 * shape.I + S * shape.H) * getattr(torch, dtype).itemsize + 64 * S + (1 << 20)
    used = int(done.stdout.split()[-1])
    remember(f"peak_memory[{name}-{dtype}-T512]", used / 1e6, bar / 1e6, "MB")
    assert used <= bar, f"{used / 1e6:.1f} MB, the bar is {bar / 1e6:.1f} MB"
