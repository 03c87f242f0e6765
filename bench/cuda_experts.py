# SPDX-License-Identifier: Apache-2.0
"""The expert MLP on a GPU by size, against targets written before any run, and against the peers that are installed.

python bench/cuda_experts.py           needs a GPU: median of 50 runs, CUDA events, L2 cleared before each. Unverified:
                                       no GPU has run it yet; status 1 where a row misses its target
python bench/cuda_experts.py --simt    small sizes, address audit; no time is taken, it would say nothing

A rate is held against what the same GPU reaches in a dense 8192^3 product, a decode against the bandwidth of a copy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import peers
import torch
from cuda_stages import seconds
from shapes import SHAPES, Shape

import moe_kernels as mk

# Shares of the dense product, by architecture. mma.sync reaches all of an A100's tensor cores and 62 % of an H100's.
TARGETS = {
    "grouped_gemm": {80: 0.80, 90: 0.50},
    "forward": {80: 0.70, 90: 0.45},
    "forward and backward": {80: 0.60, 90: 0.40},
    "decode": {80: 0.80, 90: 0.80},  # of a copy's bandwidth, on the bytes of the experts hit
}
TOKENS = {"decode": (1, 16, 64)}
LAYERS = ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v2-lite")


@dataclass(frozen=True)
class Row:
    """One measurement: what runs, who else does the same, what it is measured in."""

    stage: str
    run: Callable[[], object]
    peers: dict[str, Callable[[], object]]  # what does the same, by name
    work: float  # floating-point operations, or bytes of a decode
    least: float  # bytes that must move


def installed(s: Shape, w13: torch.Tensor, w2: torch.Tensor, T: int) -> dict[str, peers.Layer]:
    """The layers of others that run here with these weights."""
    found = {}
    for name in ("torch grouped_mm", "hf grouped_mm", "torch loop"):
        with suppress(peers.UnavailableError):
            found[name] = peers.PEERS[name](s, w13, w2, T)
    return found


def verdict(stage: str, arch: int, share: float, took: float, others: dict[str, float]) -> str:
    """ "met", or what was missed: the target, or the fastest of the others."""
    missed = []
    if share < TARGETS[stage][arch]:
        missed.append(f"{share:.0%} of {TARGETS[stage][arch]:.0%}")
    if others and took > min(others.values()):
        missed.append(f"slower than {min(others, key=others.__getitem__)}")
    return "MISSED: " + ", ".join(missed) if missed else "met"


def rows_of(ops: object, s: Shape, T: int, device: str) -> list[Row]:
    """The rows of one layer and number of tokens. bfloat16."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=g) * scale).to(device, torch.bfloat16)

    x, w13, w2 = normal(T, s.H), normal(s.E, 2 * s.I, s.H, scale=s.H**-0.5), normal(s.E, s.H, s.I, scale=s.I**-0.5)
    routing = ops.route(normal(T, s.E), s.K)
    ids, weights = routing.topk_ids, routing.topk_weights.detach()
    hit = len(ids.unique())
    S, matrix, row = T * s.K, s.H * s.I * 2, s.H * 2
    flops, bytes_once = 6.0 * S * s.H * s.I, 3.0 * hit * matrix
    grads = [t.clone().requires_grad_() for t in (x, w13, w2)]
    pull = normal(T, s.H)

    def both(function: Callable[..., torch.Tensor]) -> None:
        torch.autograd.grad(function(*grads), grads, pull)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return ops.fused_experts(x, w13, w2, weights, ids)

    def without_gradient(layer: peers.Layer) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with torch.no_grad():
                return layer(x, ids, weights)

        return run

    forwards = {name: without_gradient(layer) for name, layer in installed(s, w13, w2, T).items()}
    if T in TOKENS["decode"]:
        return [Row("decode", forward, forwards, bytes_once, bytes_once + 2 * T * row)]
    permuted = ops.permute(x, ids, s.E)
    ends, mT = permuted.expert_offsets[1:], w13.transpose(1, 2)
    trained = {name: partial(both, lambda a, _b, _c, layer=layer: layer(a, ids, weights))
               for name, layer in installed(s, *grads[1:], T).items()}  # fmt: skip
    return [
        Row("grouped_gemm", lambda: ops.grouped_gemm(permuted.x_rows, mT, ends),
            {"torch grouped_mm": lambda: torch.nn.functional.grouped_mm(permuted.x_rows, mT, offs=ends)},
            4.0 * S * s.H * s.I, 2 * hit * matrix + S * (row + 4 * s.I)),
        Row("forward", forward, forwards, flops, bytes_once + (2 * T + S) * row),
        Row("forward and backward", lambda: both(lambda a, b, c: ops.fused_experts(a, b, c, weights, ids)),
            trained, 3 * flops, 3 * bytes_once + (4 * T + 3 * S) * row + 8 * S * s.I),
    ]  # fmt: skip


def on_gpu() -> int:
    """Returns 1 where a row misses its target or is slower than its peer."""
    major, minor = torch.cuda.get_device_capability()
    arch = 90 if major >= 9 else 80
    square = torch.randn(8192, 8192, device="cuda").bfloat16()
    dense = 2 * 8192.0**3 / seconds(lambda: square @ square)
    copy = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    bandwidth = 2 * copy.numel() / seconds(lambda: copy.clone())
    print(f"{torch.cuda.get_device_name()}, sm_{major}{minor}: dense {dense / 1e12:.0f} TFLOP/s, "
          f"copy {bandwidth / 1e12:.2f} TB/s\n")  # fmt: skip
    print("| layer | T | stage | us | share | target | peers, us | verdict |")
    print("| --- | ---: | --- | ---: | ---: | ---: | --- | --- |")
    missed = 0
    for name in LAYERS:
        for T in (*TOKENS["decode"], 4096, 32768):
            for row in rows_of(mk, SHAPES[name], T, "cuda"):
                took = seconds(row.run)
                others = {peer: seconds(run) for peer, run in row.peers.items()}
                share = row.work / took / (bandwidth if row.stage == "decode" else dense)
                said = verdict(row.stage, arch, share, took, others)
                missed += said != "met"
                times = ", ".join(f"{peer} {t * 1e6:.0f}" for peer, t in others.items())
                print(f"| {name} | {T} | {row.stage} | {took * 1e6:.0f} | {share:.0%} | {TARGETS[row.stage][arch]:.0%} "
                      f"| {times} | {said} |")  # fmt: skip
            torch.cuda.empty_cache()
    print(f"\n{missed} rows missed their target" if missed else "\nevery row met its target")
    return int(missed > 0)


def on_emulator() -> int:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import simt_ops

    print("Emulated: bytes counted from the addresses, no time; a copy of a tile in L2 counts again each time.\n")
    print("| stage | H | I | E | K | T | bytes moved / least |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    s = Shape("small", 64, 32, 4, 2, "")
    for T in (16, 96):
        for row in rows_of(simt_ops.BACKEND, s, T, "cpu"):
            with simt_ops.audit() as records:
                row.run()
            moved = 32 * sum(record["served"] for record in records if record["space"] == "global")
            print(f"| {row.stage} | {s.H} | {s.I} | {s.E} | {s.K} | {T} | {moved / row.least:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(on_emulator() if "--simt" in sys.argv[1:] else on_gpu())
