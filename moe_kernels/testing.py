# SPDX-License-Identifier: Apache-2.0
"""Test material: cases of any shape and skew, and error bounds that are derived from the data instead of guessed.

How a bound comes about. The truth is computed in float64. Beside every value of the truth runs sigma, a standard
deviation of what a correct kernel may differ by, to first order, with u the unit roundoff (2^-53, 2^-24, 2^-8, 2^-11
for float64, float32, bfloat16, float16):

    rounding to a dtype     sigma^2 += (u |v|)^2                       one per place where a kernel may store that dtype
    product over k          sigma^2 += k (u |a| |b|)^2                 k roundings of partial sums of at most |a| |b|,
                                                                       of random sign: sqrt(k), not k
    errors of the operands  sigma^2 += sa^2 b^2 + a^2 sb^2             independent, so squares add
    function f              sigma^2 += f'(v)^2 s^2 + (8 u |f|)^2       8 u: a polynomial exp or erf and its surroundings
                            + (2 u |h|)^2 for gelu                     x/2 (1 + erf): terms of size 1 that cancel
    sum over slots          sigma^2 += (K u |part|)^2 a part           K roundings of sums of at most all parts
    slope of f              sigma^2 += (f'(v +- 3 s) - f'(v))^2 + ...  a difference, so that kinks (relu, clamps) count

The bound is SAFETY times sigma: wide enough that rounding does not reach it, narrow enough that one missing term of a
sum, a wrong slot or a bfloat16 sum does. `assert_matches` compares; `must_fail_when_perturbed` is the twin of every
such test: the same comparison with one value moved by four times its bound has to fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .reference import activate, canonical, local_ids
from .schemas import acc_dtype

SAFETY = 4.0
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float64: 0.0, torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-25}


# ---- comparison


def assert_matches(actual: Tensor, truth: Tensor, bound: Tensor | float, name: str = "result") -> None:
    """Raises AssertionError unless |actual - truth| <= bound everywhere; names the worst element. Truth is float64."""
    assert truth.dtype == torch.float64, f"{name}: the truth must be float64, got {truth.dtype}"
    assert actual.shape == truth.shape, f"{name}: shape {list(actual.shape)}, wanted {list(truth.shape)}"
    if actual.numel() == 0:
        return
    bound = torch.as_tensor(bound, dtype=torch.float64).expand_as(truth)
    actual, truth = actual.detach(), truth.detach()
    error = (actual.double() - truth).abs()
    ratio = torch.where(error <= bound, 0.0, error / bound.clamp(min=1e-300)).nan_to_num(nan=math.inf)
    worst = int(ratio.argmax())
    if ratio.flatten()[worst] > 0:
        at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape))
        raise AssertionError(
            f"{name}{list(at)} is {float(actual[at]):.9g}, truth {float(truth[at]):.9g}: off by {float(error[at]):.3g},"
            f" bound {float(bound[at]):.3g}; {int((ratio > 0).sum())} of {ratio.numel()} elements outside"
        )


def must_fail_when_perturbed(actual: Tensor, truth: Tensor, bound: Tensor | float, name: str = "result") -> None:
    """The failing twin: moves the element of the largest bound by four times it and wants assert_matches to raise.

    Where every bound is 0, the result is exact and any change has to be noticed.
    """
    if actual.numel() == 0:
        return
    bound = torch.as_tensor(bound, dtype=torch.float64).expand_as(truth)
    moved = actual.detach().double().flatten().clone()
    at = int(bound.flatten().argmax())
    moved[at] += max(4 * float(bound.flatten()[at]), 1e-30)
    try:
        assert_matches(moved.reshape(truth.shape), truth, bound, name)
    except AssertionError:
        return
    raise AssertionError(f"{name}: the comparison does not notice an error of four times its bound")


def check(actual: Tensor, truth: Tensor, bound: Tensor | float, name: str = "result") -> None:
    """Both: matches, and would not if it were off by four bounds."""
    assert_matches(actual, truth, bound, name)
    must_fail_when_perturbed(actual, truth, bound, name)


# ---- values with their errors


def rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    """What storing a value as dtype may change: half a unit in the last place, float16's subnormals included."""
    return (UNIT[dtype] * value.detach().abs()).clamp(min=SMALLEST[dtype])


@dataclass(frozen=True)
class Noisy:
    """A float64 value and the variance of its error."""

    value: Tensor
    variance: Tensor

    @staticmethod
    def exact(value: Tensor) -> Noisy:
        return Noisy(value, torch.zeros_like(value))

    def rounded(self, dtype: torch.dtype) -> Noisy:
        return Noisy(self.value, self.variance + rounding(self.value, dtype).square())

    def __add__(self, other: Noisy) -> Noisy:
        return Noisy(self.value + other.value, self.variance + other.variance)

    def __mul__(self, other: Noisy) -> Noisy:
        variance = self.variance * other.value.square() + self.value.square() * other.variance
        return Noisy(self.value * other.value, variance)

    def __getitem__(self, index: Any) -> Noisy:
        return Noisy(self.value[index], self.variance[index])

    @property
    def T(self) -> Noisy:
        return Noisy(self.value.T, self.variance.T)

    def matmul(self, other: Noisy, acc: torch.dtype) -> Noisy:
        """A product accumulated in acc, or in that dtype's own order of blocks."""
        (a, b), k = (self.value, other.value), max(self.value.shape[-1], 1)
        partial = k * (UNIT[acc] * (a.abs() @ b.abs())).square()
        return Noisy(a @ b, partial + self.variance @ b.square() + a.square() @ other.variance)

    def total(self, acc: torch.dtype, dim: int = 0) -> Noisy:
        k = max(self.value.shape[dim], 1)
        partial = k * (UNIT[acc] * self.value.abs().sum(dim)).square()
        return Noisy(self.value.sum(dim), partial + self.variance.sum(dim))

    def bound(self, dtype: torch.dtype) -> Tensor:
        """What the result, stored as dtype, may be off by."""
        return SAFETY * self.rounded(dtype).variance.sqrt()


def apply(f: Callable[[Tensor], Tensor], h: Noisy, width: int, acc: torch.dtype) -> Noisy:
    """f [n, width] -> [n, I] where column i of f reads the columns i, i + I, ... of h; derivatives by autograd."""
    with torch.enable_grad():
        leaf = h.value.detach().requires_grad_()
        out = f(leaf)
        (slope,) = (
            torch.autograd.grad(out.sum(), leaf, create_graph=False) if out.numel() else (torch.zeros_like(leaf),)
        )
    parts = (slope.square() * h.variance).unflatten(-1, (-1, width)).sum(-2)
    return Noisy(out.detach(), parts + (8 * UNIT[acc] * out.detach().abs()).square())


# ---- cases


@dataclass(frozen=True)
class Case:
    """One expert layer: its inputs and how fused_experts is to be called on them."""

    x: Tensor
    w13: Tensor
    w2: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    grad_y: Tensor
    activation: str = "silu"
    gated: bool = True
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    interleaved: bool = False
    transposed: bool = False
    expert_map: Tensor | None = None
    weight_on_input: bool = False
    hidden_mask: Tensor | None = None
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702

    def options(self) -> dict[str, Any]:
        """The keyword arguments of fused_experts."""
        names = ("activation", "gated", "w13_bias", "w2_bias", "interleaved", "transposed", "expert_map", "hidden_mask",
                 "swiglu_limit", "swiglu_alpha")  # fmt: skip
        return {name: getattr(self, name) for name in names} | {"apply_router_weight_on_input": self.weight_on_input}

    def leaves(self) -> dict[str, Tensor]:
        """The differentiable inputs, by name."""
        names = ("x", "w13", "w2", "topk_weights", "w13_bias", "w2_bias")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def double(self) -> Case:
        """The same case in float64: where the truth is computed."""
        moved: dict[str, Any] = {name: t.double() for name, t in self.leaves().items()}
        mask = None if self.hidden_mask is None else self.hidden_mask.double()
        return replace(self, **moved, grad_y=self.grad_y.double(), hidden_mask=mask)


def make_ids(T: int, E: int, K: int, skew: str, generator: torch.Generator, device: str = "cpu") -> Tensor:
    """int32 [T, K], distinct in a row. skew: uniform, zipf (as 1/(e+1)), one (all to expert E-1), empty (half idle)."""
    share = torch.ones(E)
    if skew == "zipf":
        share = 1 / torch.arange(1, E + 1)
    elif skew == "empty":
        share[: E - max(K, E // 2)] = 0
    elif skew == "one":
        share[:-1] = 1e-9
    if T == 0:
        return torch.zeros(0, K, dtype=torch.int32, device=device)
    ids = torch.multinomial(share.expand(T, E), K, generator=generator)
    return ids.to(device, torch.int32)


def make_case(
    T: int = 13, H: int = 24, I: int = 16, E: int = 8, K: int = 2, *, dtype: torch.dtype = torch.float32,
    skew: str = "uniform", activation: str = "silu", gated: bool = True, bias: bool = False, interleaved: bool = False,
    transposed: bool = False, expert_map: bool = False, absent: bool = False, weight_on_input: bool = False,
    hidden_mask: bool = False, seed: int = 0, device: str = "cpu",
) -> Case:  # fmt: skip
    """A random case, the same for the same arguments. Values are of the size that trained layers have."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, as_dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(device, as_dtype)

    rows = 2 * I if gated else I
    w13 = normal(E, H, rows, scale=H**-0.5) if transposed else normal(E, rows, H, scale=H**-0.5)
    w2 = normal(E, I, H, scale=I**-0.5) if transposed else normal(E, H, I, scale=I**-0.5)
    known = 2 * E if expert_map else E
    ids = make_ids(T, known, K, skew, g, device)
    if absent:
        gone = torch.rand(T, K, generator=g).to(device)
        ids = torch.where(gone < 0.15, -1, torch.where(gone > 0.9, known + 3, ids)).to(torch.int32)
    places = torch.full((known,), -1, dtype=torch.int64)
    places[torch.randperm(known, generator=g)[:E]] = torch.randperm(E, generator=g)
    weights = torch.rand(T, K, generator=g, dtype=torch.float64).to(device, acc_dtype(dtype))
    mask = (torch.rand(T, K, I, generator=g) > 0.4).to(device, acc_dtype(dtype)) / 0.6
    return Case(
        x=normal(T, H), w13=w13, w2=w2, topk_weights=weights, topk_ids=ids, grad_y=normal(T, H), activation=activation,
        gated=gated, w13_bias=normal(E, rows, scale=0.3) if bias else None,
        w2_bias=normal(E, H, scale=0.3) if bias else None,
        interleaved=interleaved, transposed=transposed, expert_map=places.to(device) if expert_map else None,
        weight_on_input=weight_on_input, hidden_mask=mask if hidden_mask else None,
    )  # fmt: skip


# ---- the expert layer with its errors, forward and backward


def expert_layer(case: Case, *, slots_stored: bool = False) -> dict[str, tuple[Tensor, Tensor]]:
    """Truth and bound of y and of every gradient of sum(y * grad_y), by name: grad_x, grad_w13, ...

    A kernel may round to the dtype of x: the scaled input, both hidden vectors, their gradients and the weighted output
    gradient. Everything else is accumulated in float32 (float64). slots_stored: what a slot adds to y and to grad_x may
    also be rounded, by kernels that store it before the sum over slots, as those for GPUs do.
    """
    dtype, acc, c = case.x.dtype, acc_dtype(case.x.dtype), case.double()
    ids = local_ids(case.topk_ids, case.expert_map)
    w13, w2, b13 = canonical(c.w13, c.w2, c.w13_bias, case.interleaved, case.transposed)
    E, I, K = w13.shape[0], w2.shape[2], ids.shape[1]

    def act(h: Tensor) -> Tensor:
        return activate(h, case.activation, case.gated, case.swiglu_limit, case.swiglu_alpha)

    def zeros(t: Tensor) -> list[Noisy]:
        return [Noisy.exact(torch.zeros_like(t[0])) for _ in range(E)]

    total = {
        name: Noisy.exact(torch.zeros_like(t)) for name, t in (("y", c.x), ("x", c.x), ("topk_weights", c.topk_weights))
    }
    parts = {"w13": zeros(w13), "w2": zeros(w2), "w13_bias": zeros(w13[:, :, 0]), "w2_bias": zeros(w2[:, :, 0])}
    for e in [e for e in ids.unique().tolist() if 0 <= e < E]:
        t, k = torch.where(ids == e)
        w_in, w_out = Noisy.exact(w13[e]), Noisy.exact(w2[e])
        x, weight, gy = Noisy.exact(c.x[t]), Noisy.exact(c.topk_weights[t, k, None]), Noisy.exact(c.grad_y[t])
        row = (weight * x).rounded(dtype) if case.weight_on_input else x
        h = row.matmul(w_in.T, acc).rounded(dtype)
        h = h if b13 is None else (h + Noisy.exact(b13[e])).rounded(dtype)
        a = apply(act, h, I, acc)
        if case.activation.startswith("gelu"):
            terms = h.value.abs().unflatten(-1, (-1, I)).prod(-2)  # |gate up|, or |h|
            a = Noisy(a.value, a.variance + (2 * UNIT[acc] * terms).square())
        keep = None if c.hidden_mask is None else Noisy.exact(c.hidden_mask[t, k])
        a = (a if keep is None else (a * keep)).rounded(dtype)
        out = a.matmul(w_out.T, acc)
        out = out if c.w2_bias is None else (out + Noisy.exact(c.w2_bias[e])).rounded(acc)
        stored = out.rounded(dtype) if slots_stored else out
        _scatter(total["y"], (t,), stored if case.weight_on_input else weight * stored, K * UNIT[acc])
        # backward
        g_out = gy if case.weight_on_input else (weight * gy).rounded(dtype)
        g_a = g_out.matmul(w_out, acc).rounded(dtype)
        g_kept = g_a if keep is None else g_a * keep
        slope = _slopes(act, h, I, acc)
        doubled = Noisy(
            g_kept.value.repeat(1, 2 if case.gated else 1), g_kept.variance.repeat(1, 2 if case.gated else 1)
        )
        g_h = (doubled * slope).rounded(dtype)
        g_row = g_h.matmul(w_in, acc)
        g_slot = weight * g_row if case.weight_on_input else g_row
        _scatter(total["x"], (t,), g_slot.rounded(dtype) if slots_stored else g_slot, K * UNIT[acc])
        g_weight = ((x * g_row) if case.weight_on_input else (gy * out)).total(acc, -1)
        _scatter(total["topk_weights"], (t, k), g_weight, UNIT[acc])
        parts["w13"][e] = g_h.T.matmul(row, acc)
        parts["w2"][e] = g_out.T.matmul(a, acc)
        parts["w13_bias"][e], parts["w2_bias"][e] = g_h.total(acc), g_out.total(acc)
    result = {"y": (total["y"].value, total["y"].bound(dtype))}
    for name, t in case.leaves().items():
        if name in total:
            result["grad_" + name] = (total[name].value, total[name].bound(t.dtype))
        else:
            stack = Noisy(*(torch.stack([getattr(p, field) for p in parts[name]]) for field in ("value", "variance")))
            result["grad_" + name] = tuple(_layout(case, name, v) for v in (stack.value, stack.bound(t.dtype)))  # type: ignore[assignment]
    return result


def _scatter(total: Noisy, index: tuple[Tensor, ...], part: Noisy, unit: float) -> None:
    """Adds a part to its token's sum; `unit` of each part is what the roundings of the partial sums come to."""
    total.value.index_put_(index, part.value, accumulate=True)
    total.variance.index_put_(index, part.variance + (unit * part.value).square(), accumulate=True)


def _slopes(f: Callable[[Tensor], Tensor], h: Noisy, width: int, acc: torch.dtype) -> Noisy:
    """The derivatives of the columns of f by their columns of h, and what h's error does to them."""

    def slope_at(v: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = v.detach().requires_grad_()
            return torch.autograd.grad(f(leaf).sum(), leaf, materialize_grads=True)[0]

    slope, step = slope_at(h.value), 3 * h.variance.sqrt()
    block = torch.arange(h.value.shape[-1], device=h.value.device) // width
    spread = torch.zeros_like(slope)
    for moved in block.unique():
        shift = torch.where(block == moved, step, 0.0)
        up, down = slope_at(h.value + shift) - slope, slope_at(h.value - shift) - slope
        spread = spread + torch.maximum(up.abs(), down.abs()).square()
    size = slope.abs() + h.value.abs()  # a slope is a sum of terms, none larger than this
    return Noisy(slope, spread + (8 * UNIT[acc] * size).square())


def _layout(case: Case, name: str, t: Tensor) -> Tensor:
    """A gradient in canonical layout -> the layout of the parameter."""
    if case.interleaved and name in ("w13", "w13_bias"):
        gate, up = t.chunk(2, 1)
        t = torch.stack([gate, up], 2).flatten(1, 2)
    return t.mT if case.transposed and t.dim() == 3 else t


def gradients(y: Tensor, grad_y: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """grad_<name> of sum(y * grad_y); 0 where y does not depend on a leaf."""
    if not y.requires_grad:
        return {"grad_" + name: torch.zeros_like(t) for name, t in leaves.items()}
    found = torch.autograd.grad(y, list(leaves.values()), grad_y, materialize_grads=True)
    return {"grad_" + name: g for name, g in zip(leaves, found)}
