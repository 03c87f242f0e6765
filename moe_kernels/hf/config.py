# SPDX-License-Identifier: Apache-2.0
"""`MoELayer.from_config`: a Hugging Face config in, the arguments of a MoELayer out. `families` has the table.

A config is one of transformers, the dict of a config.json, or an object with its attributes; a multimodal one is
entered through its text config. The layer is the family's MoE block, with the shared experts even where the decoder
layer adds them. What a block does besides is warned of.
"""

from __future__ import annotations

import warnings
from os import PathLike
from types import SimpleNamespace
from typing import Any

from ..layers import Experts
from . import parts, readers
from .families import FAMILIES, REFUSED, Family, Shared
from .readers import NAME, maybe, read

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
        "hidden_size": read(c, "hidden_size"),
        "intermediate_size": _at(read(c, family.width), 0),
        "num_experts": _at(read(c, "num_experts"), layer),
        "top_k": family.top_k or _at(read(c, "num_experts_per_tok"), layer),
        "router": family.router(c),
        "activation": readers.activation(read(c, family.activation) if family.activation else "silu", family.gated),
        "gated": family.gated,
    }
    coef = getattr(c, "router_aux_loss_coef", None)
    if coef and getattr(c, "output_router_logits", False):
        arguments["losses"] = parts.Balance(coef)
    if family.adapt is not None:
        family.adapt(c, layer, arguments, place)
    if family.noise and getattr(c, family.noise, None):
        noise = f"{family.noise}={getattr(c, family.noise)}"
        _warn(f"in training, {top.model_type} multiplies the input of the whole block by noise ({noise})")
    if family.rest:
        _warn(f"the block of {top.model_type} also has {family.rest}")
    _set_shared(c, family.shared, arguments, place)
    _set_experts(arguments, place)
    return arguments


def _warn(what: str) -> None:
    warnings.warn(f"{NAME}: {what}; MoELayer does not, and leaves that to its caller", stacklevel=4)


def find(hf_config: Any) -> tuple[Any, Family]:
    """The config that describes the MoE layers, hf_config or one inside it, and its row of the table.

    Errors: ValueError; TypeError for what is no config.
    """
    if isinstance(hf_config, (str, PathLike)) or not (isinstance(hf_config, dict) or hasattr(hf_config, "__dict__")):
        raise TypeError(f"{NAME}: hf_config must be a config or the dict of a config.json, got {hf_config!r}")
    c, seen = hf_config, []
    while c is not None:
        c = SimpleNamespace(**c) if isinstance(c, dict) else c
        kind = getattr(c, "model_type", None)
        if kind in FAMILIES:
            return c, FAMILIES[kind]
        if kind in REFUSED:
            raise ValueError(f"{NAME}: {kind} cannot be a MoELayer: {REFUSED[kind]}")
        seen.append(c)
        c = next((inner for name in INNER if (inner := getattr(c, name, None)) is not None), None)
    kinds = " in ".join(repr(getattr(c, "model_type", None) or type(c).__name__) for c in reversed(seen))
    if not any("expert" in name and name[0] != "_" for c in seen for name in vars(c)):
        raise ValueError(f"{NAME}: {kinds} is no Mixture of Experts: its config names no experts")
    raise ValueError(
        f"{NAME}: the model_type {kinds} is not in the table; it knows {', '.join(sorted(FAMILIES))}. "
        "Give MoELayer the sizes and a Router yourself"
    )


def moe_layers(c: Any, family: Family) -> tuple[list[int], int]:
    """The MoE layers of a config that `find` gave, and the number of all. Errors: ValueError where there are none."""
    if not any(_experts_of(c)):
        raise ValueError(f"{NAME}: this {c.model_type} config is no Mixture of Experts: it has no experts")
    depth = read(c, family.depth)
    depth = len(depth) if isinstance(depth, (list, tuple)) else depth
    sparse = [i for i in range(depth) if family.layers(c, i)]
    if not sparse:
        raise ValueError(f"{NAME}: this {c.model_type} config is no Mixture of Experts: all {depth} layers are dense")
    return sparse, depth


def moe_layer(c: Any, family: Family, layer_idx: int | None) -> int:
    """layer_idx, or the first MoE layer. Errors: ValueError, TypeError."""
    sparse, depth = moe_layers(c, family)
    if layer_idx is None:
        return sparse[0]
    if not isinstance(layer_idx, int) or isinstance(layer_idx, bool):
        raise TypeError(f"{NAME}: layer_idx must be an int or None, got {layer_idx!r}")
    if not 0 <= layer_idx < depth:
        raise ValueError(f"{NAME}: layer_idx must be in 0..{depth - 1} for this {c.model_type} config, got {layer_idx}")
    if layer_idx not in sparse:
        raise ValueError(
            f"{NAME}: layer {layer_idx} of this {c.model_type} config is dense; its MoE layers are {ranges(sparse)}"
        )
    return layer_idx


def _experts_of(c: Any) -> list[int]:
    """The numbers of experts that a config names, one or one a layer."""
    if getattr(c, "is_heterogeneous", False):
        return [maybe(layer, "num_experts") or 0 for layer in c.per_layer_config]
    found = maybe(_of_layer(c, None), "num_experts")
    return list(found) if isinstance(found, (list, tuple)) else [found or 0]


def _of_layer(c: Any, layer: int | None) -> Any:
    """The config of one layer, where layers have their own values; DBRX keeps its MoE in a part."""
    c = getattr(c, "ffn_config", None) or c
    if isinstance(c, dict):
        return SimpleNamespace(**c)
    own: Any = getattr(c, "per_layer_config", None)
    if isinstance(own, dict):  # of a config.json; transformers has a list of whole configs there
        return SimpleNamespace(**(vars(c) | own.get(str(layer), {})))
    return own[layer] if layer is not None and getattr(c, "is_heterogeneous", False) else c


def _at(value: Any, i: int) -> Any:
    """A number, or the one of layer i."""
    return value[i] if isinstance(value, (list, tuple)) else value


def ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 5] -> "1-3, 5"."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends))


def _set_shared(c: Any, shared: Shared | None, a: dict[str, Any], place: dict[str, Any]) -> None:
    """The arguments of the shared experts, unless the family has set them."""
    if shared is None or "shared_experts" in a:
        return
    count = 1 if shared.count is None else maybe(c, shared.count) or 0
    width = count * _at(read(c, shared.width), 0)
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
