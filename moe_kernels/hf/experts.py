# SPDX-License-Identifier: Apache-2.0
"""The experts function that transformers calls for a layer under `experts_implementation="moe_kernels"`.

What a class asks for is read from the flags that the decorator of transformers leaves on the module, with defaults, so
that older and newer versions work alike:

    gate_up_proj [E, 2I, H] rows [gate; up]     or [E, H, 2I] with is_transposed, or up_proj [E, I, H] without has_gate
    down_proj    [E, H, I]                      or [E, I, H] with is_transposed
    *_bias       [E, width] with has_bias;      post_expert_norm(rows) before weighting with has_post_expert_norm

A class whose gate and activation we fuse runs `fused_experts`. Every other one (its own `_apply_gate`, an activation
outside our list, a norm behind the experts) runs permute, grouped_gemm, its own function, grouped_gemm, unpermute.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn import Parameter

from .. import auto_pack, ops

MOE_MODULE = "transformers.integrations.moe"
GPT_OSS_MODULE = "transformers.models.gpt_oss.modeling_gpt_oss"
_DTYPES = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))

# ---- the experts function ------------------------------------------------------------------------------------------


def experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The function transformers calls: the experts of one layer on `hidden_states` [T, H].

    Args:
        module: the experts module; its flags and weights are read at every call (LoRA, FSDP and casts just work).
        hidden_states: [T, H], any floating dtype; cast to the dtype of the weights, as grouped_mm does.
        top_k_index: int [T, K]; ids outside [0, num_experts) are absent (expert parallelism marks them so).
        top_k_weights: floating [T, K], differentiable.
    Returns:
        [T, H] in hidden_states.dtype.

    Errors: TypeError for quantised weights, ValueError for weights that are only a shard of the experts.
    """
    w13, w13_bias, w2, w2_bias = local_weights(module)
    gate = fused_gate(module)
    dtype = hidden_states.dtype
    x = hidden_states if dtype == w13.dtype else hidden_states.to(w13.dtype)
    if gate is None or w2.dtype != w13.dtype:
        y = _unfused(module, x, w13, w13_bias, w2, w2_bias, top_k_index, top_k_weights)
    else:
        activation, interleaved, limit, alpha = gate
        y = auto_pack.fused_experts(
            module,
            x,
            w13,
            w2,
            top_k_weights,
            top_k_index,
            activation=activation,
            gated=_flag(module, "has_gate", True),
            w13_bias=w13_bias,
            w2_bias=w2_bias,
            interleaved=interleaved,
            transposed=_flag(module, "is_transposed", False),
            swiglu_limit=limit,
            swiglu_alpha=alpha,
        )
    return y if y.dtype == dtype else y.to(dtype)


def _unfused(
    module: Any,
    x: torch.Tensor,
    w13: torch.Tensor,
    w13_bias: torch.Tensor | None,
    w2: torch.Tensor,
    w2_bias: torch.Tensor | None,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
) -> torch.Tensor:
    """The same layer in five steps, with the module's own gate, activation and norm between our kernels."""
    transposed = _flag(module, "is_transposed", False)
    rows = ops.permute(x, topk_ids, w13.shape[0])
    ends = rows.expert_offsets[1:]
    h = ops.grouped_gemm(rows.x_rows, w13 if transposed else w13.transpose(1, 2), ends, bias=w13_bias)
    if not _flag(module, "has_gate", True):
        h = module.act_fn(h)
    elif hasattr(module, "_apply_gate"):
        h = module._apply_gate(h)
    else:
        gate, up = h.chunk(2, dim=-1)
        h = module.act_fn(gate) * up
    y_rows = ops.grouped_gemm(h.to(w2.dtype), w2 if transposed else w2.transpose(1, 2), ends, bias=w2_bias)
    if _flag(module, "has_post_expert_norm", False):
        y_rows = module.post_expert_norm(y_rows)
    return ops.unpermute(y_rows, rows.slot_to_row, topk_weights)


# ---- what the module asks for --------------------------------------------------------------------------------------


def _flag(module: Any, name: str, default: bool) -> bool:
    return bool(getattr(module, name, default))


def local_weights(module: Any) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """w13, its bias, w2, its bias: plain local floating tensors that hold every expert of the module, or an error."""
    up = "gate_up_proj" if _flag(module, "has_gate", True) else "up_proj"
    w13, w2 = _local(module, up), _local(module, "down_proj")
    held, num_experts = w13.shape[0], getattr(module, "num_experts", None)
    if held != w2.shape[0] or num_experts not in (None, held):
        raise ValueError(
            f"moe_kernels: {type(module).__name__} has num_experts={num_experts}, but the local weights hold "
            f"{held} ({up}) and {w2.shape[0]} (down_proj) experts: gather a sharded layer before its forward, "
            "or set num_experts to the local count as expert parallelism does"
        )
    if not _flag(module, "has_bias", False):
        return w13, None, w2, None
    b13, b2 = _local(module, f"{up}_bias"), _local(module, "down_proj_bias")
    if b13.dtype != w13.dtype or b2.dtype != w2.dtype:
        b13, b2 = b13.to(w13.dtype), b2.to(w2.dtype)
    return w13, b13, w2, b2


def _local(module: Any, name: str) -> torch.Tensor:
    weight = getattr(module, name, None)
    if type(weight) is Parameter and weight.dtype in _DTYPES:
        return weight
    if weight is None:
        raise TypeError(f"moe_kernels: {type(module).__name__} has no {name}; choose another experts_implementation")
    if hasattr(type(weight), "to_local"):  # a DTensor: kernels take this rank's part
        weight = weight.to_local()
    if weight.dtype not in _DTYPES:
        raise TypeError(
            f"moe_kernels: {type(module).__name__}.{name} is {weight.dtype}: quantised experts are not supported. "
            "Load the model dequantised, or choose experts_implementation='grouped_mm' or 'eager'"
        )
    return weight  # type: ignore[no-any-return]


def fused_gate(module: Any) -> tuple[str, bool, float, float] | None:
    """(activation, interleaved, swiglu_limit, swiglu_alpha) of a gate that `fused_experts` computes, or None."""
    if _flag(module, "has_post_expert_norm", False):
        return None
    if not _flag(module, "has_gate", True):
        activation = activation_name(getattr(module, "act_fn", None))
        return None if activation is None else (activation, False, 7.0, 1.702)

    gate = getattr(module, "_apply_gate", None)
    function = getattr(gate, "__func__", gate)
    # By identity, not by name: torch.compile evaluates a comparison of __qualname__ wrongly.
    if function is None or function is _default_gate():
        activation = activation_name(getattr(module, "act_fn", None))
        concatenated = _flag(module, "is_concatenated", True)  # the default gate always splits in halves
        return (activation, False, 7.0, 1.702) if activation is not None and concatenated else None
    if function is _gpt_oss_gate():
        limit, alpha = getattr(module, "limit", None), getattr(module, "alpha", None)
        if isinstance(limit, float | int) and isinstance(alpha, float | int):
            return "swigluoai", True, float(limit), float(alpha)  # gate and up alternate in gpt-oss
    return None


def _default_gate() -> Any:
    return getattr(sys.modules.get(MOE_MODULE), "_default_apply_gate", None)


def _gpt_oss_gate() -> Any:
    return getattr(getattr(sys.modules.get(GPT_OSS_MODULE), "GptOssExperts", None), "_apply_gate", None)


_FUNCTIONS: tuple[tuple[Any, str], ...] = (
    (F.silu, "silu"),
    (F.gelu, "gelu"),
    (F.relu, "relu"),
    (torch.relu, "relu"),
)
_CLASSES = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}
_HOMES = ("transformers.activations", "torch.nn.modules.activation")


def activation_name(act_fn: Any) -> str | None:
    """Our name of a module's activation (a module, or a function such as F.silu), or None for one we do not fuse."""
    for function, name in _FUNCTIONS:
        if act_fn is function:
            return name
    if isinstance(act_fn, functools.partial):
        tanh = act_fn.func is F.gelu and not act_fn.args and act_fn.keywords == {"approximate": "tanh"}
        return "gelu_tanh" if tanh else None
    kind = type(act_fn)
    if kind.__module__ not in _HOMES:
        return None
    if kind.__name__ == "GELU":
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(act_fn.approximate)
    return _CLASSES.get(kind.__name__)
