# SPDX-License-Identifier: Apache-2.0
"""Timing in turn and checking against float64. No peer's time counts unless its numbers are right."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import roofline
import torch
import torch.nn.functional as F
from peers import ACTIVATIONS, Layer
from shapes import Shape

Check = Callable[[Layer], float]  # the error of a layer
SAMPLES = 6  # rows, drawn at random, whose value is computed in float64
ROUNDINGS = 8  # to the dtype of the tensors, on the way of one element: more than any side has


@dataclass
class Times:
    """Seconds of every side and the limits of the same rounds."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    flops_per_s: list[float] = field(default_factory=list)
    read_per_s: list[float] = field(default_factory=list)

    def median(self, side: str) -> float:
        return statistics.median(self.seconds[side])

    def limit(self, flops: float, bytes_: float) -> float:
        """The slower of multiplying and of reading, in seconds."""
        return max(flops / statistics.median(self.flops_per_s), bytes_ / statistics.median(self.read_per_s))


def in_turn(sides: dict[str, Callable[..., Any]], prepare: Callable[[int], Sequence[Any]], budget: float) -> Times:
    """Runs every side once a round, first a different one each round, on inputs that change from round to round."""
    times = Times({name: [] for name in sides})
    names = list(sides)

    def once(name: str, inputs: Sequence[Any]) -> float:
        started = time.perf_counter()
        sides[name](*inputs)
        return time.perf_counter() - started

    warm = {name: once(name, prepare(0)) for name in names}
    quick = [name for name in names if warm[name] < budget / 12]
    rounds = min(25, max(3, int(budget / (sum(warm[name] for name in quick) + 0.04))))
    for round_ in range(1, rounds + 1):
        inputs = prepare(round_)
        for i in range(len(names)):
            name = names[(i + round_) % len(names)]
            if name in quick or round_ <= 3:  # a slow side has its three rounds
                times.seconds[name].append(once(name, inputs))
        times.flops_per_s.append(roofline.flops_per_s())
        times.read_per_s.append(roofline.read_bytes_per_s())
    return times


def bound(dtype: torch.dtype, shape: Shape) -> float:
    """Relative, of a whole row: the roundings to dtype, and a float32 sum over the longer side in any order."""
    return ROUNDINGS * torch.finfo(dtype).eps / 2 + max(shape.H, shape.I) ** 0.5 * torch.finfo(torch.float32).eps


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def _mlp(shape: Shape, x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    h = x @ w13.T
    a = ACTIVATIONS[shape.act](h[:, : shape.I]) * h[:, shape.I :] if shape.gated else F.relu(h)
    return a @ w2.T


def rows_in_float64(
    shape: Shape, w13: torch.Tensor, w2: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """y of the given rows, differentiable in x and weights where these ask for it."""
    rows = []
    for t in range(len(x)):
        parts = [
            weights[t, k] * _mlp(shape, x[t : t + 1], w13[e].double(), w2[e].double())
            for k, e in enumerate(ids[t].tolist())
        ]
        rows.append(torch.cat(parts).sum(0))
    return torch.stack(rows)


def forward_check(shape: Shape, w13: torch.Tensor, w2: torch.Tensor, inputs: Sequence[Any]) -> Check:
    """Of SAMPLES random rows of the output; their float64 is computed once for all layers."""
    x, ids, weights = inputs
    some = torch.randperm(len(x))[:SAMPLES]
    with torch.no_grad():
        wanted = rows_in_float64(shape, w13, w2, x[some].double(), ids[some], weights[some].double())

    def error(layer: Layer) -> float:
        with torch.no_grad():
            return relative_error(layer(x, ids, weights)[some], wanted)

    return error


def training_check(shape: Shape, w13: torch.Tensor, w2: torch.Tensor, inputs: Sequence[Any]) -> Check:
    """The largest error of: d x of SAMPLES random rows, d w13 and d w2 of one expert."""
    x, ids, weights = inputs[0].detach().requires_grad_(), inputs[1], inputs[2].detach().requires_grad_()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(x.dtype)
    some = torch.randperm(len(x))[:SAMPLES]
    x64 = x[some].detach().double().requires_grad_()
    y64 = rows_in_float64(shape, w13.detach(), w2.detach(), x64, ids[some], weights[some].detach().double())
    y64.backward(grad[some].double())
    e = int(ids[0, 0])
    token, k = (ids == e).nonzero(as_tuple=True)
    w13_64, w2_64 = (w[e].detach().double().requires_grad_() for w in (w13, w2))
    rows = _mlp(shape, x[token].detach().double(), w13_64, w2_64) * weights[token, k, None].detach().double()
    rows.backward(grad[token].double())

    def error(layer: Layer) -> float:
        x.grad = weights.grad = w13.grad = w2.grad = None
        layer(x, ids, weights).backward(grad)
        found = [(x.grad[some], x64.grad), (w13.grad[e], w13_64.grad), (w2.grad[e], w2_64.grad)]
        errors = [relative_error(ours, wanted) for ours, wanted in found]
        w13.grad = w2.grad = None
        return max(errors)

    return error
