# SPDX-License-Identifier: Apache-2.0
"""What every op returns, without computing it (shapes, dtypes, contiguous strides): for compile, export and meta."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, no-any-return"
# The fakes take the arguments of their schema, in its order and types.

import torch
from torch import Tensor
from torch.library import register_fake

from .fallback import PANEL
from .schemas import DTYPES, NAMESPACE, acc_dtype

_INT = torch.int32


@register_fake(f"{NAMESPACE}::route")
def _route(logits, top_k, scoring, *rest):
    (T, E), acc, score_groups = logits.shape, acc_dtype(logits.dtype), rest[-2]
    return (logits.new_empty((T, top_k), dtype=acc), logits.new_empty((T, top_k), dtype=_INT),
            logits.new_empty((E,), dtype=_INT), logits.new_empty((0 if scoring else T,), dtype=acc),
            logits.new_empty((score_groups, E), dtype=acc))  # fmt: skip


@register_fake(f"{NAMESPACE}::route_backward")
def _route_backward(grad_weights, grad_lse, grad_score_sums, logits, *_):
    return logits.new_empty(logits.shape)


@register_fake(f"{NAMESPACE}::sum_scores")
def _sum_scores(logits, scoring, normalize, logit_softcap, groups, padding_mask):
    return logits.new_empty((groups, logits.shape[1]), dtype=acc_dtype(logits.dtype))


@register_fake(f"{NAMESPACE}::sum_scores_backward")
def _sum_scores_backward(grad_sums, logits, *_):
    return logits.new_empty(logits.shape)


@register_fake(f"{NAMESPACE}::limit_capacity")
def _limit_capacity(topk_ids, num_experts, capacity, group_size):
    return topk_ids.new_empty(topk_ids.shape, dtype=torch.bool)


@register_fake(f"{NAMESPACE}::expert_cuts")
def _expert_cuts(logits, count, n, padding_mask):
    (T, E), acc = logits.shape, acc_dtype(logits.dtype)
    return (logits.new_empty((E, T), dtype=acc), logits.new_empty((T // n, E), dtype=acc),
            logits.new_empty((T // n, E), dtype=_INT), logits.new_empty((T,), dtype=_INT),
            logits.new_empty((E,), dtype=_INT))  # fmt: skip


@register_fake(f"{NAMESPACE}::expert_choice")
def _expert_choice(logits, scores, least, last, slots):
    T = logits.shape[0]
    return scores.new_empty((T, slots)), scores.new_empty((T, slots), dtype=_INT)


@register_fake(f"{NAMESPACE}::sinkhorn")
def _sinkhorn(logits, top_k, *_):
    (T, E), acc = logits.shape, acc_dtype(logits.dtype)
    return (logits.new_empty((T, top_k), dtype=acc), logits.new_empty((T, top_k), dtype=_INT),
            logits.new_empty((E,), dtype=_INT), logits.new_empty((T, E), dtype=acc),
            logits.new_empty((1,), dtype=_INT))  # fmt: skip


@register_fake(f"{NAMESPACE}::permute")
def _permute(x, topk_ids, num_experts, align):
    S, H = topk_ids.shape[0] * topk_ids.shape[1], x.shape[1]
    P = S + num_experts * (align - 1)
    return (x.new_empty((P, H)), x.new_empty((P,), dtype=_INT), x.new_empty((S,), dtype=_INT),
            x.new_empty((num_experts + 1,), dtype=_INT))  # fmt: skip


@register_fake(f"{NAMESPACE}::permute_backward")
def _permute_backward(grad_rows, slot_to_row, num_tokens):
    return grad_rows.new_empty((num_tokens, grad_rows.shape[1]))


@register_fake(f"{NAMESPACE}::grouped_gemm")
def _grouped_gemm(a, b, offs, bias, out_dtype, allow_tf32, main_grad):
    M, N = a.shape[-2], b.shape[-1]
    groups = (a.shape[0],) if offs is None else (offs.shape[0],) if a.dim() == b.dim() else ()
    return a.new_empty((*groups, M, N), dtype=DTYPES[out_dtype])


@register_fake(f"{NAMESPACE}::grouped_gemm_backward")
def _grouped_gemm_backward(a, grad, offs, main_grad, allow_tf32):
    return None


@register_fake(f"{NAMESPACE}::unpermute")
def _unpermute(rows, slot_to_row, topk_weights):
    return rows.new_empty((topk_weights.shape[0], rows.shape[1]))


@register_fake(f"{NAMESPACE}::unpermute_backward")
def _unpermute_backward(grad_y, rows, slot_to_row, topk_weights):
    return rows.new_empty(rows.shape), topk_weights.new_empty(topk_weights.shape)


@register_fake(f"{NAMESPACE}::fused_experts")
def _fused_experts(x, w13, w2, topk_weights, topk_ids, w13_bias, w2_bias, expert_map, hidden_mask, activation, gated,
                   interleaved, transposed, weight_on_input, swiglu_limit, swiglu_alpha, allow_tf32, w13_main_grad,
                   w2_main_grad, save_hidden):  # fmt: skip
    S, width = topk_ids.shape[0] * topk_ids.shape[1], w13.shape[2 if transposed else 1]
    return x.new_empty(x.shape), x.new_empty((S, width) if save_hidden else (0,))


@register_fake(f"{NAMESPACE}::fused_experts_backward")
def _fused_experts_backward(grad_y, hidden, x, w13, w2, topk_weights, topk_ids, w13_bias, w2_bias,
                            *rest):  # fmt: skip
    *_, w13_main, w2_main, needs = rest
    inputs = (x, w13, w2, topk_weights, w13_bias, w2_bias)
    needs &= ~((w13_main is not None) << 1 | (w2_main is not None) << 2)

    def gradient(bit: int, t: Tensor | None) -> Tensor:
        if t is None:
            return x.new_empty((0,))
        return t.new_empty(t.shape if needs >> bit & 1 else (0,))

    return tuple(gradient(bit, t) for bit, t in enumerate(inputs))


@register_fake(f"{NAMESPACE}::pack_experts")
def _pack_experts(w13, w2, gated, interleaved, transposed, dtype):
    E, (H, I) = w2.shape[0], (w2.shape[2], w2.shape[1]) if transposed else (w2.shape[1], w2.shape[2])
    panels13, panels2 = (I + PANEL - 1) // PANEL, (H + PANEL - 1) // PANEL
    return (w13.new_empty((E, panels13, 2 if gated else 1, H, PANEL), dtype=DTYPES[dtype]),
            w2.new_empty((E, panels2, I, PANEL), dtype=DTYPES[dtype]))  # fmt: skip


@register_fake(f"{NAMESPACE}::fused_experts_packed")
def _fused_experts_packed(x, *_):
    return x.new_empty(x.shape)
