# SPDX-License-Identifier: Apache-2.0
"""The expert MLP of a block: `fused_experts` where it computes the block's activation, else step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ..experts import activation_name


def expert_mlp(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    act_fn: Any,
    *,
    gated: bool = True,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    transposed: bool = False,
    dropout: float = 0.0,
    weight_on_input: bool = False,
) -> Tensor:
    """The arguments of `fused_experts`, with the activation as a module or function; returns [T, H] in x.dtype.

    dropout: rate of an ordinary dropout on the activation, drawn as one mask [T, K, I].
    """
    rows, name = x.to(w13.dtype), activation_name(act_fn)
    if name is None or w2.dtype != w13.dtype:  # another dtype for w2: kept in float32 beside 16-bit experts
        activate = _gate(act_fn) if gated else act_fn
        y = _by_steps(
            rows, w13, w2, topk_weights, topk_ids, activate, w13_bias, w2_bias, transposed, dropout, weight_on_input
        )
        return y.to(x.dtype)
    mask = None
    if dropout > 0:
        width = w2.shape[1 if transposed else 2]
        ones = torch.ones((*topk_ids.shape, width), dtype=topk_weights.dtype, device=x.device)
        mask = F.dropout(ones, dropout)
    y = ops.fused_experts(
        rows, w13, w2, topk_weights, topk_ids, activation=name, gated=gated, w13_bias=w13_bias, w2_bias=w2_bias,
        transposed=transposed, hidden_mask=mask, apply_router_weight_on_input=weight_on_input,
    )  # fmt: skip
    return y.to(x.dtype)


def _gate(act_fn: Any) -> Callable[[Tensor], Tensor]:
    def activate(h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        return act_fn(gate) * up  # type: ignore[no-any-return]

    return activate


def _by_steps(
    x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, activate: Any, w13_bias: Tensor | None,
    w2_bias: Tensor | None, transposed: bool, dropout: float, weight_on_input: bool,
) -> Tensor:  # fmt: skip
    rows = ops.permute(x, topk_ids, w2.shape[0])
    ends, x_rows = rows.expert_offsets[1:], rows.x_rows
    if weight_on_input:
        slot = rows.row_to_slot.long()  # -1 behind the last used row: that row is 0 whatever the weight
        x_rows = x_rows * topk_weights.reshape(-1)[slot, None].to(x_rows.dtype)
        topk_weights = torch.ones_like(topk_weights)
    h = activate(ops.grouped_gemm(x_rows, w13 if transposed else w13.mT, ends, bias=w13_bias))
    if dropout > 0:
        h = F.dropout(h, dropout)
    y_rows = ops.grouped_gemm(h.to(w2.dtype), w2 if transposed else w2.mT, ends, bias=w2_bias)
    return ops.unpermute(y_rows, rows.slot_to_row, topk_weights)
