# SPDX-License-Identifier: Apache-2.0
"""float64 results whose sums were made in another order: how far apart they may be, from the lengths of the sums.

A sum of n products has 2n roundings on the longest way to its end, and both results have gone such ways; each rounding
moves its partial sum by eps/2 of that at most, and a partial sum is no larger than a few times the largest element of
the result or than 1, the size of what goes in. So: eps * 2 * (n1 + n2 + ...) * max(1, largest). Bounds of this kind are
far from the typical error and still a hundred thousand times below that of a value that was float32 once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ACTIVATION = 16
"""roundings of an activation, or of a softmax beside its sums"""


def experts(H: int, I: int, K: int) -> tuple[int, ...]:
    """The sums on the way through an expert layer and back: to the hidden units, to the output, over the experts."""
    return (H, ACTIVATION, I, K) * 2


def bound(wanted: Tensor, *sums: int) -> float:
    assert wanted.dtype == torch.float64
    largest = float(wanted.detach().abs().max()) if wanted.numel() else 0.0
    return float(torch.finfo(torch.float64).eps) * 2 * sum(sums) * max(1.0, largest)


def within(found: Tensor, wanted: Tensor, *sums: int) -> bool:
    """Whether no element is further away than the bound; NaN is."""
    return found.shape == wanted.shape and bool(((found - wanted).abs() <= bound(wanted, *sums)).all())


def check(found: Tensor, wanted: Tensor, *sums: int, what: Any) -> None:
    far = (found - wanted).abs().max() if found.numel() else 0.0
    assert within(found, wanted, *sums), f"{what}: {float(far):.3g} away, {bound(wanted, *sums):.3g} allowed"
