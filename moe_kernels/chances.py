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

from . import check


def hit_uniform(sizes: Tensor, E: int, K: int) -> Tensor:
    """float64 like sizes: the chance that at least one of K distinct experts of E is among m, for every m of sizes."""
    m = sizes.double()
    missed = torch.ones_like(m)
    for i in range(K):
        missed = missed * ((E - m - i) / (E - i)).clamp(min=0)
    return 1 - missed


def odds(inclusion: Tensor, K: int, *, tolerance: float = 1e-10, steps: int = 500) -> Tensor:
    """Odds [E] with which a choice of K distinct experts takes each with the chance inclusion [E] (all < 1, sum K).

    Every round multiplies an odds by wanted / reached (Chen, Dempster and Liu 1994, Biometrika 81).
    """
    w = inclusion / (1 - inclusion)
    for _ in range(steps):
        reached = 1 - _missed(w, K, [1] * len(w))
        if float((reached - inclusion).abs().max()) < tolerance:
            break
        w = w * inclusion / reached.clamp(min=1e-300)
        w = w * (inclusion.sum() / (w / (1 + w)).sum())  # the scale is free: keep e_K within float64
    return w


def hit_of_load(load: Tensor, K: int, bins: Tensor, num_bins: int) -> Tensor:
    """float64 [num_bins]: the chance that a token's K distinct experts touch each bin. load [E] sums to K, none above
    1; bins int [E]: of every expert."""
    hit = torch.zeros(num_bins, dtype=torch.float64)
    sure = load >= 1 - 1e-9
    hit[bins[sure]] = 1
    free = (~sure & (load > 0)).nonzero().flatten()
    left = K - int(sure.sum())
    if not left or not len(free):
        return hit
    order = free[torch.argsort(bins[free], stable=True)]
    share = load[order] * (left / load[order].sum())
    if len(order) == left:  # nothing to choose
        hit[bins[order]] = 1
        return hit
    sizes = torch.bincount(bins[order], minlength=num_bins)
    return torch.maximum(hit, 1 - _missed(odds(share, left), left, sizes.tolist()))


def _missed(w: Tensor, K: int, sizes: Sequence[int]) -> Tensor:
    """The chance that no expert of each consecutive bin is chosen: e_K of the others' odds over e_K of all."""
    ends, end = [], 0
    for size in sizes:
        end += size
        ends.append(end)
    ahead, behind = _symmetric(w, K), _symmetric(w.flip(0), K)
    first = torch.tensor([e - s for e, s in zip(ends, sizes)])
    last = len(w) - torch.tensor(ends)
    return (ahead[first] * behind[last].flip(1)).sum(1) / ahead[-1, K]


def _symmetric(w: Tensor, K: int) -> Tensor:
    """[E + 1, K + 1]: elementary symmetric polynomials e_0 .. e_K of the first 0 .. E odds."""
    rows = [[1.0] + [0.0] * K]
    for odd in w.tolist():
        last = rows[-1]
        rows.append([1.0] + [last[k] + odd * last[k - 1] for k in range(1, K + 1)])
    return torch.tensor(rows, dtype=torch.float64)


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
    tails = torch.zeros(2, len(distinct), dtype=torch.float64)
    for i, p in enumerate(distinct):
        pmf = torch.exp(ways + torch.special.xlogy(k, p) + torch.special.xlogy(n - k, 1 - p))
        tails[0, i], tails[1, i] = pmf.sum(), (pmf * (k - capacity)).sum()
    return tails[0][which], tails[1][which]
