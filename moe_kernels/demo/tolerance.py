# SPDX-License-Identifier: Apache-2.0
"""What "the same" means: a rounding-sized change of the experts, and what it does to everything behind it.

Two correct implementations add the same numbers in another order, so the output of one layer differs by a relative
    delta = eps * (sqrt(H) + sqrt(I) + sqrt(K) + 4) (products of length H and I, K summands, the activation).
How far a delta in the experts moves a logit, a gradient or the loss of step 50 depends on the network. It is measured:
the reference runs again with every expert output, and every gradient that reaches it, multiplied by 1 +- delta
(random signs). A quantity is the same when ours is no further from the reference than SLACK times that run, plus delta
times its own size.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

SLACK = 4.0


def layer_delta(hidden: int, width: int, top_k: int, dtype: torch.dtype = torch.float32) -> float:
    """The relative rounding error to expect of one experts layer."""
    return torch.finfo(dtype).eps * (math.sqrt(hidden) + math.sqrt(width) + math.sqrt(top_k) + 4)


class _Nudge(torch.autograd.Function):
    """y * (1 +- delta), and the same for the gradient on its way back."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, delta: float, generator: torch.Generator) -> torch.Tensor:
        signs = torch.randint(0, 2, y.shape, generator=generator, dtype=torch.int8).to(y.dtype) * 2 - 1
        ctx.factor = 1 + delta * signs.roll(1, dims=0)
        return y * (1 + delta * signs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0] * ctx.factor, None, None


def experts_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules of a model that stand behind Hugging Face's experts interface."""
    return [m for m in model.modules() if hasattr(m, "has_gate") and hasattr(m, "down_proj")]


@contextlib.contextmanager
def nudged(model: torch.nn.Module, delta: float, seed: int = 0) -> Iterator[None]:
    """While open, every experts layer of the model is off by a relative delta, forward and backward."""
    generator = torch.Generator().manual_seed(seed)

    def nudge(_module: torch.nn.Module, _args: Any, y: torch.Tensor) -> torch.Tensor:
        return _Nudge.apply(y, delta, generator)  # type: ignore[no-any-return, no-untyped-call]

    hooks = [module.register_forward_hook(nudge) for module in experts_modules(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """2-norm of the difference; a NaN on either side is infinitely far."""
    d = float(torch.linalg.vector_norm(a.double() - b.double()))
    return d if math.isfinite(d) else math.inf


def bound(reference: torch.Tensor, nudges: list[torch.Tensor], delta: float) -> float:
    """How far from the reference a correct result may be, given the reference's nudged runs."""
    moved = max(distance(reference, nudge) for nudge in nudges)
    return SLACK * (moved + delta * float(torch.linalg.vector_norm(reference.double())))
