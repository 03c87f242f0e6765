# SPDX-License-Identifier: Apache-2.0
"""Roofline sheet of the CUDA stages: a model, not measured.

    python bench/cuda_model.py

For each stage and shape: bytes that must move, bytes that this kernel moves, what an H100 SXM would need for them and
for the instructions at least, and which of the two bounds it. The bytes are exact (tests/test_cuda_kernels.py counts
them from the addresses); the instructions are counted by hand in the machine code, loop by loop; clocks and bandwidth
are those of the data sheet. A model like this is off by 20 to 30 %, more where launches count.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from shapes import SHAPES, Shape

PROCESSORS, CLOCK, ISSUE = 132, 1.755e9, 4  # H100 SXM: multiprocessors, boost clock, warp instructions a clock
BANDWIDTH = 3.35e12  # bytes a second
LAUNCH = 2.5e-6  # seconds from launch to launch in a stream
BLOCKS = 1056  # of route, at most


@dataclass(frozen=True)
class Work:
    """What a stage does: bytes at least, bytes moved, warp instructions, launches."""

    least: float
    moved: float
    instructions: float
    launches: int

    def seconds(self) -> dict[str, float]:
        return {
            "memory": self.moved / BANDWIDTH,
            "issue slots": self.instructions / (PROCESSORS * CLOCK * ISSUE),
            "launches": self.launches * LAUNCH,
        }


def route(T: int, s: Shape, size: int) -> Work:
    rounds = ceil(s.E / 32)
    least = T * (s.E * size + s.K * 8 + 4)
    blocks = min(BLOCKS, ceil(T / 8))
    flush = blocks * min(s.E * 4, ceil(T / blocks) * s.K * 32)
    # a pass of 32 experts: clean and max 9, exp and sum 36, quotient and key 24, first look 5; a choice: 24 + 6 a pass
    instructions = T * (74 * rounds + s.K * (24 + 6 * rounds) + 160)
    return Work(least, least + flush, instructions, 2)


def route_backward(T: int, s: Shape, size: int) -> Work:
    rounds = ceil(s.E / 32)
    least = T * (2 * s.E * size + s.K * 12)
    return Work(least, least, T * (115 * rounds + 420), 1)


def permute(T: int, s: Shape, size: int) -> Work:
    S = T * s.K
    tiles = ceil(S / 2048) if S > 16384 else 0
    index = S * 4 * (2 + 2) + tiles * s.E * 4 * 5 + (S * 4 * 2 if tiles else 0)
    row = s.H * size
    least = T * row + S * row + S * 4 * 3
    # every copy of a token is read on its own; what L2 keeps of it is not counted
    return Work(least, 2 * S * row + index, S * (70 + ceil(row / 512) * 8), 4 if tiles else 2)


def unpermute(T: int, s: Shape, size: int) -> Work:
    S, row = T * s.K, s.H * size
    least = S * row + T * row + S * 8
    parts = ceil(row / 512)
    return Work(least, least, T * parts * (40 + s.K * 36), 1)


def unpermute_backward(T: int, s: Shape, size: int) -> Work:
    S, row = T * s.K, s.H * size
    least = 2 * S * row + T * row + S * 12
    return Work(least, 3 * S * row + S * 40, S * (120 + ceil(row / 512) * 60), 3)


STAGES = (route, route_backward, permute, unpermute, unpermute_backward)


def main() -> None:
    print("Model of an H100 SXM in bfloat16, not measured.\n")
    print("| stage | shape | T | bytes moved / least | at least | bound by | share of copy bandwidth |")
    print("| --- | --- | ---: | ---: | ---: | --- | ---: |")
    for stage in STAGES:
        for name in ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3"):
            for T in (64, 8192, 65536):
                work = stage(T, SHAPES[name], 2)
                seconds = work.seconds()
                bound = max(seconds, key=lambda what: seconds[what])
                least = work.least / BANDWIDTH
                print(
                    f"| {stage.__name__} | {name} | {T} | {work.moved / work.least:.2f} | "
                    f"{seconds[bound] * 1e6:.1f} us | {bound} | {least / seconds[bound]:.0%} |"
                )


if __name__ == "__main__":
    main()
