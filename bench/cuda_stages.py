# SPDX-License-Identifier: Apache-2.0
"""The CUDA stages by size: on a GPU their time and bandwidth, on the emulator (--simt) the bytes that they move.

python bench/cuda_stages.py           needs a GPU: median of 50 runs, CUDA events, L2 cleared before each
python bench/cuda_stages.py --simt    small sizes, address audit; no time is taken, it would say nothing
"""

from __future__ import annotations

import importlib
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from shapes import SHAPES, Shape

import moe_kernels as mk


def cases(ops: object, T: int, s: Shape, device: str) -> dict[str, tuple[Callable[[], object], int]]:
    """Stage -> (a call, the bytes that it must move at least). bfloat16."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(T, s.E, generator=g).to(device, torch.bfloat16).requires_grad_()
    x = torch.randn(T, s.H, generator=g).to(device, torch.bfloat16)
    routing = ops.route(logits, s.K)
    ids, weights = routing.topk_ids, routing.topk_weights.detach().requires_grad_()
    rows = ops.permute(x, ids, s.E)
    leaf = rows.x_rows.detach().requires_grad_()
    y = ops.unpermute(leaf, rows.slot_to_row, weights)
    S, row = T * s.K, s.H * 2
    pull, pull_y = torch.ones_like(routing.topk_weights), torch.ones_like(y)
    backward = partial(torch.autograd.grad, retain_graph=True)
    return {
        "route": (lambda: ops.route(logits.detach(), s.K), logits.nbytes + T * (s.K * 8 + 4)),
        "route_backward": (lambda: backward(routing.topk_weights, logits, pull), 2 * logits.nbytes + T * s.K * 12),
        "permute": (lambda: ops.permute(x, ids, s.E), T * row + S * row + S * 12),
        "unpermute": (lambda: ops.unpermute(leaf.detach(), rows.slot_to_row, weights.detach()), (S + T) * row + S * 8),
        "unpermute_backward": (lambda: backward(y, (leaf, weights), pull_y), (2 * S + T) * row + S * 12),
    }


def seconds(call: Callable[[], object]) -> float:
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(60):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[10:])


def cupy_take(x: torch.Tensor, row_to_slot: torch.Tensor, K: int) -> Callable[[], object] | None:
    """CuPy's gather of the same rows, on torch's stream and memory; None where CuPy is not installed."""
    try:
        cupy = importlib.import_module("cupy")
    except ImportError:
        return None
    source = mk.interop.to_dlpack(x.view(torch.int16), cupy)  # CuPy has no bfloat16: the bits will do
    rows = mk.interop.to_dlpack(row_to_slot // K, cupy)

    def take() -> object:
        with mk.interop.cupy_stream():
            return cupy.take(source, rows, axis=0)

    return take


def on_gpu() -> None:
    copy = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    bandwidth = 2 * copy.numel() / seconds(lambda: copy.clone())
    print(f"{torch.cuda.get_device_name()}: a copy moves {bandwidth / 1e12:.2f} TB/s\n")
    print("| stage | shape | T | us | TB/s of the least bytes | of a copy |\n| --- | --- | ---: | ---: | ---: | ---: |")
    for name in ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3"):
        for T in (64, 8192, 65536):
            for stage, (call, least) in cases(mk, T, SHAPES[name], "cuda").items():
                t = seconds(call)
                rate = least / t
                print(f"| {stage} | {name} | {T} | {t * 1e6:.1f} | {rate / 1e12:.2f} | {rate / bandwidth:.0%} |")
            s = SHAPES[name]
            x = torch.randn(T, s.H, device="cuda", dtype=torch.bfloat16)
            ids = torch.rand(T, s.E, device="cuda").topk(s.K).indices
            if take := cupy_take(x, mk.permute(x, ids, s.E).row_to_slot, s.K):
                print(f"| cupy.take of the rows | {name} | {T} | {seconds(take) * 1e6:.1f} | | |")


def on_emulator() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import simt_ops

    print("Emulated: bytes counted from the addresses, no time.\n")
    print("| stage | H | E | K | T | bytes moved / least |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    s = Shape("small", 64, 0, 32, 4, "")
    for stage, (call, least) in cases(simt_ops.BACKEND, 256, s, "cpu").items():
        with simt_ops.audit() as records:
            call()
        moved = 32 * sum(record["served"] for record in records if record["space"] == "global")
        print(f"| {stage} | {s.H} | {s.E} | {s.K} | 256 | {moved / least:.2f} |")


if __name__ == "__main__":
    on_emulator() if "--simt" in sys.argv[1:] else on_gpu()
