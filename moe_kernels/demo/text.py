# SPDX-License-Identifier: Apache-2.0
"""The text of the demo: the source of Python's standard library, because every machine has it: nothing to ship."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def standard_library(max_bytes: int = 1 << 20) -> torch.Tensor:
    """Bytes of the standard library's own modules, in the order of their names: uint8 [N], N <= max_bytes."""
    text = bytearray()
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= max_bytes:
            break
    if len(text) < 4096:  # a Python without its sources: what it can tell about itself
        text += "\n".join(str(getattr(thing, "__doc__", "")) for thing in vars(os).values()).encode() * 8
    return torch.frombuffer(text[:max_bytes], dtype=torch.uint8).clone()


def batch(text: torch.Tensor, step: int, rows: int, length: int) -> torch.Tensor:
    """`rows` windows of the text, int64 [rows, length]; the same step gives the same windows."""
    generator = torch.Generator().manual_seed(1000 + step)
    starts = torch.randint(0, text.numel() - length, (rows,), generator=generator)
    return torch.stack([text[s : s + length] for s in starts.tolist()]).long()
