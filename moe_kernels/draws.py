# SPDX-License-Identifier: Apache-2.0
"""Counter-based random numbers: (seed, step, layer, token, slot) fixes a draw, on every device, rank and thread count.

A draw is splitmix64 of its counters, so nothing is stored and nothing runs in a sequence. What names the forward is its
key. After `set_step(model, step)` the key is made of seed, step and layer. Without it the key of a forward comes from
torch's CPU generator: `torch.manual_seed` fixes it, and activation checkpointing draws the same again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

JITTER, NOISE, SECOND, DROP_ORDER, EXPERT, OUTPUT, INNER, REINIT = range(8)  # what a draw is for: no two share one


def splitmix64(z: Tensor | int) -> Tensor:
    """int64 [...], read as 64 unsigned bits -> int64 [...]. Steele, Lea and Flood 2014."""
    z = torch.as_tensor(z, dtype=torch.int64) - 0x61C8864680B583EB  # + 0x9E3779B97F4A7C15, modulo 2^64
    z = (z ^ _shifted(z, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    z = (z ^ _shifted(z, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def unsigned_mod(z: Tensor, n: int) -> Tensor:
    """z, read as unsigned, modulo n."""
    return (_shifted(z, 1) % n * 2 + (z & 1)) % n


def uniform(key: Tensor, *sizes: int, device: torch.device | str | None = None,
            dtype: torch.dtype = torch.float32) -> Tensor:  # fmt: skip
    """[*sizes] in [0, 1), multiples of 2^-24: the same numbers in float32 and float64."""
    bits = key
    for size in sizes:  # a key without a dimension may be on the CPU whatever the device
        bits = splitmix64((bits[..., None] if bits.dim() else bits) ^ torch.arange(size, device=device))
    return _shifted(bits, 40).to(dtype) * 2.0**-24


def normal(key: Tensor, *sizes: int, device: torch.device | str | None = None,
           dtype: torch.dtype = torch.float32) -> Tensor:  # fmt: skip
    """[*sizes] of N(0, 1), at most 5.4 deviations out."""
    u = uniform(key, *sizes, device=device, dtype=dtype)
    return torch.special.ndtri(u + 2.0**-25)  # type: ignore[no-any-return]


def gumbel(key: Tensor, *sizes: int, device: torch.device | str | None = None,
           dtype: torch.dtype = torch.float32) -> Tensor:  # fmt: skip
    """[*sizes] of the standard Gumbel distribution."""
    return -torch.log(-torch.log(uniform(key, *sizes, device=device, dtype=dtype) + 2.0**-25))


class Draws:
    """The counters of one layer."""

    def __init__(self) -> None:
        self.seed, self.layer = 0, 0
        self.step: Tensor | None = None
        """int64 0-d on the CPU, or None: keys come from torch's generator"""

    def counter(self) -> Tensor:
        """int64 0-d: the step, or a number of torch's generator."""
        return torch.randint(1 << 31, ()) if self.step is None else self.step

    def key(self, purpose: int) -> Tensor:
        """int64 0-d, of (seed, step, layer, purpose)."""
        base = splitmix64(self.counter() << 32 ^ splitmix64(self.seed))
        return splitmix64(base ^ (self.layer << 8 | purpose))


def set_step(model: nn.Module, step: int, *, seed: int = 0) -> int:
    """Fixes all draws of the model's MoE layers by (seed, step, layer); call it once an optimizer step.

    Layers are numbered in the order of `model.modules()`. Every micro-batch of a step, and every rank of the same seed,
    draws the same for the same token index. Returns the number of layers.
    """
    found = [d for m in model.modules() if isinstance(d := getattr(m, "draws", None), Draws)]
    for layer, draws in enumerate(found):
        draws.seed, draws.layer = seed, layer
        if draws.step is None:
            draws.step = torch.tensor(step)
        else:
            draws.step.fill_(step)  # in place: a compiled graph keeps reading it
    return len(found)
