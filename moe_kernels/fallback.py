# SPDX-License-Identifier: Apache-2.0
"""Where a device has no compiled kernel, an op runs the reference and says so once; MOE_KERNELS_STRICT=1 raises."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, no-any-return"
# The implementations take the arguments of their schema, in its order and types.

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _build, reference
from .schemas import ACTIVATIONS, DTYPES, LIBRARY, NAMESPACE, SCHEMAS, SCORING, acc_dtype

PANEL = 32  # units in a weight panel


def backend_of(op: str, device: str) -> tuple[str, str]:
    """("cpu kernel" | "cuda kernel" | "reference", why not a kernel) of one op on one kind of device."""
    if op not in SCHEMAS:
        raise ValueError(f"backend_of: op must be one of {', '.join(SCHEMAS)}, got {op!r}")
    kind = device.split(":")[0].lower()
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", kind.upper()):
        return f"{kind} kernel", ""
    if not _build.ops_loaded:
        return "reference", _build.reason
    return "reference", f"moe_kernels: this build has no kernel of {op} for {kind} tensors"


@functools.cache
def _warn_once(op: str, text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)


def _announce(op: str, tensors: Sequence[Any]) -> None:
    device = next((t.device.type for t in tensors if isinstance(t, Tensor)), "cpu")
    text = f"{op} runs the slow reference on {device}: {backend_of(op, device)[1]}"
    if os.environ.get("MOE_KERNELS_STRICT", "0") not in ("", "0"):
        raise RuntimeError(f"{text} (MOE_KERNELS_STRICT is set)")
    _warn_once(op, text)


def _empty(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty((0,), dtype=dtype)


def _gradients(forward: Callable[..., Tensor | tuple[Tensor, ...]], cotangents: Sequence[Tensor | None],
               inputs: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor]:  # fmt: skip
    """Vector-Jacobian products of the reference; [0] for an input that is absent or not wanted."""
    leaves = [None if t is None else t.detach().requires_grad_(want) for t, want in zip(inputs, wanted)]
    with torch.enable_grad():
        outputs = forward(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(o, g) for o, g in zip(outputs, cotangents) if g is not None and o.requires_grad]
    asked = [t for t in leaves if t is not None and t.requires_grad]
    grads: Sequence[Tensor] = [torch.zeros_like(t) for t in asked]
    if pairs and asked:
        outs, cots = zip(*pairs)
        grads = torch.autograd.grad(outs, asked, cots, materialize_grads=True)
    found = iter(g.contiguous() for g in grads)
    like = next(t for t in inputs if t is not None)
    return [next(found) if t is not None and t.requires_grad else _empty(like if t is None else t) for t in leaves]


# ---- one implementation an op, in the order of the schemas


def route(logits, top_k, scoring, renormalize, renormalize_eps, scale, logit_softcap, num_expert_group, topk_group,
          group_top, e_score_correction_bias, padding_mask, score_groups, normalize_scores):  # fmt: skip
    routing = reference.route(
        logits, top_k, scoring_func=SCORING[scoring], renormalize=renormalize, renormalize_eps=renormalize_eps,
        e_score_correction_bias=e_score_correction_bias, num_expert_group=num_expert_group, topk_group=topk_group,
        group_top=group_top, routed_scaling_factor=scale, logit_softcap=logit_softcap, padding_mask=padding_mask,
    )  # fmt: skip
    lse = _empty(logits, acc_dtype(logits.dtype)) if routing.lse is None else routing.lse
    sums = logits.new_empty((0, logits.shape[1]), dtype=acc_dtype(logits.dtype))
    if score_groups:
        sums = _sum_scores(logits, scoring, normalize_scores, logit_softcap, score_groups, padding_mask)
    return routing.topk_weights, routing.topk_ids, routing.tokens_per_expert, lse, sums


def route_backward(grad_weights, grad_lse, grad_score_sums, logits, topk_ids, topk_weights, scoring, renormalize,
                   renormalize_eps, scale, logit_softcap, normalize_scores):  # fmt: skip
    live_ids = torch.where(topk_weights != 0, topk_ids, -1)  # an expert out of reach has weight 0 and no gradient
    unmasked = topk_ids[:, 0] >= 0

    def forward(logits: Tensor) -> tuple[Tensor, ...]:
        l, s = reference.scores(logits, SCORING[scoring], logit_softcap)
        w, lse = reference.weigh(s, live_ids, renormalize, renormalize_eps, scale), reference.log_sum_exp(l, topk_ids)
        if grad_score_sums is None:
            return w, lse
        return w, lse, _sum_scores(logits, scoring, normalize_scores, logit_softcap, len(grad_score_sums), unmasked)

    return _gradients(forward, (grad_weights, grad_lse, grad_score_sums), (logits,), (True,))[0]


def _sum_scores(logits, scoring, normalize, logit_softcap, groups, padding_mask):
    return reference.sum_scores(
        logits, scoring_func=SCORING[scoring], normalize=normalize, logit_softcap=logit_softcap, groups=groups,
        padding_mask=padding_mask,
    )  # fmt: skip


def sum_scores(logits, scoring, normalize, logit_softcap, groups, padding_mask):
    return _sum_scores(logits, scoring, normalize, logit_softcap, groups, padding_mask)


def sum_scores_backward(grad_sums, logits, *rule):
    return _gradients(lambda logits: _sum_scores(logits, *rule), (grad_sums,), (logits,), (True,))[0]


def limit_capacity(topk_ids, num_experts, capacity, group_size):
    return reference.limit_capacity(topk_ids, num_experts, capacity, group_size=group_size)


def expert_cuts(logits, count, n, padding_mask):
    return reference.expert_cuts(logits, count, n, padding_mask=padding_mask)


def expert_choice(logits, scores, least, last, slots):
    return reference.expert_slots(scores, least, last, slots)


def sinkhorn(logits, top_k, tol, max_iterations, padding_mask):
    return tuple(reference.sinkhorn(logits, top_k, tol, max_iterations, padding_mask=padding_mask))


def permute(x, topk_ids, num_experts, align):
    return tuple(reference.permute(x, topk_ids, num_experts, align=align))


def permute_backward(grad_rows, slot_to_row, num_tokens):
    ones = grad_rows.new_ones((num_tokens, slot_to_row.numel() // max(num_tokens, 1)))
    return reference.unpermute(grad_rows, slot_to_row, ones)


def grouped_gemm(a, b, offs, bias, out_dtype, allow_tf32, main_grad):
    return reference.grouped_gemm(a, b, offs, bias=bias, out_dtype=DTYPES[out_dtype])


def grouped_gemm_backward(a, grad, offs, main_grad, allow_tf32):
    main_grad.add_(reference.grouped_gemm(a.mT, grad, offs, out_dtype=main_grad.dtype))


def unpermute(rows, slot_to_row, topk_weights):
    return reference.unpermute(rows, slot_to_row, topk_weights)


def unpermute_backward(grad_y, rows, slot_to_row, topk_weights):
    def forward(rows: Tensor, topk_weights: Tensor) -> Tensor:
        return reference.unpermute(rows, slot_to_row, topk_weights)

    return tuple(_gradients(forward, (grad_y,), (rows, topk_weights), (True, True)))


def _experts(topk_ids, expert_map, hidden_mask, activation, gated, interleaved, transposed, weight_on_input,
             swiglu_limit, swiglu_alpha):  # fmt: skip
    """The reference as a function of the six differentiable inputs."""

    def forward(x, w13, w2, topk_weights, w13_bias, w2_bias):
        return reference.fused_experts(
            x, w13, w2, topk_weights, topk_ids, activation=ACTIVATIONS[activation], gated=gated, w13_bias=w13_bias,
            w2_bias=w2_bias, interleaved=interleaved, transposed=transposed, expert_map=expert_map,
            apply_router_weight_on_input=weight_on_input, swiglu_limit=swiglu_limit, swiglu_alpha=swiglu_alpha,
            hidden_mask=hidden_mask,
        )  # fmt: skip

    return forward


def fused_experts(x, w13, w2, topk_weights, topk_ids, w13_bias, w2_bias, expert_map, hidden_mask, activation, gated,
                  interleaved, transposed, weight_on_input, swiglu_limit, swiglu_alpha, allow_tf32, w13_main_grad,
                  w2_main_grad, save_hidden):  # fmt: skip
    forward = _experts(topk_ids, expert_map, hidden_mask, activation, gated, interleaved, transposed, weight_on_input,
                       swiglu_limit, swiglu_alpha)  # fmt: skip
    width = w13.shape[2 if transposed else 1]
    hidden = x.new_zeros((topk_ids.numel(), width)) if save_hidden else _empty(x)
    return forward(x, w13, w2, topk_weights, w13_bias, w2_bias), hidden


def fused_experts_backward(grad_y, hidden, x, w13, w2, topk_weights, topk_ids, w13_bias, w2_bias, expert_map,
                           hidden_mask, activation, gated, interleaved, transposed, weight_on_input, swiglu_limit,
                           swiglu_alpha, allow_tf32, w13_main_grad, w2_main_grad, needs):  # fmt: skip
    forward = _experts(topk_ids, expert_map, hidden_mask, activation, gated, interleaved, transposed, weight_on_input,
                       swiglu_limit, swiglu_alpha)  # fmt: skip
    # A weight with a main gradient enters in that dtype, so that its gradient is not rounded to its own.
    main_grads = (None, w13_main_grad, w2_main_grad, None, None, None)
    inputs = [t if main is None else t.to(main.dtype)
              for t, main in zip((x, w13, w2, topk_weights, w13_bias, w2_bias), main_grads)]  # fmt: skip
    grads = _gradients(forward, (grad_y,), inputs, [bool(needs >> bit & 1) for bit in range(6)])
    for i, main in enumerate(main_grads):
        if main is not None:
            main.add_(grads[i])
            grads[i] = _empty(x)
    return tuple(grads)


def pack_experts(w13, w2, gated, interleaved, transposed, dtype):
    w13, w2, _ = reference.canonical(w13.to(DTYPES[dtype]), w2.to(DTYPES[dtype]), None, interleaved, transposed)
    parts = w13.chunk(2, 1) if gated else (w13,)
    return torch.stack([_panels(part) for part in parts], 2), _panels(w2).clone()


def _panels(w: Tensor) -> Tensor:
    """[E, N, k] -> [E, ceil(N/32), k, 32], zero padded."""
    pad = -w.shape[1] % PANEL
    w = torch.nn.functional.pad(w, (0, 0, 0, pad))
    return w.unflatten(1, (-1, PANEL)).mT.contiguous()


def _unpanels(packed: Tensor, units: int) -> Tensor:
    return packed.mT.flatten(1, 2)[:, :units]


def fused_experts_packed(x, packed13, packed2, intermediate_size, topk_weights, topk_ids, w13_bias, w2_bias, expert_map,
                         hidden_mask, activation, gated, weight_on_input, swiglu_limit, swiglu_alpha, _w13=None,
                         _w2=None):  # fmt: skip
    w13 = torch.cat([_unpanels(part, intermediate_size) for part in packed13.unbind(2)], 1)
    w2 = _unpanels(packed2, x.shape[1])
    forward = _experts(topk_ids, expert_map, hidden_mask, activation, gated, False, False, weight_on_input,
                       swiglu_limit, swiglu_alpha)  # fmt: skip
    return forward(x, w13, w2, topk_weights, w13_bias, w2_bias)


def _announced(op: str) -> Callable[..., Any]:
    run = globals()[op]

    def implementation(*args: Any) -> Any:
        _announce(op, args)
        return run(*args)

    return implementation


def install() -> None:
    """Registers the reference below every kernel of its own."""
    for op in SCHEMAS:
        LIBRARY.impl(op, _announced(op), "CompositeExplicitAutograd")
