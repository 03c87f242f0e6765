# SPDX-License-Identifier: Apache-2.0
"""Random sizes, dtypes and options until a time is over: the bodies of the stage tests on cases that nobody chose.
`make fuzz`, or

    python tests/fuzz.py                              # ten minutes, CPU kernels and emulator in turn
    python tests/fuzz.py --seconds 3600 --backend cpu
    python tests/fuzz.py --seed 4711 --cases 1        # one case again

A case is a function of its seed alone; one that fails is printed with it. Ends with 1 if any failed.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import conftest
import simt_ops
import test_fused_experts
import test_grouped_gemm
import test_permute
import test_route
import test_unpermute
import torch

from moe_kernels.schemas import ACTIVATIONS, SCORING
from moe_kernels.testing import make_case

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SKEWS = ("uniform", "zipf", "one", "empty")
Case = tuple[str, Callable[[SimpleNamespace], Any]]


def size(draw: random.Random, most: int) -> int:
    """1 to `most`, the small ones and the multiples of 8 more often: both kinds of tail."""
    chosen = int(most ** draw.random())
    return min(most, -(-chosen // 8) * 8) if draw.random() < 0.4 else chosen


def tokens(draw: random.Random, most: int) -> int:
    return 0 if draw.random() < 0.03 else size(draw, most)


def experts(draw: random.Random, small: bool) -> dict[str, Any]:
    most = 64 if small else 400
    E = size(draw, 40 if small else 300)
    K = min(E, size(draw, 9))
    case: dict[str, Any] = {
        "T": tokens(draw, most // K + 1),
        "H": size(draw, most),
        "I": size(draw, most),
        "E": E,
        "K": K,
    }
    flags = ("gated", "bias", "interleaved", "transposed", "expert_map", "absent", "weight_on_input", "hidden_mask")
    case |= {flag: draw.random() < 0.4 for flag in flags}
    case["activation"] = draw.choice(ACTIVATIONS)
    case["gated"] |= case["activation"] == "swigluoai" or case["interleaved"]
    case["expert_map"] &= 2 * E >= K
    return case | {"skew": draw.choice(SKEWS), "dtype": draw.choice(DTYPES), "seed": draw.randrange(2**31)}


def run_experts(case: dict[str, Any], recompute: bool, backend: SimpleNamespace) -> None:
    test_fused_experts.compare(backend, make_case(**case), recompute)


def draw_case(seed: int, small: bool) -> Case:
    """What runs, in words, and its body. `small`: the emulator's sizes."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype, g = draw.choice(DTYPES), torch.Generator().manual_seed(seed)
    E, most = size(draw, 64 if small else 2048), 48 if small else 300
    K = min(E, size(draw, 33))
    T, H, align = tokens(draw, most), size(draw, most), draw.choice((1, 1, 4, 16))
    stage = draw.choice(("route", "permute", "unpermute", "grouped_gemm", "fused_experts", "fused_experts"))
    if stage == "fused_experts":
        case, recompute = experts(draw, small), draw.random() < 0.3
        return f"{stage} {case} recompute={recompute}", partial(run_experts, case, recompute)
    sizes: tuple[Any, ...]
    if stage == "route":
        sizes = (T, E, K, dtype, draw.choice(tuple(test_route.RULES)), draw.choice(tuple(SCORING)))
        body = test_route.compare
    elif stage == "permute":
        sizes, body = (T, H, E, K, dtype, align, draw.choice(SKEWS), g), test_permute.compare
    elif stage == "unpermute":
        sizes, body = (T, H, E, K, dtype, align, draw.choice((None, torch.bfloat16)), g), test_unpermute.compare
    else:
        kind = draw.choice(test_grouped_gemm.CASES)
        groups, k, N = size(draw, 8 if small else 64), size(draw, most), size(draw, most)
        sizes = (kind, T, k, N, groups, dtype, kind != "columns" and draw.random() < 0.5)
        body = test_grouped_gemm.compare
    return f"{stage} {sizes}", lambda backend: body(backend, *sizes)


def fails(seed: int, backend: SimpleNamespace) -> str:
    """What was wrong with this case there, or ""."""
    what, body = draw_case(seed, small=backend is simt_ops.BACKEND)
    simt_ops.restart(seed)
    try:
        body(backend)
    except Exception as error:
        return f"{backend.name}, seed {seed}: {what}\n    {type(error).__name__}: {error}"
    return ""


def campaign(backends: list[SimpleNamespace], seeds: range, seconds: float) -> tuple[int, list[str]]:
    """Cases run and what was wrong, the backends in turn, until the seeds or the seconds end."""
    end, count, wrong = time.monotonic() + seconds, 0, []
    for seed in seeds:
        for backend in backends:
            if time.monotonic() > end:
                return count, wrong
            count += 1
            if error := fails(seed, backend):
                print(error, flush=True)
                wrong.append(error)
    return count, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=None, help="of the first case; without it, another every time")
    parser.add_argument("--cases", type=int, default=10**9)
    parser.add_argument("--backend", choices=("cpu", "simt", "both"), default="both")
    given = parser.parse_args()
    first = random.SystemRandom().randrange(2**30) if given.seed is None else given.seed
    backends = [conftest.CPU] * (given.backend != "simt") + [simt_ops.BACKEND] * (given.backend != "cpu")
    if simt_ops.BACKEND in backends and (reason := simt_ops.missing()):
        sys.exit(f"--backend {given.backend}: {reason}")
    count, wrong = campaign(backends, range(first, first + given.cases), given.seconds)
    print(f"{count} cases from seed {first} on, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
