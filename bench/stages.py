# SPDX-License-Identifier: Apache-2.0
"""The stages beside the expert layer, each one row: route, permute, unpermute, the AVX2 level, threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from cases import BF16, QWEN3
from measure import in_turn
from shapes import routed

import moe_kernels as mk
from moe_kernels import _build
from moe_kernels.demo import full_size

BUDGET = 3.0
Row = dict[str, Any]


def _against(name: str, sides: dict[str, Callable[..., Any]], prepare: Callable[[int], Any], bar: float) -> Row:
    ours, peer = sides
    times = in_turn(sides, prepare, BUDGET)
    ms = {side: 1e3 * times.median(side) for side in sides}
    return {"name": name, "ms": ms, "value": ms[peer] / ms[ours], "bar": bar, "unit": f"x {peer}"}


def route() -> Row:
    def prepare(round_: int) -> tuple[torch.Tensor]:
        return (torch.randn(2048, 256, generator=torch.Generator().manual_seed(round_)),)

    sides = {"moe_kernels": lambda x: mk.route(x, 8), "torch softmax + topk": lambda x: torch.softmax(x, -1).topk(8)}
    return _against("route 2048 x 256, K 8", sides, prepare, 8.0)


def permute() -> Row:
    """Against a plain copy of as many rows, into fresh memory as well."""
    source = torch.ones(2048 * QWEN3.K, QWEN3.H, dtype=BF16)

    def prepare(round_: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(2048, QWEN3.H, dtype=BF16), routed(QWEN3, 2048, round_)[0]

    sides = {"moe_kernels": lambda x, ids: mk.permute(x, ids, QWEN3.E), "plain copy": lambda x, ids: source.clone()}
    return _against("permute 2048 x 8 rows of 2048", sides, prepare, 0.8)


def unpermute() -> Row:
    """Against a plain copy of as many rows, although it writes only an eighth."""
    to = torch.empty(2048 * QWEN3.K, QWEN3.H, dtype=BF16)
    source = torch.ones_like(to)

    def prepare(round_: int) -> tuple[torch.Tensor, ...]:
        ids, weights = routed(QWEN3, 2048, round_)
        return source, mk.permute(torch.ones(2048, QWEN3.H, dtype=BF16), ids, QWEN3.E).slot_to_row, weights

    sides = {"moe_kernels": mk.unpermute, "plain copy": lambda *_: to.copy_(source)}
    return _against("unpermute 2048 x 8 rows of 2048", sides, prepare, 0.8)


def threads() -> Row:
    """Qwen3 at T=512 with one thread and with all."""
    w13 = torch.empty(QWEN3.E, 2 * QWEN3.I, QWEN3.H, dtype=BF16)
    w2 = torch.empty(QWEN3.E, QWEN3.H, QWEN3.I, dtype=BF16)
    full_size.fill(w13, QWEN3.H**-0.5)
    full_size.fill(w2, QWEN3.I**-0.5)
    count = torch.get_num_threads()

    def on(number: int) -> Callable[..., None]:
        def call(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
            torch.set_num_threads(number)
            mk.fused_experts(x, w13, w2, weights, ids)
            torch.set_num_threads(count)

        return call

    def prepare(round_: int) -> tuple[torch.Tensor, ...]:
        x = torch.randn(512, QWEN3.H, generator=torch.Generator().manual_seed(round_)).to(BF16)
        return (x, *routed(QWEN3, 512, round_))

    sides = {f"{count} threads": on(count), "one thread": on(1)}
    return _against(f"{count} threads, forward qwen3-30b-a3b bfloat16 T=512", sides, prepare, 0.925 * count)


def avx2() -> Row:
    """The AVX2 level in its own process: 64 rows an expert, float32, of the multiply-add limit of that level."""
    name, env = "AVX2 level, 64 rows an expert, float32", {**os.environ, "MOE_KERNELS_ISA": "avx2"}
    levels = _build.info()["isa_levels"]
    if not isinstance(levels, list) or "avx2" not in levels:
        return {"name": name, "skipped": "this processor has no AVX2"}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"name": name, "skipped": done.stderr.strip().splitlines()[-1]}
    return {"name": name, "bar": 0.8, "unit": "of the multiply-add limit", **json.loads(done.stdout)}


def _rows_of_64() -> None:
    experts, rows, n, k = 16, 64, 1536, 2048
    b = torch.randn(experts, n, k).transpose(1, 2)
    ends = torch.arange(1, experts + 1, dtype=torch.int32) * rows
    sides = {"moe_kernels": lambda a: mk.grouped_gemm(a, b, ends)}
    times = in_turn(sides, lambda round_: (torch.randn(experts * rows, k),), BUDGET)
    limit = times.limit(2.0 * experts * rows * n * k, 0)
    ms = 1e3 * times.median("moe_kernels")
    print(json.dumps({"ms": {"moe_kernels": ms, "limit": 1e3 * limit}, "value": 1e3 * limit / ms}))


STAGES: dict[str, Callable[[], Row]] = {
    "route": route, "permute": permute, "unpermute": unpermute, "threads": threads, "avx2": avx2,
}  # fmt: skip

if __name__ == "__main__":
    _rows_of_64()
