# SPDX-License-Identifier: Apache-2.0
"""Chances behind a plan: how many ranks a token reaches, how full a rank gets, how often a capacity drops.

A token draws K distinct experts of E. Without a load every set of K is as likely as any other; with one, the choice is
the least committed (of maximum entropy) in which every expert gets its share: a set is as likely as the product of its
experts' odds. All is float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import check


def hit_uniform(sizes: Tensor, E: int, K: int) -> Tensor:
    """float64 like sizes: the chance that at least one of K distinct experts of E is among m, for every m of sizes."""
    m = sizes.double()
    missed = torch.ones_like(m)
    for i in range(K):
        missed = missed * ((E - m - i) / (E - i)).clamp(min=0)
    return 1 - missed


def odds(inclusion: Tensor, K: int, *, tolerance: float = 1e-10, steps: int = 200) -> Tensor:
    """Odds [E] with which a choice of K distinct experts takes each with the chance inclusion [E] (in (0, 1), sum K).

    Every round moves the log-odds towards those wanted, by three quarters: the chances are negatively correlated, so
    that a whole step could swing for ever (two experts, K = 1).
    """
    w = inclusion / (1 - inclusion)
    wanted = torch.logit(inclusion)
    for _ in range(steps):
        missed = _missed(_polynomials(w[:, None], K))
        if float((1 - missed - inclusion).abs().max()) < tolerance:
            break
        w = w * torch.exp(0.75 * (wanted - torch.log((1 - missed) / missed)))
        w = w * (K / (w / (1 + w)).sum())  # the scale is free: keep e_K within float64
    return w


def hits_of_load(load: Tensor, K: int, groupings: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
    """For each (bins int [E], number of bins): float64 [bins], the chance that a token touches each.

    load [E]: with which chance each of K distinct experts is taken; sums to K, none above 1.
    """
    sure = load >= 1 - 1e-9
    free = (~sure & (load > 0)).nonzero().flatten()
    left = K - int(sure.sum())
    w = torch.zeros(0, dtype=torch.float64)
    if left and len(free) > left:  # else nothing to choose
        w = odds(load[free] * (left / load[free].sum()), left)
    found = []
    for bins, num_bins in groupings:
        hit = torch.zeros(num_bins, dtype=torch.float64)
        if len(w):
            hit = 1 - _missed(_polynomials(_by_bin(w, bins[free], num_bins), left))
        elif left:
            hit[bins[free]] = 1
        hit[bins[sure]] = 1
        found.append(hit)
    return found


def _by_bin(w: Tensor, bins: Tensor, num_bins: int) -> Tensor:
    """[bins, most]: the odds in every bin, filled up with 0."""
    order = torch.argsort(bins, stable=True)
    sizes = torch.bincount(bins, minlength=num_bins)
    place = torch.arange(len(bins)) - (sizes.cumsum(0) - sizes)[bins[order]]
    table = torch.zeros(num_bins, int(sizes.max()), dtype=torch.float64)
    table[bins[order], place] = w[order]
    return table


def _polynomials(w: Tensor, K: int) -> Tensor:
    """[bins, n] odds -> [bins, K + 1]: symmetric polynomials e_0 .. e_K, the coefficients of prod(1 + w z)."""
    rows = torch.zeros(*w.shape, K + 1, dtype=torch.float64)
    rows[..., 0], rows[..., 1] = 1, w
    while rows.shape[1] > 1:
        if rows.shape[1] % 2:
            rows = torch.cat([rows, _one(rows[:, :1])], 1)
        rows = _times(rows[:, 0::2], rows[:, 1::2])
    return rows[:, 0]


def _missed(rows: Tensor) -> Tensor:
    """[bins, K + 1] -> [bins]: the chance that no expert of a bin is chosen: e_K of all others over e_K of all."""
    others = _others(rows)
    K = rows.shape[1] - 1
    return others[:, K] / _times(rows[:1], others[:1])[0, K]


def _others(rows: Tensor) -> Tensor:
    """The product of all rows but each itself: nothing is divided, so nothing cancels."""
    n = len(rows)
    if n == 1:
        return _one(rows)
    padded = torch.cat([rows, _one(rows[:1])]) if n % 2 else rows
    even, odd = padded[0::2], padded[1::2]
    outside = _others(_times(even, odd))
    return torch.stack([_times(outside, odd), _times(outside, even)], 1).flatten(0, 1)[:n]


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Products of polynomials [..., K + 1] up to degree K."""
    K = a.shape[-1] - 1
    c = torch.zeros_like(a)
    for k in range(K + 1):
        c[..., k:] += a[..., k : k + 1] * b[..., : K + 1 - k]
    return c


def _one(like: Tensor) -> Tensor:
    row = torch.zeros_like(like)
    row[..., 0] = 1
    return row


def p99(mean: float, variance: float, most: int) -> float:
    """What a sum of many independent tokens stays within in 99 of 100 steps (normal approximation)."""
    return min(mean + 2.3263478740408408 * math.sqrt(max(variance, 0.0)), most)


def slots_variance(held: Tensor, E: int, K: int) -> Tensor:
    """Variance of the slots that one token brings to a rank with `held` of E experts (hypergeometric)."""
    p = held.double() / E
    return K * p * (1 - p) * ((E - K) / max(E - 1, 1))


def overflow(tokens: int, chance: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Of X ~ Binomial(tokens, chance): (P(X > capacity), E[max(X - capacity, 0)]), float64 like chance [E]."""
    check.count("overflow", "capacity", capacity, 0)
    capacity = min(capacity, tokens)
    k = torch.arange(capacity + 1, tokens + 1, dtype=torch.float64)
    n = torch.tensor(float(tokens), dtype=torch.float64)
    ways = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    distinct, which = torch.unique(chance.double(), return_inverse=True)
    over, beyond = [], []
    for p in distinct[:, None].split(max(1, 2**20 // max(1, len(k)))):
        pmf = torch.exp(ways + torch.special.xlogy(k, p) + torch.special.xlogy(n - k, 1 - p))
        over.append(pmf.sum(1))
        beyond.append(pmf @ (k - capacity))
    return torch.cat(over)[which], torch.cat(beyond)[which]
