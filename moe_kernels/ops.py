# SPDX-License-Identifier: Apache-2.0
"""The public ops: checked arguments in, one call of a registered op, typed results out.

Letters: T tokens, H hidden, I expert width, E experts, K experts a token, S = T*K slots (t*K + k), P permuted rows.
float64 in means float64 throughout; for any other dtype routing, topk_weights and sums over slots are float32.
A wrong kind of argument is a TypeError, a wrong size or device a ValueError; the text names the argument, what was
wanted and what came. Results are bitwise the same in every run and for any number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import autograd as _autograd
from . import check, fakes, fallback
from .fallback import backend_of
from .packed import PackedExperts, fused_experts_packed, pack_experts
from .reference import Permuted, Routing, effective_scale
from .schemas import ACTIVATION_CODE, DTYPE_CODE, SCORING, SCORING_CODE, allow_tf32

__all__ = [
    "PackedExperts", "Permuted", "Routing", "backend_of", "fused_experts", "grouped_gemm", "pack_experts", "permute",
    "route", "route_with_sums", "unpermute",
]  # fmt: skip

fallback.install()
_autograd.install()
_FAKES = fakes  # imported for its registrations
_OPS = torch.ops.moe_kernels
_ROUTE, _PERMUTE, _UNPERMUTE = _OPS.route.default, _OPS.permute.default, _OPS.unpermute.default
_GROUPED_GEMM, _FUSED_EXPERTS = _OPS.grouped_gemm.default, _OPS.fused_experts.default


def route(
    logits: Tensor,
    top_k: int,
    *,
    scoring_func: str = "softmax",
    renormalize: bool = True,
    renormalize_eps: float | None = None,
    e_score_correction_bias: Tensor | None = None,
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    group_top: int | None = None,
    routed_scaling_factor: float = 1.0,
    scale_when_renormalized: bool = True,
    logit_softcap: float = 0.0,
    padding_mask: Tensor | None = None,
) -> Routing:
    """Choose the K best experts of every token and weigh them.

    Args:
        logits: floating [T, E] router logits. NaN counts as -inf, +inf as the largest float32.
        top_k: K, 1..E. Ties go to the lowest expert id.
        scoring_func: "softmax" over all E (Switch, Mixtral, DeepSeek-V2), "sigmoid" (DeepSeek-V3) or "sqrtsoftplus".
        renormalize: divide a token's weights by (their sum + renormalize_eps).
        renormalize_eps: None means 0 for softmax and 1e-20 for the others.
        e_score_correction_bias: floating [E], added to the scores for the choice only; gets no gradient.
        num_expert_group: G contiguous groups, of which only the best topk_group take part; None or 1: no groups.
        topk_group: M groups that a token may use, 1..G, with K <= M*E/G.
        group_top: a group's score is the sum of its group_top best. None: 2 with a bias (V3), else 1, the maximum (V2).
        routed_scaling_factor: multiplies the weights last.
        scale_when_renormalized: False is the rule of DeepSeek-V2: renormalised weights are not scaled, and K = 1 is
            not renormalised.
        logit_softcap: c > 0 replaces l by c * tanh(l / c) before all else.
        padding_mask: bool [T], True for a token. The others get ids -1 and weights 0 and are not counted.
    Returns:
        Routing: topk_weights acc [T, K] and topk_ids int32 [T, K] by descending selection score, tokens_per_expert
        int32 [E], lse acc [T] for softmax else None, dropped None. acc is float64 for float64 logits, else float32.
        Differentiable in logits through topk_weights and lse. A row without a finite logit gets ids 0..K-1, weights 0.

    Errors: TypeError, ValueError. With MOE_KERNELS_DEBUG=1 NaN logits raise ValueError.
    Determinism: bitwise.
    """
    call = _route_arguments(
        logits, top_k, scoring_func, renormalize, renormalize_eps, e_score_correction_bias, num_expert_group,
        topk_group, group_top, routed_scaling_factor, scale_when_renormalized, logit_softcap, padding_mask,
    )  # fmt: skip
    weights, ids, counts, lse, _ = _ROUTE(*call, 0, False)
    return Routing(weights, ids, counts, lse if scoring_func == "softmax" else None, None)


def route_with_sums(
    logits: Tensor, top_k: int, groups: int = 1, *, normalize: bool = True, **options: Any
) -> tuple[Routing, Tensor]:
    """`route`, and from the same pass over the logits the sums of scores that balance losses are made of.

    Args:
        logits, top_k, options: as in `route`.
        groups: B groups of T / B consecutive tokens, each with sums of its own.
        normalize: divide the scores of a token by their sum; those of a softmax add up to 1 anyhow.
    Returns:
        Routing, and score_sums acc [B, E]: the scores of a group's tokens added up by expert, without those that
        padding_mask leaves out. The backward adds all of topk_weights, lse and score_sums to d logits in one pass and
        keeps T*K numbers beside the logits.

    Errors: TypeError, ValueError, as `route`.
    Determinism: bitwise.
    """
    call = _route_arguments(logits, top_k, **options)
    check.count("route_with_sums", "groups", groups, 1)
    if logits.shape[0] % groups:
        check.refuse("route_with_sums", "groups", f"a divisor of T={logits.shape[0]}", str(groups))
    weights, ids, counts, lse, sums = _ROUTE(*call, groups, normalize)
    softmax = options.get("scoring_func", "softmax") == "softmax"
    return Routing(weights, ids, counts, lse if softmax else None, None), sums


def _route_arguments(
    logits: Tensor, top_k: int, scoring_func: str = "softmax", renormalize: bool = True,
    renormalize_eps: float | None = None, e_score_correction_bias: Tensor | None = None,
    num_expert_group: int | None = None, topk_group: int | None = None, group_top: int | None = None,
    routed_scaling_factor: float = 1.0, scale_when_renormalized: bool = True, logit_softcap: float = 0.0,
    padding_mask: Tensor | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """The checked arguments of the op, up to padding_mask."""
    groups = 1 if num_expert_group is None else num_expert_group
    limit = 1 if topk_group is None and groups == 1 else topk_group
    bias, mask = e_score_correction_bias, padding_mask
    code = SCORING_CODE.get(scoring_func)
    if code is None or not isinstance(logits, Tensor) or logits.dtype not in check.FLOATS or logits.dim() != 2:
        check.tensor("route", "logits", logits, check.FLOATS, [("T", None), ("E", None)])
        check.choice("route", "scoring_func", scoring_func, SCORING)
    E = logits.shape[1]
    check.count("route", "top_k", top_k, 1, E, "E=")
    if groups != 1 or limit != 1:
        check.count("route", "num_expert_group", groups, 1)
        if E % groups:
            check.refuse("route", "num_expert_group", f"a divisor of E={E}", str(groups))
        check.count("route", "topk_group", limit, 1, groups, "num_expert_group=")
        if top_k > limit * (E // groups):  # type: ignore[operator]
            reach = f"{limit} groups of {E // groups}"
            check.refuse("route", "top_k", f"at most the experts in reach ({reach})", str(top_k))
    if group_top is None:
        group_top = 1 if bias is None else 2
    else:
        check.count("route", "group_top", group_top, 1)
    if bias is not None:
        check.tensor("route", "e_score_correction_bias", bias, check.FLOATS, [("E", E)], logits.device)
        bias = bias.detach()
    if mask is not None:
        check.tensor("route", "padding_mask", mask, check.BOOL, [("T", logits.shape[0])], logits.device)
    if check.checked():
        check.no_nan("route", "logits", logits)
    eps = renormalize_eps if renormalize_eps is not None else 0.0 if code == 0 else 1e-20
    renormalize, scale = effective_scale(renormalize, top_k, routed_scaling_factor, scale_when_renormalized)
    return logits, top_k, code, renormalize, eps, scale, logit_softcap, groups, limit, group_top, bias, mask


def permute(x: Tensor, topk_ids: Tensor, num_experts: int, *, align: int = 1) -> Permuted:
    """Copy the rows of x in expert order: a stable counting sort of the slots.

    Args:
        x: floating [T, H].
        topk_ids: int32 or int64 [T, K]; an id outside [0, E) is absent and gets no row.
        num_experts: E.
        align: the rows of each expert start at a multiple of it.
    Returns:
        Permuted: x_rows [P, H], row_to_slot int32 [P], slot_to_row int32 [S], expert_offsets int32 [E+1], with
        P = S + E*(align - 1) always. Rows without a slot are 0 in x_rows and -1 in row_to_slot; absent slots are -1
        in slot_to_row; expert_offsets[E] rows are in use. Differentiable in x.

    Errors: TypeError, ValueError. With MOE_KERNELS_DEBUG=1 ids outside -1..E-1 raise ValueError.
    Determinism: bitwise.
    """
    check.tensor("permute", "x", x, check.FLOATS, _T_H)
    check.tensor("permute", "topk_ids", topk_ids, check.IDS, [("T", x.shape[0]), ("K", None)], x.device)
    K = topk_ids.shape[1]
    check.count("permute", "K, the second size of topk_ids,", K, 1)
    check.count("permute", "num_experts", num_experts, 1)
    check.count("permute", "align", align, 1)
    rows = x.shape[0] * K + num_experts * (align - 1)
    if rows > check.MAX_ROWS:
        check.refuse("permute", "P = T*K + E*(align - 1)", f"at most {check.MAX_ROWS}", str(rows))
    if check.checked():
        check.values("permute", "topk_ids", topk_ids, -1, num_experts, "an expert, or -1 for none")
    return Permuted(*_PERMUTE(x, topk_ids, num_experts, align))


_T_H: list[tuple[str, int | None]] = [("T", None), ("H", None)]


def grouped_gemm(
    a: Tensor,
    b: Tensor,
    offs: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    main_grad: Tensor | None = None,
) -> Tensor:
    """Multiply one pair of matrices a group, any sizes and strides; sums in float32, or float64 for float64.

    Args:
        a: floating [M, k] or [E, M, k].
        b: floating [k, N] or [E, k, N], of a's dtype.
        offs: int32 [E], the end of each group along the dimension that the 2-D operands share with no E: M for 2-D a
            with 3-D b, N for 3-D a with 2-D b, k for two 2-D operands. None for two 3-D operands. `expert_offsets[1:]`.
        bias: floating [E, N], added to every row of its group; not for 3-D a with 2-D b.
        out_dtype: of the result; None means a's.
        main_grad: of b, for 2-D a with 3-D b: float32 (float64 for float64) [E, k, N], it or its mT contiguous. The
            backward adds the gradient of b to it, in float32 and in place, and leaves b.grad as it is.
    Returns:
        [M, N] where M or N is grouped, else [E, M, N]; what lies past offs[-1] is 0. Differentiable in a, b and bias.

    float32 on a GPU: torch.backends.cuda.matmul.allow_tf32, or torch.set_float32_matmul_precision, lets the tensor
    cores multiply with 10 bits of mantissa, in the backward as in its forward. Elsewhere it changes nothing.
    Errors: TypeError, ValueError. With MOE_KERNELS_DEBUG=1 decreasing or too large offs raise ValueError.
    Determinism: bitwise.
    """
    check.operands("grouped_gemm", a, b, offs, bias, out_dtype)
    if _autocasting(a):
        a, b = _autocast(a), _autocast(b)
    if bias is not None and bias.dtype != a.dtype:
        bias = bias.to(a.dtype)
    if check.checked() and offs is not None:
        check.ends("grouped_gemm", offs, a.shape[0] if b.dim() == 3 else b.shape[1] if a.dim() == 3 else b.shape[0])
    if main_grad is not None:
        if a.dim() != 2 or b.dim() != 3:
            check.refuse("grouped_gemm", "main_grad", "None unless a is 2-D and b 3-D", check.got(main_grad))
        check.main_grad("grouped_gemm", "main_grad", main_grad, "b", b, either_major=True)
    code = DTYPE_CODE[a.dtype if out_dtype is None else out_dtype]
    return _GROUPED_GEMM(a, b, offs, bias, code, allow_tf32(a.dtype), main_grad)  # type: ignore[no-any-return]


def unpermute(rows: Tensor, slot_to_row: Tensor, topk_weights: Tensor) -> Tensor:
    """Bring expert rows back to their tokens: y[t] = sum over k of topk_weights[t, k] * rows[slot_to_row[t*K + k]].

    Args:
        rows: floating [P, H].
        slot_to_row: int32 [S] from `permute`; a slot of -1 is skipped, never multiplied.
        topk_weights: floating [T, K].
    Returns:
        y: [T, H] in rows.dtype, summed in slot order. Differentiable in rows and topk_weights.

    Errors: TypeError, ValueError. With MOE_KERNELS_DEBUG=1 rows outside -1..P-1 raise ValueError.
    Determinism: bitwise.
    """
    check.tensor("unpermute", "rows", rows, check.FLOATS, [("P", None), ("H", None)])
    check.tensor("unpermute", "slot_to_row", slot_to_row, check.INT32, [("S", None)], rows.device)
    S = slot_to_row.shape[0]
    fits = (
        isinstance(topk_weights, Tensor)
        and topk_weights.dim() == 2
        and topk_weights.shape[0] * topk_weights.shape[1] == S
    )
    if not fits or topk_weights.dtype not in check.FLOATS or topk_weights.device != rows.device:
        whole = isinstance(topk_weights, Tensor) and topk_weights.dim() > 0 and topk_weights.shape[0] > 0
        T = topk_weights.shape[0] if whole and S % topk_weights.shape[0] == 0 else None
        sizes = [("T", T), ("K", None if T is None else S // T)]
        check.tensor("unpermute", "topk_weights", topk_weights, check.FLOATS, sizes, rows.device)
        check.refuse("unpermute", "topk_weights", f"floating [T, K] with T*K = S = {S}", str(list(topk_weights.shape)))
    if check.checked():
        check.values("unpermute", "slot_to_row", slot_to_row, -1, rows.shape[0], "a row, or -1 for none")
    return _UNPERMUTE(rows, slot_to_row, topk_weights)  # type: ignore[no-any-return]


def fused_experts(
    x: Tensor,
    w13: Tensor | PackedExperts,
    w2: Tensor | None,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    gated: bool | None = None,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    interleaved: bool = False,
    transposed: bool = False,
    expert_map: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    swiglu_limit: float = 7.0,
    swiglu_alpha: float = 1.702,
    hidden_mask: Tensor | None = None,
    recompute: bool = False,
    w13_main_grad: Tensor | None = None,
    w2_main_grad: Tensor | None = None,
) -> Tensor:
    """Run the chosen experts on every token and combine: the whole expert MLP in one op.

    y[t] = sum over k of topk_weights[t, k] * (act(x[t] @ w13[e]^T + w13_bias[e]) @ w2[e]^T + w2_bias[e])
    with e = topk_ids[t, k]; gated: act(h) = activation(gate) * up, h = [gate; up]; swigluoai: (up + 1) * gate *
    sigmoid(alpha * gate), both clamped.

    Args:
        x: floating [T, H].
        w13: [E, 2I, H] with rows [gate; up], or [E, I, H] when ungated, in x's dtype; or PackedExperts.
        w2: [E, H, I]; None with PackedExperts.
        topk_weights: floating [T, K].
        topk_ids: int32 or int64 [T, K]; an id outside [0, E) is absent: no output, no gradient.
        activation: silu, gelu, gelu_tanh, relu, relu2 (its square) or swigluoai (gpt-oss, gated only).
        gated: None infers it from the shapes.
        w13_bias: [E, 2I] or [E, I]. w2_bias: [E, H], multiplied by the routing weight like the rest of the expert.
        interleaved: the rows of w13 and w13_bias are gate, up, gate, up, ...
        transposed: w13 is [E, H, 2I] and w2 [E, I, H].
        expert_map: int32 or int64 [G], global expert id -> local one, -1 for one that lives elsewhere.
        apply_router_weight_on_input: the weight multiplies x[t] instead of the output (Llama 4).
        swiglu_limit, swiglu_alpha: the clamp and the slope of swigluoai.
        hidden_mask: floating [T, K, I], multiplies the activation: dropout, already scaled.
        recompute: keep no hidden rows for the backward, compute them again.
        w13_main_grad, w2_main_grad: contiguous float32 (float64 for float64) tensors of the weights' shapes. The
            backward adds the weights' gradients to them, in float32 and in place, and leaves w13.grad and w2.grad as
            they are: gradient accumulation fusion, with Megatron's main_grad.
    Returns:
        y: [T, H] in x.dtype. Differentiable in x, w13, w2, both biases and topk_weights. Under autocast x and the
        weights are cast to the autocast dtype.

    float32 on a GPU: as in `grouped_gemm`, torch.backends.cuda.matmul.allow_tf32 decides, but for at most 64 tokens
    where nothing requires a gradient: those products are exact.
    Errors: TypeError, ValueError. RuntimeError where PackedExperts meet a tensor that requires a gradient.
        With MOE_KERNELS_DEBUG=1 ids outside -1..E-1 raise ValueError.
    Determinism: bitwise.
    """
    if isinstance(w13, PackedExperts):
        for name, main in (("w13_main_grad", w13_main_grad), ("w2_main_grad", w2_main_grad)):
            if main is not None:
                check.refuse("fused_experts", name, "None with PackedExperts, which have no gradient", check.got(main))
        return fused_experts_packed(
            x, w13, w2, topk_weights, topk_ids, activation=activation, gated=gated, w13_bias=w13_bias, w2_bias=w2_bias,
            interleaved=interleaved, transposed=transposed, expert_map=expert_map, hidden_mask=hidden_mask,
            weight_on_input=apply_router_weight_on_input, swiglu_limit=swiglu_limit, swiglu_alpha=swiglu_alpha,
        )  # fmt: skip
    w13, w2 = check.plain_weight("fused_experts", "w13", w13), check.plain_weight("fused_experts", "w2", w2)
    if isinstance(x, Tensor) and _autocasting(x):
        x, w13, w2 = _autocast(x), _autocast(w13), _autocast(w2)
    is_gated = _gated(x, w13, w2, topk_weights, topk_ids, gated, transposed)
    code = ACTIVATION_CODE.get(activation)
    if is_gated is None or code is None or (not is_gated and (interleaved or code == 5)):
        check.experts(
            "fused_experts", x, w13, w2, topk_weights, topk_ids, activation=activation, gated=gated,
            interleaved=interleaved, transposed=transposed,
        )  # fmt: skip
    if w13_bias is not None or w2_bias is not None or expert_map is not None or hidden_mask is not None:
        w13_bias, w2_bias = _bias("w13_bias", w13_bias, w13), _bias("w2_bias", w2_bias, w13)
        (T, K), (E, H, I) = topk_ids.shape, (w2.shape[0], x.shape[1], w2.shape[1 if transposed else 2])
        sizes = (T, K, I, H, E, 2 * I if is_gated else I)
        check.optional("fused_experts", x, sizes, w13_bias, w2_bias, expert_map, hidden_mask)
    if w13_main_grad is not None:
        check.main_grad("fused_experts", "w13_main_grad", w13_main_grad, "w13", w13)
    if w2_main_grad is not None:
        check.main_grad("fused_experts", "w2_main_grad", w2_main_grad, "w2", w2)
    if check.checked():
        known = w13.shape[0] if expert_map is None else expert_map.shape[0]
        check.values("fused_experts", "topk_ids", topk_ids, -1, known, "an expert, or -1 for none")
    save_hidden = (
        not recompute and torch.is_grad_enabled() and _any_requires_grad(x, w13, w2, topk_weights, w13_bias, w2_bias)
    )
    y, _ = _FUSED_EXPERTS(
        x, w13, w2, topk_weights, topk_ids, w13_bias, w2_bias, expert_map, hidden_mask, code, is_gated, interleaved,
        transposed, apply_router_weight_on_input, swiglu_limit, swiglu_alpha, allow_tf32(x.dtype), w13_main_grad,
        w2_main_grad, save_hidden,
    )  # fmt: skip
    return y  # type: ignore[no-any-return]


def _gated(
    x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, gated: bool | None, transposed: bool
) -> bool | None:
    """Whether the weights are gated, or None where anything about the five tensors is wrong."""
    if not (isinstance(x, Tensor) and isinstance(topk_weights, Tensor) and isinstance(topk_ids, Tensor)):
        return None
    dtype, device, slots = x.dtype, x.device, topk_ids.shape
    if (
        dtype not in check.FLOATS
        or w13.dtype != dtype
        or w2.dtype != dtype
        or w13.device != device
        or w2.device != device
    ):
        return None
    if topk_weights.dtype not in check.FLOATS or topk_ids.dtype not in check.IDS:
        return None
    if topk_weights.device != device or topk_ids.device != device or x.dim() != 2 or len(slots) != 2:
        return None
    if topk_weights.shape != slots or w13.dim() != 3 or w2.dim() != 3:
        return None
    (T, H), (E, rows, columns), (experts, out, inner) = x.shape, w13.shape, w2.shape
    if transposed:
        rows, columns, out, inner = columns, rows, inner, out
    if slots[0] != T or columns != H or out != H or experts != E or slots[1] == 0 or T * slots[1] > check.MAX_ROWS:
        return None
    is_gated = rows == 2 * inner if gated is None else gated
    return is_gated if rows == (2 * inner if is_gated else inner) and E * H * inner != 0 else None


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _autocasting(t: Tensor) -> bool:
    return not t.is_meta and torch.is_autocast_enabled(t.device.type)


def _autocast(t: Tensor) -> Tensor:
    """What torch.autocast does to the operands of a matrix product."""
    return t if t.dtype == torch.float64 or not t.is_floating_point() else t.to(torch.get_autocast_dtype(t.device.type))


def _bias(name: str, bias: Tensor | None, weight: Tensor) -> Tensor | None:
    if bias is None:
        return None
    bias = check.plain_weight("fused_experts", name, bias)
    return bias.to(weight.dtype) if bias.dtype in check.FLOATS and weight.dtype in check.FLOATS else bias
