# SPDX-License-Identifier: Apache-2.0
"""The backward of every op, each beside what it keeps. Selection, index maps and counts carry no gradient.

Second derivatives exist for `grouped_gemm`, whose backward is made of itself; the other backward ops have none.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import register_autocast, register_autograd

from .schemas import DTYPE_CODE, NAMESPACE

# ---- route: keeps logits, ids and weights, O(T*K) beside the logits that the router has anyway; one pass over the
# ---- logits serves the weights, the logsumexp (z-loss) and the sums of the scores (balance losses)


def _route_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, ctx.scoring, ctx.renormalize, ctx.eps, ctx.scale, ctx.softcap = inputs[:7]
    ctx.score_groups, ctx.normalize = inputs[12:]
    topk_weights, topk_ids, counts, _, _ = output
    ctx.save_for_backward(logits, topk_ids, topk_weights)
    ctx.mark_non_differentiable(topk_ids, counts)
    ctx.set_materialize_grads(False)


def _route_backward(
    ops: Any, ctx: Any, grad_weights: Tensor | None, _ids: None, _counts: None, grad_lse: Tensor | None,
    grad_sums: Tensor | None,
) -> Any:  # fmt: skip
    none = (None,) * 13
    grad_lse = grad_lse if ctx.scoring == 0 else None
    grad_sums = grad_sums if ctx.score_groups else None
    if grad_weights is None and grad_lse is None and grad_sums is None:
        return None, *none
    rule = (ctx.scoring, ctx.renormalize, ctx.eps, ctx.scale, ctx.softcap, ctx.normalize)
    return ops.route_backward.default(grad_weights, grad_lse, grad_sums, *ctx.saved_tensors, *rule), *none


# ---- expert_choice, sinkhorn: the choice has no gradient, the weights that of route for the same ids

_PLAIN = (False, 0.0, 1.0, 0.0, False)  # not renormalised, eps, scale, no softcap; the scores as they are


def _chosen_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    topk_weights, topk_ids, *rest = output
    ctx.scoring, ctx.arguments = int(bool(rest) and topk_ids.shape[1] == 1), len(inputs)
    ctx.save_for_backward(inputs[0], topk_ids, topk_weights)
    ctx.mark_non_differentiable(topk_ids, *rest)
    ctx.set_materialize_grads(False)


def _chosen_backward(ops: Any, ctx: Any, grad_weights: Tensor | None, *_rest: None) -> Any:
    none = (None,) * (ctx.arguments - 1)
    if grad_weights is None:
        return None, *none
    logits, topk_ids, topk_weights = ctx.saved_tensors
    rule = (ctx.scoring, *_PLAIN)
    return ops.route_backward.default(grad_weights, None, None, logits, topk_ids, topk_weights, *rule), *none


# ---- sum_scores: keeps the logits


def _sum_scores_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, *rule, mask = inputs
    ctx.rule = rule
    ctx.save_for_backward(logits, mask)
    ctx.set_materialize_grads(False)


def _sum_scores_backward(ops: Any, ctx: Any, grad_sums: Tensor | None) -> Any:
    none = (None,) * 5
    if grad_sums is None:
        return None, *none
    logits, mask = ctx.saved_tensors
    return ops.sum_scores_backward.default(grad_sums, logits, *ctx.rule, mask), *none


# ---- permute: a row's gradient goes back to its token


def _permute_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, row_to_slot, slot_to_row, expert_offsets = output
    ctx.num_tokens = inputs[0].shape[0]
    ctx.save_for_backward(slot_to_row)
    ctx.mark_non_differentiable(row_to_slot, slot_to_row, expert_offsets)
    ctx.set_materialize_grads(False)


def _permute_backward(ops: Any, ctx: Any, grad_rows: Tensor | None, *_maps: None) -> Any:
    none = (None,) * 3
    if grad_rows is None:
        return None, *none
    (slot_to_row,) = ctx.saved_tensors
    return ops.permute_backward.default(grad_rows, slot_to_row, ctx.num_tokens), *none


# ---- grouped_gemm: dA = dOut b^T, dB = a^T dOut, dbias = 1^T dOut, each again one of its four cases. A main gradient
# ---- takes dB; it is no saved tensor, for other backwards may add to it before this one does


def _grouped_gemm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, offs, bias, _, ctx.allow_tf32, ctx.main_grad = inputs
    needs_a, needs_b = ctx.needs_input_grad[:2]
    ctx.save_for_backward(a if needs_b else None, b if needs_a else None, offs)
    ctx.a_dtype, ctx.b_dtype = a.dtype, b.dtype
    ctx.rows, ctx.groups, ctx.bias_dtype = a.shape[-2], output.dim() == 3, None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _grouped_gemm_backward(ops: Any, ctx: Any, grad: Tensor | None) -> Any:
    if grad is None:
        return (None,) * 7
    a, b, offs = ctx.saved_tensors
    needs_a, needs_b, _, needs_bias = ctx.needs_input_grad[:4]
    grad = grad.to(ctx.a_dtype)
    rest = (DTYPE_CODE[ctx.a_dtype], ctx.allow_tf32, None)
    product = ops.grouped_gemm.default
    grad_a = product(grad, b.mT, offs, None, *rest) if needs_a else None
    grad_b = product(a.mT, grad, offs, None, *rest) if needs_b and ctx.main_grad is None else None
    if needs_b and ctx.main_grad is not None:
        ops.grouped_gemm_backward.default(a, grad, offs, ctx.main_grad, ctx.allow_tf32)
    grad_bias = None
    if needs_bias:
        shape = (grad.shape[0], 1, ctx.rows) if ctx.groups else (1, ctx.rows)
        ends = None if ctx.groups else offs
        grad_bias = product(grad.new_ones(shape), grad, ends, None, *rest).squeeze(1).to(ctx.bias_dtype)
    return grad_a, grad_b, None, grad_bias, None, None, None


# ---- unpermute: rows get the weighted token gradient, weights the scalar product with their row


def _unpermute_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _unpermute_backward(ops: Any, ctx: Any, grad_y: Tensor | None) -> Any:
    if grad_y is None:
        return None, None, None
    grad_rows, grad_weights = ops.unpermute_backward.default(grad_y, *ctx.saved_tensors)
    return grad_rows, None, grad_weights


# ---- fused_experts: keeps its inputs and, unless it is to recompute, the first product

_DIFFERENTIABLE = (0, 1, 2, 3, 5, 6)  # x, w13, w2, topk_weights, w13_bias, w2_bias among the arguments


def _fused_experts_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1], *inputs[:9])
    ctx.rule, ctx.main_grads = inputs[9:17], inputs[17:19]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _fused_experts_backward(ops: Any, ctx: Any, grad_y: Tensor | None, _hidden: None) -> Any:
    grads: list[Tensor | None] = [None] * 20
    wanted = [argument for argument in _DIFFERENTIABLE if ctx.needs_input_grad[argument]]
    if grad_y is None or not wanted:
        return tuple(grads)
    needs = sum(1 << bit for bit, argument in enumerate(_DIFFERENTIABLE) if argument in wanted)
    main_grads = [main if argument in wanted else None for argument, main in zip((1, 2), ctx.main_grads)]
    found = ops.fused_experts_backward.default(grad_y, *ctx.saved_tensors, *ctx.rule, *main_grads, needs)
    added = [argument for argument, main in zip((1, 2), main_grads) if main is not None]
    for argument, grad in zip(_DIFFERENTIABLE, found):
        grads[argument] = grad if argument in wanted and argument not in added else None
    return tuple(grads)


FORMULAS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "route": (_route_backward, _route_setup),
    "expert_choice": (_chosen_backward, _chosen_setup),
    "sinkhorn": (_chosen_backward, _chosen_setup),
    "sum_scores": (_sum_scores_backward, _sum_scores_setup),
    "permute": (_permute_backward, _permute_setup),
    "grouped_gemm": (_grouped_gemm_backward, _grouped_gemm_setup),
    "unpermute": (_unpermute_backward, _unpermute_setup),
    "fused_experts": (_fused_experts_backward, _fused_experts_setup),
}


def install(namespace: str = NAMESPACE, names: Iterable[str] = tuple(FORMULAS)) -> None:
    """Registers the backward of the ops `names`, and the autocast rule of the router: routing is done in float32."""
    for name in names:
        backward, setup = FORMULAS[name]
        register_autograd(f"{namespace}::{name}", partial(backward, getattr(torch.ops, namespace)), setup_context=setup)
    for device in ("cpu", "cuda") if "route" in names else ():
        register_autocast(f"{namespace}::route", device, torch.float32)
