# SPDX-License-Identifier: Apache-2.0
"""How the config c of a Hugging Face family is read: its router, which layers are MoE, the arguments of odd families.

What is said here was checked against the modules of transformers 5.23.0. `place` is device and dtype of new modules.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from ..capacity import Capacity
from ..losses import Switch, ZLoss
from ..routers import Router
from . import parts

Config = Any
Arguments = dict[str, Any]
NAME = "MoELayer.from_config"
SCALE = (
    "routed_scaling_factor", "router_scaling_factor", "route_scale", "moe_routed_scaling_factor",
    "moe_router_scaling_factor",
)  # fmt: skip


def first(c: Config, *names: str) -> Any:
    """The first of these attributes that the config has."""
    for name in names:
        value = getattr(c, name, None)
        if value is not None:
            return value
    kind = getattr(c, "model_type", None) or type(c).__name__
    raise ValueError(f"{NAME}: a {kind} config must have {' or '.join(names)}, got none")


# ---- routers


def softmax(renormalize: bool | str, **settings: Any) -> Callable[[Config], Router]:
    """Softmax and top-k, or top-k and softmax: the same where the weights are renormalised."""
    settings = {"dtype": "input"} | settings
    return lambda c: Router(renormalize=value(c, renormalize), **settings)


def sigmoid(renormalize: bool | str, *, groups: bool = False, **settings: Any) -> Callable[[Config], Router]:
    """Sigmoid, a correction bias for the choice, a scale; with the groups of DeepSeek-V3."""

    def build(c: Config) -> Router:
        limits = grouping(c) if groups else {}
        scale = first(c, *SCALE) if any(getattr(c, name, None) is not None for name in SCALE) else 1.0
        kind: Arguments = {"scoring_func": "sigmoid", "correction_bias": True, "routed_scaling_factor": scale}
        return Router(renormalize=value(c, renormalize), **(kind | limits | settings))

    return build


def value(c: Config, name: bool | str) -> bool:
    return bool(first(c, name)) if isinstance(name, str) else name


def grouping(c: Config, group_top: int = 2) -> Arguments:
    groups = getattr(c, "n_group", None) or 1
    if groups == 1:
        return {}
    return {"num_expert_group": groups, "topk_group": first(c, "topk_group"), "group_top": group_top}


def deepseek_v2(c: Config) -> Router:
    limits = grouping(c, group_top=1) if first(c, "topk_method") == "group_limited_greedy" else {}
    renormalize = bool(getattr(c, "norm_topk_prob", False))  # the authors' rule; transformers does not read it
    scale = first(c, "routed_scaling_factor")
    return Router(renormalize=renormalize, routed_scaling_factor=scale, scale_when_renormalized=False, **limits)


def grouped_softmax(renormalize: bool | str, dtype: str) -> Callable[[Config], Router]:
    """Mistral 4: softmax with the groups of DeepSeek-V3."""
    return lambda c: Router(
        renormalize=value(c, renormalize), renormalize_eps=1e-20, dtype=dtype,
        routed_scaling_factor=first(c, "routed_scaling_factor"), **grouping(c),
    )  # fmt: skip


def by_scoring_func(c: Config) -> Router:
    """DeepSeek-V4 and Inkling 2 name the score function."""
    scoring = first(c, "scoring_func")
    if scoring not in ("sigmoid", "softmax", "sqrtsoftplus"):
        raise ValueError(
            f"MoELayer.from_config: scoring_func must be sigmoid, softmax or sqrtsoftplus, got {scoring!r}"
        )
    scale = first(c, "routed_scaling_factor", "route_scale")
    return Router(scoring_func=scoring, correction_bias=True, renormalize_eps=1e-20, routed_scaling_factor=scale)


def cohere(c: Config) -> Router:
    if first(c, "expert_selection_fn") == "softmax":
        return Router(dtype="input")
    return Router(scoring_func="sigmoid", renormalize=bool(c.norm_topk_prob), renormalize_eps=0.0, dtype="input")


def dbrx(c: Config) -> Router:
    p = getattr(c, "moe_normalize_expert_weights", None)
    if p not in (None, 1):
        raise ValueError(f"{NAME}: moe_normalize_expert_weights must be 1 or None, got {p}")
    return Router(renormalize=p is not None, dtype="input")


def laguna(c: Config) -> Router:
    return replace(
        sigmoid(True, renormalize_eps=0.0, dtype="input")(c), logit_softcap=first(c, "moe_router_logit_softcapping")
    )


def lfm2(c: Config) -> Router:
    return replace(
        sigmoid("norm_topk_prob", renormalize_eps=1e-6, dtype="input")(c), correction_bias=bool(c.use_expert_bias)
    )


def switch_router(c: Config) -> Router:
    return Router(renormalize=False, bias=bool(c.router_bias), input_jitter=first(c, "router_jitter_noise"))


# ---- which layers are MoE


def typed(c: Config, i: int) -> bool:
    types = getattr(c, "mlp_layer_types", None)  # a config.json older than this name has the other one
    return i >= first(c, "first_k_dense_replace") if types is None else types[i] in ("sparse", "moe", "hash_moe")


def after(name: str) -> Callable[[Config, int], bool]:
    return lambda c, i: i >= (getattr(c, name, None) or 0)


def stepped(c: Config, i: int) -> bool:
    step = getattr(c, "decoder_sparse_step", 1)
    dense = getattr(c, "mlp_only_layers", None) or ()
    return i not in dense and bool((i + 1) % step == 0)


def ernie(c: Config, i: int) -> bool:
    last = first(c, "moe_layer_end_index")
    last = c.num_hidden_layers - 1 if last == -1 else last
    return bool((i + 1) % first(c, "moe_layer_interval") == 0 and first(c, "moe_layer_start_index") <= i <= last)


def switch_step(c: Config, i: int) -> bool:
    step = first(c, "decoder_sparse_step" if getattr(c, "is_decoder", False) else "encoder_sparse_step")
    return bool(step > 0 and (step == 1 or i % step == 1))


def jamba_step(c: Config, i: int) -> bool:
    return bool(first(c, "num_experts") > 1 and i % first(c, "expert_layer_period") == first(c, "expert_layer_offset"))


# ---- activations

KERNELS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh", "relu": "relu", "relu2": "relu2",
}  # fmt: skip
"""transformers' name -> the kernels'"""


def function(name: str) -> nn.Module:
    """The activation function of this name in transformers."""
    functions = importlib.import_module("transformers.activations").ACT2FN
    if name not in functions:
        raise ValueError(f"{NAME}: no activation {name!r} in transformers; it has {', '.join(functions)}")
    module: nn.Module = functions[name]
    return module


def activation(name: str, gated: bool = True) -> str | nn.Module:
    """The kernels' name of an activation, or a module on the rows of w13 where there is none."""
    if name in KERNELS:
        return KERNELS[name]
    return parts.Gated(function(name)) if gated else function(name)


# ---- arguments of odd families: (config, layer, arguments, place) -> None


def aria(c: Config, i: int, a: Arguments, place: Arguments) -> None:
    """The experts are silu, the shared ones what the config says."""
    kwargs: Arguments = {"activation": activation(c.hidden_act), "bias": bool(c.mlp_bias)}
    width = first(c, "intermediate_size") * first(c, "moe_num_shared_experts")
    a["shared_experts"] = parts.OpenSharedExperts(a["hidden_size"], width, **kwargs, **place)


def cohere_average(c: Config, i: int, a: Arguments, place: Arguments) -> None:
    """(routed + shared) / 2."""
    width = first(c, "intermediate_size") * first(c, "num_shared_experts")
    if width and c.shared_expert_combination_strategy == "average":
        shared = parts.OpenSharedExperts(a["hidden_size"], width, activation=a["activation"], scale=0.5, **place)
        a |= {"shared_experts": shared, "router": replace(a["router"], routed_scaling_factor=0.5)}


def clamped(c: Config, i: int, a: Arguments, place: Arguments) -> None:
    a["activation"] = parts.Gated(function(c.hidden_act), first(c, "swiglu_limit"))


def clamped_experts(c: Config, i: int, a: Arguments, place: Arguments) -> None:
    """Hunyuan 4 clamps the experts, not the shared one."""
    width = first(c, "moe_intermediate_size") * first(c, "n_shared_experts")
    a["shared_experts"] = parts.OpenSharedExperts(a["hidden_size"], width, activation=a["activation"], **place)
    a["activation"] = parts.Gated(nn.SiLU(), first(c, "swiglu_limit"))


def deepseek_v4(c: Config, i: int, a: Arguments, place: Arguments) -> None:
    clamped(c, i, a, place)
    if first(c, "mlp_layer_types")[i] == "hash_moe":
        table = first(c, "vocab_size")
        a["router"] = replace(a["router"], correction_bias=False, token_table=table)


def swigluoai(c: Config, i: int, a: Arguments, place: Arguments) -> None:
    """The gate of gpt-oss."""
    a |= {"activation": "swigluoai", "swiglu_limit": first(c, "swiglu_limit"), "swiglu_alpha": first(c, "swiglu_alpha")}


def gpt_oss(c: Config, i: int, a: Arguments, place: Arguments) -> None:
    swigluoai(c, i, a, place)
    a |= {"bias": True, "interleaved": True}


def privacy_filter(c: Config, i: int, a: Arguments, place: Arguments) -> None:
    swigluoai(c, i, a, place)
    a["bias"] = True


def gemma(c: Config, i: int, a: Arguments, place: Arguments) -> None:
    """The router sees the residual stream; norms stand around the experts alone."""
    H, eps = a["hidden_size"], first(c, "rms_norm_eps")
    sizes = (H, a["num_experts"], a["top_k"])
    a["router"] = parts.NormedGate(*sizes, a["router"], eps=eps, **place)
    a["before"], a["after"] = parts.RMSNorm(H, eps, **place), parts.RMSNorm(H, eps, **place)


def inkling(c: Config, i: int, a: Arguments, place: Arguments) -> None:
    """The shared experts are the last of the list and share the weights' sum."""
    S = first(c, "n_shared_experts")
    a |= {"num_experts": a["num_experts"] + S, "top_k": a["top_k"] + S}
    sizes = (a["hidden_size"], a["num_experts"], a["top_k"])
    a["router"] = parts.SharedSinkGate(*sizes, num_shared=S, scale=first(c, "route_scale"), **place)


def inkling2(c: Config, i: int, a: Arguments, place: Arguments) -> None:
    a["activation"] = parts.SoftcappedSwiGLU(first(c, "mlp_gate_softcap"), first(c, "mlp_up_softcap"))


def kolibri(c: Config, i: int, a: Arguments, place: Arguments) -> None:
    sizes = (a["hidden_size"], a["num_experts"], a["top_k"])
    a["router"] = parts.LogitBiasGate(*sizes, a["router"], **place)


def muse_spark(c: Config, i: int, a: Arguments, place: Arguments) -> None:
    H, latent = a["hidden_size"], first(c, "moe_hidden_size")
    a["router"] = parts.ScaledGate(H, a["num_experts"], a["top_k"], a["router"], **place)
    a["router"].logit_scale = first(c, "output_multiplier")
    norm = parts.RMSNorm(latent, c.post_norm_eps, offset=1.0, scale_first=True, **place)
    a["expert_norm"], a["expert_hidden_size"] = norm, latent
    a["before"] = nn.Sequential(
        nn.Linear(H, latent, bias=False, **place), parts.RMSNorm(latent, c.rms_norm_eps, offset=1.0, **place)
    )
    a["after"] = nn.Linear(latent, H, bias=False, **place)


def nemotron(c: Config, i: int, a: Arguments, place: Arguments) -> None:
    latent, bias = getattr(c, "moe_latent_size", None), bool(c.mlp_bias)
    if latent is not None:
        a["before"] = nn.Linear(a["hidden_size"], latent, bias=bias, **place)
        a["after"], a["expert_hidden_size"] = nn.Linear(latent, a["hidden_size"], bias=bias, **place), latent


def zaya(c: Config, i: int, a: Arguments, place: Arguments) -> None:
    if i > 0:
        raise ValueError(
            f"{NAME}: the router of layer {i} of a zaya model takes the router states of the layer before "
            "it, for which MoELayer has no argument; layer_idx=0 is the only layer without"
        )
    sizes = (a["hidden_size"], a["num_experts"], a["top_k"])
    a["router"] = parts.DeepGate(*sizes, inner_size=first(c, "router_hidden_size"), eps=c.rms_norm_eps, **place)


def jetmoe(c: Config, i: int, a: Arguments, place: Arguments) -> None:
    a["before"], a["after"] = nn.Identity(), parts.AddBias(a["hidden_size"], **place)


def longcat(c: Config, i: int, a: Arguments, place: Arguments) -> None:
    a["router"] = replace(a["router"], routed_scaling_factor=first(c, "routed_scaling_factor"))
    zero = getattr(c, "zero_expert_num", None) or 0
    kind = activation(c.hidden_act)
    if zero and isinstance(kind, str):
        sizes = (a["hidden_size"], a["intermediate_size"], a["num_experts"])
        a["experts"] = parts.ZeroExperts(*sizes, activation=kind, **place)
    a["num_experts"] += zero


def step3p5(c: Config, i: int, a: Arguments, place: Arguments) -> None:
    """Clamps behind the activation, with one limit a layer for the experts and one for the shared expert."""
    limits, shared = ((getattr(c, n, None) or {i: None})[i] for n in ("swiglu_limits", "swiglu_limits_shared"))
    act, H, width = function(c.hidden_act), a["hidden_size"], first(c, "share_expert_dim")
    kind = parts.Gated(act, shared, clamp_last=True) if shared else activation(c.hidden_act)
    bias = bool(c.mlp_bias)
    a["shared_experts"] = parts.OpenSharedExperts(H, width, activation=kind, bias=bias, **place)
    if limits:
        a["activation"] = parts.Gated(act, limits, clamp_last=True)


def switch(c: Config, i: int, a: Arguments, place: Arguments) -> None:
    """A fixed capacity a sequence; the losses are a mean over sequences."""
    a |= {"init": "fan_in", "capacity": Capacity(fixed=first(c, "expert_capacity"), group="sequence")}
    if getattr(c, "output_router_logits", False):
        a["losses"] = (Switch(c.router_aux_loss_coef, scope="sequence"), ZLoss(c.router_z_loss_coef))


def dbrx_activation(c: Config, i: int, a: Arguments, place: Arguments) -> None:
    a["activation"] = activation((getattr(c, "ffn_act_fn", None) or {}).get("name", "silu"))
