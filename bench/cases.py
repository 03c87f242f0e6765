# SPDX-License-Identifier: Apache-2.0
"""The table of the benchmark: what is measured, against whom, and what it should reach."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peers import OURS
from shapes import SHAPES, Shape

BF16, FP32 = torch.bfloat16, torch.float32
QWEN3, MIXTRAL = SHAPES["qwen3-30b-a3b"], SHAPES["mixtral-8x7b"]
DEEPSEEK, SWITCH = SHAPES["deepseek-v2-lite"], SHAPES["switch-base-64"]


@dataclass(frozen=True)
class Bar:
    """What `OURS` should reach. read: time over a plain read; limit: share of the roofline; else: times the peer."""

    against: str
    bar: float
    aim: float

    def holds(self, value: float) -> bool:
        return value <= self.bar if self.against == "read" else value >= self.bar

    def text(self, value: float) -> str:
        if self.against == "limit":
            return f"{value:.0%} of the limit (bar {self.bar:.0%}, aim {self.aim:.0%})"
        if self.against == "read":
            return f"{value:.2f} x a plain read (bar {self.bar:.2f}, aim {self.aim:.2f})"
        return f"{value:.2f} x {self.against} (bar {self.bar:.2f}, aim {self.aim:.2f})"


@dataclass(frozen=True)
class Case:
    """One experts layer at one size."""

    shape: Shape
    dtype: torch.dtype
    tokens: int
    bars: tuple[Bar, ...]
    training: bool = False
    quick: bool = False  # part of --quick too

    @property
    def name(self) -> str:
        kind = "training" if self.training else "forward"
        return f"{kind} {self.shape.name} {str(self.dtype).removeprefix('torch.')} T={self.tokens}"

    @property
    def bytes_needed(self) -> int:
        """Of weights, a copy (packed, or the peer's), and gradients of two sides."""
        return self.shape.weight_bytes(self.dtype) * (4 if self.training else 3)


HF, ZEN, TORCH = "hf grouped_mm", "zentorch", "torch grouped_mm"

LAYERS: tuple[Case, ...] = (
    Case(QWEN3, BF16, 1, (Bar("read", 1.15, 1.05),), quick=True),
    Case(QWEN3, BF16, 16, (Bar("read", 1.15, 1.05),), quick=True),
    Case(QWEN3, BF16, 128, (Bar("limit", 0.78, 0.88), Bar(ZEN, 1.15, 1.4)), quick=True),
    Case(QWEN3, BF16, 512, (Bar("limit", 0.88, 0.95), Bar(ZEN, 1.15, 1.3)), quick=True),
    Case(QWEN3, BF16, 2048, (Bar("limit", 0.88, 0.93), Bar(ZEN, 1.05, 1.15))),
    Case(DEEPSEEK, BF16, 512, (Bar("limit", 0.85, 0.93),)),
    Case(MIXTRAL, BF16, 512, (Bar("limit", 0.85, 0.93),)),
    Case(QWEN3, FP32, 512, (Bar(HF, 3.5, 4.5),), quick=True),
    Case(QWEN3, FP32, 2048, (Bar(HF, 3.5, 4.5),)),
    Case(MIXTRAL, FP32, 512, (Bar(HF, 1.0, 1.15),)),
    Case(SWITCH, BF16, 16, (Bar(TORCH, 2.5, 3.2),), quick=True),
    Case(SWITCH, BF16, 512, (Bar(TORCH, 2.5, 3.2),), quick=True),
    Case(QWEN3, BF16, 512, (Bar(HF, 2.0, 3.0),), training=True),
    Case(QWEN3, BF16, 2048, (Bar(HF, 1.7, 2.2),), training=True),
    Case(QWEN3, FP32, 512, (Bar(HF, 3.0, 4.5),), training=True),
    Case(SWITCH, BF16, 2048, (Bar(TORCH, 2.0, 3.0),), training=True),
)

__all__ = ["BF16", "FP32", "LAYERS", "MIXTRAL", "OURS", "QWEN3", "SWITCH", "Bar", "Case"]
