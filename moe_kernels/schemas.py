# SPDX-License-Identifier: Apache-2.0
"""Every op of the package, defined once: name, arguments, results.

Letters: T tokens, H hidden, I expert width, E experts, K experts a token, S = T*K slots (t*K + k), P permuted rows.
"acc" is float64 where the input is float64, else float32. Strings travel as the codes below: an int costs nothing.
The compiled library (`csrc/bindings`) implements these schemas for the CPU key, `fallback.py` for every other device.
"""

import torch

NAMESPACE = "moe_kernels"
SCORING = ("softmax", "sigmoid", "sqrtsoftplus")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "swigluoai")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SCORING_CODE = {name: code for code, name in enumerate(SCORING)}
ACTIVATION_CODE = {name: code for code, name in enumerate(ACTIVATIONS)}
DTYPE_CODE = {dtype: code for code, dtype in enumerate(DTYPES)}

SCHEMAS = {
    # logits [T, E] -> topk_weights [T, K] acc, topk_ids [T, K] i32, tokens_per_expert [E] i32, lse [T] acc or [0],
    # score_sums [score_groups, E] acc; 0 groups: nothing is summed
    "route": "(Tensor logits, int top_k, int scoring, bool renormalize, float renormalize_eps, float scale, "
    "float logit_softcap, int num_expert_group, int topk_group, int group_top, Tensor? e_score_correction_bias, "
    "Tensor? padding_mask, SymInt score_groups, bool normalize_scores) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    # -> grad of logits [T, E]
    "route_backward": "(Tensor? grad_weights, Tensor? grad_lse, Tensor? grad_score_sums, Tensor logits, "
    "Tensor topk_ids, Tensor topk_weights, int scoring, bool renormalize, float renormalize_eps, float scale, "
    "float logit_softcap, bool normalize_scores) -> Tensor",
    # logits [T, E] -> sums [B, E] acc: the scores of the tokens of each group
    "sum_scores": "(Tensor logits, int scoring, bool normalize, float logit_softcap, SymInt groups, "
    "Tensor? padding_mask) -> Tensor",
    # grad_sums [B, E] -> grad of logits [T, E]
    "sum_scores_backward": "(Tensor grad_sums, Tensor logits, int scoring, bool normalize, float logit_softcap, "
    "SymInt groups, Tensor? padding_mask) -> Tensor",
    # topk_ids [T, K] -> dropped [T, K] bool
    "limit_capacity": "(Tensor topk_ids, int num_experts, SymInt capacity, SymInt group_size) -> Tensor",
    # logits [T, E] -> scores [E, T] acc, least [T/n, E] acc, last [T/n, E] i32, experts_per_token [T] i32,
    # tokens_per_expert [E] i32: the `count` best tokens of every expert in every group of n
    "expert_cuts": "(Tensor logits, SymInt count, SymInt n, Tensor? padding_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    # logits [T, E] and what expert_cuts made of them -> topk_weights [T, slots] acc, topk_ids [T, slots] i32
    "expert_choice": "(Tensor logits, Tensor scores, Tensor least, Tensor last, int slots) -> (Tensor, Tensor)",
    # logits [T, E] -> topk_weights [T, K] acc, topk_ids [T, K] i32, tokens_per_expert [E] i32, plan [T, E] acc,
    # iterations [1] i32
    "sinkhorn": "(Tensor logits, int top_k, float tol, int max_iterations, Tensor? padding_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    # x [T, H], topk_ids [T, K] -> x_rows [P, H], row_to_slot [P] i32, slot_to_row [S] i32, expert_offsets [E+1] i32
    "permute": "(Tensor x, Tensor topk_ids, int num_experts, int align) -> (Tensor, Tensor, Tensor, Tensor)",
    # grad_rows [P, H] -> grad of x [T, H]
    "permute_backward": "(Tensor grad_rows, Tensor slot_to_row, int num_tokens) -> Tensor",
    # the four 2-D and 3-D cases of a grouped matrix product; out_dtype is a code; allow_tf32 is for float32 on a GPU,
    # and main_grad for the backward
    "grouped_gemm": "(Tensor a, Tensor b, Tensor? offs, Tensor? bias, int out_dtype, bool allow_tf32, "
    "Tensor? main_grad) -> Tensor",
    # a [M, k], grad [M, N], offs [E] -> main_grad [E, k, N] acc += a^T grad by group; it or its mT is contiguous
    "grouped_gemm_backward": "(Tensor a, Tensor grad, Tensor offs, Tensor(a!) main_grad, bool allow_tf32) -> ()",
    # rows [P, H] -> y [T, H]
    "unpermute": "(Tensor rows, Tensor slot_to_row, Tensor topk_weights) -> Tensor",
    # -> grad_rows [P, H], grad_weights [T, K]
    "unpermute_backward": "(Tensor grad_y, Tensor rows, Tensor slot_to_row, Tensor topk_weights) -> (Tensor, Tensor)",
    # -> y [T, H], hidden (opaque, for the backward; [0] unless save_hidden). The main gradients are for the backward.
    "fused_experts": "(Tensor x, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids, Tensor? w13_bias, "
    "Tensor? w2_bias, Tensor? expert_map, Tensor? hidden_mask, int activation, bool gated, bool interleaved, "
    "bool transposed, bool weight_on_input, float swiglu_limit, float swiglu_alpha, bool allow_tf32, "
    "Tensor? w13_main_grad, Tensor? w2_main_grad, bool save_hidden) -> (Tensor, Tensor)",
    # -> grads of x, w13, w2, topk_weights, w13_bias, w2_bias; `needs` is a bit mask in that order; not needed, or
    # added to a main gradient: [0]
    "fused_experts_backward": "(Tensor grad_y, Tensor hidden, Tensor x, Tensor w13, Tensor w2, Tensor topk_weights, "
    "Tensor topk_ids, Tensor? w13_bias, Tensor? w2_bias, Tensor? expert_map, Tensor? hidden_mask, int activation, "
    "bool gated, bool interleaved, bool transposed, bool weight_on_input, float swiglu_limit, float swiglu_alpha, "
    "bool allow_tf32, Tensor(a!)? w13_main_grad, Tensor(b!)? w2_main_grad, int needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # -> packed13 [E, ceil(I/32), 2 or 1, H, 32], packed2 [E, ceil(H/32), I, 32]; column c of panel p is unit p*32 + c
    "pack_experts": "(Tensor w13, Tensor w2, bool gated, bool interleaved, bool transposed, int dtype) "
    "-> (Tensor, Tensor)",
    # -> y [T, H]; w13_bias is [gate; up], never interleaved; w13, w2: the same row-major, for experts of few rows
    "fused_experts_packed": "(Tensor x, Tensor packed13, Tensor packed2, int intermediate_size, Tensor topk_weights, "
    "Tensor topk_ids, Tensor? w13_bias, Tensor? w2_bias, Tensor? expert_map, Tensor? hidden_mask, int activation, "
    "bool gated, bool weight_on_input, float swiglu_limit, float swiglu_alpha, Tensor? w13=None, Tensor? w2=None) "
    "-> Tensor",
}

LIBRARY = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that routing, accumulation and the combine are done in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def allow_tf32(dtype: torch.dtype) -> bool:
    """Whether torch has been told that products of float32 on a GPU may round their factors to tf32."""
    if dtype != torch.float32:
        return False
    try:
        return bool(torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:  # it was told by the newer name
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
