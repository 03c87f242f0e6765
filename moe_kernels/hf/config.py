# SPDX-License-Identifier: Apache-2.0
"""`MoELayer.from_config`: a Hugging Face config in, the arguments of a MoELayer out. `families` has the table.

A config is one of transformers, or any object with model_type and the attributes of its config.json; a multimodal one
is entered through its text config. The layer is the family's MoE block, with the shared experts even where the decoder
layer adds them. What a block does besides, its row says in a note, and the caller has to do it.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

from ..layers import Experts
from . import parts, readers
from .families import FAMILIES, REFUSED, Family, Shared
from .readers import NAME, first

EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
INNER = ("text_config", "thinker_config", "llm_config", "language_config")
"""where a multimodal config keeps the one of its text model"""


def layer_kwargs(
    hf_config: Any, layer_idx: int | None = None, *, device: Any = None, dtype: Any = None
) -> dict[str, Any]:
    """The keyword arguments of the MoELayer that a config describes.

    Args:
        hf_config: see the head of this module.
        layer_idx: the decoder layer, where layers differ; None: the first one that is MoE.
        device, dtype: of the modules among the arguments; give the layer the same.

    Errors: ValueError for a config without experts, an unknown model_type, a dense layer, or a setting that MoELayer
    cannot express; TypeError for a layer_idx that is no int. Each says which.
    """
    top, family = find(hf_config)
    layer = moe_layer(top, family, layer_idx)
    c = _of_layer(top, layer)
    place = {"device": device, "dtype": dtype}
    arguments = {
        "hidden_size": first(c, "hidden_size", "d_model"),
        "intermediate_size": _at(first(c, family.width), 0),
        "num_experts": _at(first(c, *EXPERTS), layer),
        "top_k": family.top_k or _at(first(c, *TOP_K), layer),
        "router": family.router(c),
        "activation": readers.activation(first(c, family.activation) if family.activation else "silu", family.gated),
        "gated": family.gated,
    }
    coef = getattr(c, "router_aux_loss_coef", None)
    if coef and getattr(c, "output_router_logits", False):
        arguments["losses"] = parts.Balance(coef)
    if family.adapt is not None:
        family.adapt(c, layer, arguments, place)
    if family.noise and getattr(c, family.noise, None):
        warnings.warn(
            f"{NAME}: in training, {top.model_type} multiplies the input of the whole block by noise "
            f"({family.noise}={getattr(c, family.noise)}); MoELayer does not: do it before the layer",
            stacklevel=3,
        )
    _set_shared(c, family.shared, arguments, place)
    _set_experts(arguments, place)
    return arguments


def find(hf_config: Any) -> tuple[Any, Family]:
    """The config that describes the MoE layers, hf_config or one inside it, and its row of the table.

    Errors: ValueError.
    """
    c, seen = hf_config, []
    while c is not None:
        kind = getattr(c, "model_type", None)
        if kind in FAMILIES:
            return c, FAMILIES[kind]
        if kind in REFUSED:
            raise ValueError(f"{NAME}: {kind} cannot be a MoELayer: {REFUSED[kind]}")
        seen.append(c)
        c = next((inner for name in INNER if (inner := getattr(c, name, None)) is not None), None)
        if isinstance(c, dict):
            c = SimpleNamespace(**c)
    kinds = " in ".join(repr(getattr(c, "model_type", None) or type(c).__name__) for c in reversed(seen))
    if not any("expert" in name for c in seen for name in vars(c)):
        raise ValueError(f"{NAME}: {kinds} is no Mixture of Experts: its config names no experts")
    raise ValueError(
        f"{NAME}: the model_type {kinds} is not in the table; it knows {', '.join(sorted(FAMILIES))}. "
        "Give MoELayer the sizes and a Router yourself"
    )


def moe_layer(c: Any, family: Family, layer_idx: int | None) -> int:
    """layer_idx, or the first MoE layer. Errors: ValueError, TypeError."""
    if not any(_experts_of(c)):
        raise ValueError(f"{NAME}: this {c.model_type} config is no Mixture of Experts: it has no experts")
    depth = first(c, family.depth)
    sparse = [i for i in range(depth) if family.layers(c, i)]
    if not sparse:
        raise ValueError(f"{NAME}: this {c.model_type} config is no Mixture of Experts: all {depth} layers are dense")
    if layer_idx is None:
        return sparse[0]
    if not isinstance(layer_idx, int) or isinstance(layer_idx, bool):
        raise TypeError(f"{NAME}: layer_idx must be an int or None, got {layer_idx!r}")
    if not 0 <= layer_idx < depth:
        raise ValueError(f"{NAME}: layer_idx must be in 0..{depth - 1} for this {c.model_type} config, got {layer_idx}")
    if layer_idx not in sparse:
        raise ValueError(
            f"{NAME}: layer {layer_idx} of this {c.model_type} config is dense; its MoE layers are {_ranges(sparse)}"
        )
    return layer_idx


def _experts_of(c: Any) -> list[int]:
    """The numbers of experts that a config names, one or one a layer."""
    c = _of_layer(c, None)
    found = next((n for name in EXPERTS if (n := getattr(c, name, None)) is not None), None)
    return list(found) if isinstance(found, (list, tuple)) else [found or 0]


def _of_layer(c: Any, layer: int | None) -> Any:
    """The config of one layer, where a model has several; DBRX keeps its MoE in a part."""
    c = getattr(c, "ffn_config", None) or c
    if isinstance(c, dict):
        return SimpleNamespace(**c)
    return c.per_layer_config[layer] if layer is not None and getattr(c, "is_heterogeneous", False) else c


def _at(value: Any, i: int) -> Any:
    """A number, or the one of layer i."""
    return value[i] if isinstance(value, (list, tuple)) else value


def _ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 5] -> "1-3, 5"."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends))


def _set_shared(c: Any, shared: Shared | None, a: dict[str, Any], place: dict[str, Any]) -> None:
    """The arguments of the shared experts, unless the family has set them."""
    if shared is None or "shared_experts" in a:
        return
    count = 1 if shared.count is None else getattr(c, shared.count, None) or 0
    width = count * _at(first(c, shared.width), 0)
    bias = bool(shared.bias and getattr(c, shared.bias, False))
    if width == 0:
        return
    if bias or not isinstance(a["activation"], str):
        kwargs = {"activation": a["activation"], "gated": a["gated"], "bias": bias}
        a["shared_experts"] = parts.OpenSharedExperts(a["hidden_size"], width, **kwargs, **place)
    else:
        a["shared_intermediate_size"] = width
    a["shared_gate"] = shared.gate


def _set_experts(a: dict[str, Any], place: dict[str, Any]) -> None:
    """A module for experts that an activation without a kernel, a norm or modules around them make special."""
    norm, hidden = a.pop("expert_norm", None), a.pop("expert_hidden_size", a["hidden_size"])
    before, after = a.pop("before", None), a.pop("after", None)
    kind, gated = a["activation"], a["gated"]
    sizes = (hidden, a["intermediate_size"], a["num_experts"])
    experts = a.get("experts")
    if not isinstance(kind, str) or norm is not None:
        experts = parts.OpenExperts(*sizes, activation=kind, gated=gated, norm=norm, bias=a.get("bias", False), **place)
        a["activation"] = kind if isinstance(kind, str) else "silu"  # a name that MoELayer takes, and does not use
    if before is not None:
        experts = experts or Experts(*sizes, activation=kind, gated=gated, **place)
        experts = parts.WrappedExperts(before, experts, after)
    if experts is not None:
        a["experts"] = experts
