# SPDX-License-Identifier: Apache-2.0
"""Main gradients in the reference: a weight whose gradient is added to a buffer, in the dtype of the sums."""

from typing import Any

import torch
from torch import Tensor


class _IntoMainGrad(torch.autograd.Function):
    """weight in the dtype of main_grad, to which its gradient is added instead of being returned."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, main_grad: Tensor) -> Tensor:
        ctx.main_grad = main_grad
        return weight.to(main_grad.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        ctx.main_grad.add_(grad)
        return None, None


def into_main_grad(weight: Tensor, main_grad: Tensor | None) -> Tensor:
    """weight; where there is a main_grad, its gradient goes there."""
    return weight if main_grad is None else _IntoMainGrad.apply(weight, main_grad)  # type: ignore[no-untyped-call]
