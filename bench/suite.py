# SPDX-License-Identifier: Apache-2.0
"""The benchmark: `make bench`, or `python bench/suite.py [--quick] [--only WORD] [--out DIR]`.

Every layer of cases.py with ours and every installed peer in turn, then the stages. A layer that needs more memory than
is free is reported as skipped. Writes cpu.json, cpu.md, cpu.png.
"""

from __future__ import annotations

import argparse
import gc
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peers
import report
import torch
from cases import LAYERS, Case
from measure import bound, forward_check, in_turn, training_check
from shapes import routed
from stages import STAGES

import moe_kernels as mk
from moe_kernels.demo import full_size

BUDGET, QUICK_BUDGET = 6.0, 3.0  # seconds a case


def weights_of(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    s = case.shape
    w13 = torch.empty(s.E, (2 if s.gated else 1) * s.I, s.H, dtype=case.dtype)
    w2 = torch.empty(s.E, s.H, s.I, dtype=case.dtype)
    full_size.fill(w13, s.H**-0.5)
    full_size.fill(w2, s.I**-0.5)
    return w13.requires_grad_(case.training), w2.requires_grad_(case.training)


def inputs_of(case: Case) -> Callable[[int], tuple[torch.Tensor, ...]]:
    def prepare(round_: int) -> tuple[torch.Tensor, ...]:
        x = torch.randn(case.tokens, case.shape.H, generator=torch.Generator().manual_seed(round_)).to(case.dtype)
        return (x, *routed(case.shape, case.tokens, round_))

    return prepare


def training_step(layer: peers.Layer, w13: torch.Tensor, w2: torch.Tensor) -> Callable[..., None]:
    def step(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        w13.grad = w2.grad = None
        y = layer(x.detach().requires_grad_(), ids, weights.detach().requires_grad_())
        y.backward(torch.ones_like(y))

    return step


def work_of(case: Case) -> tuple[float, float]:
    """Operations and bytes that cannot be avoided: the weights of the experts hit, in training read twice and, of all
    experts, written once."""
    s = case.shape
    hit = len(routed(s, case.tokens, 1)[0].unique()) / s.E
    flops = 2 * s.matrices * case.tokens * s.K * s.H * s.I
    bytes_ = s.weight_bytes(case.dtype)
    return (3 * flops, (2 * hit + 1) * bytes_) if case.training else (flops, hit * bytes_)


def run_layer(case: Case, budget: float) -> dict[str, Any]:
    """One row: the medians of all sides, their errors, the limit, and who sat out and why."""
    w13, w2 = weights_of(case)
    prepare, sides, errors, out = inputs_of(case), {}, {}, {}
    error_of = (training_check if case.training else forward_check)(case.shape, w13, w2, prepare(0))
    for name, make in peers.PEERS.items():
        try:
            layer = make(case.shape, w13, w2, case.tokens)
            errors[name] = error_of(layer)
        except peers.UnavailableError as reason:
            out[name] = str(reason)
            continue
        except Exception as error:  # a peer's own failure is a finding, not the end of the run
            if name == peers.OURS:
                raise
            out[name] = f"failed: {str(error).strip().splitlines()[0][:120]}"
            continue
        sides[name] = training_step(layer, w13, w2) if case.training else layer
    with torch.set_grad_enabled(case.training):
        times = in_turn(sides, prepare, budget)
    w13.grad = w2.grad = None
    flops, bytes_ = work_of(case)
    limit, read = times.limit(flops, bytes_), times.limit(0, bytes_)
    limit_of_error = bound(case.dtype, case.shape)
    wrong = {name: error for name, error in errors.items() if not error <= limit_of_error}
    return {
        "name": case.name,
        "ms": {name: 1e3 * times.median(name) for name in sides},
        "rounds": len(times.flops_per_s),
        "limit_ms": 1e3 * limit,
        "limited_by": "read" if read == limit else "multiply-add",
        "read_ms": 1e3 * read,
        "gflops": sorted(times.flops_per_s)[len(times.flops_per_s) // 2] / 1e9,
        "read_gb_per_s": sorted(times.read_per_s)[len(times.read_per_s) // 2] / 1e9,
        "errors": errors,
        "error_bound": limit_of_error,
        "wrong": sorted(wrong),
        "absent": out,
        "bars": [report.verdict(case, bar, times, limit, read, wrong) for bar in case.bars],
    }


def run(*, quick: bool, only: str, out: Path) -> int:
    """All of it. Returns 0, or 1 where our own numbers were wrong or a case failed."""
    if not mk._build.ops_loaded:
        print(f"bench: the compiled kernels are not loaded. {mk._build.reason}", file=sys.stderr)
        return 2
    budget, rows, failed = QUICK_BUDGET if quick else BUDGET, [], 0
    for case in LAYERS:
        if (quick and not case.quick) or only not in case.name:
            continue
        if case.bytes_needed > full_size.free_bytes():
            rows.append({"name": case.name, "skipped": f"needs {case.bytes_needed / 1e9:.0f} GB of free memory"})
        else:
            try:
                rows.append(run_layer(case, budget))
            except Exception:
                traceback.print_exc()
                rows.append({"name": case.name, "skipped": "failed, see the terminal"})
                failed += 1
        gc.collect()
        print(report.line(rows[-1]), flush=True)
    stages = [stage() for name, stage in STAGES.items() if only in name]
    for row in stages:
        print(report.stage_line(row), flush=True)
    report.write(rows, stages, out)
    ours_wrong = [row["name"] for row in rows if peers.OURS in row.get("wrong", ())]
    if ours_wrong:
        print(f"bench: WRONG numbers of ours: {', '.join(ours_wrong)}", file=sys.stderr)
    return 1 if ours_wrong or failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="moe_kernels bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer layers and rounds: about two minutes")
    parser.add_argument("--only", default="", metavar="WORD", help="cases and stages with this word in their name")
    parser.add_argument("--out", default="bench_out", metavar="DIR", type=Path, help="folder of the report (bench_out)")
    asked = parser.parse_args(arguments)
    return run(quick=asked.quick, only=asked.only, out=asked.out)


if __name__ == "__main__":
    sys.exit(main())
