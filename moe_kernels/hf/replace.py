# SPDX-License-Identifier: Apache-2.0
"""`replace(model)`: put a model's MoE layers on our kernels and say what was taken and what not; `restore(model)`.

A layer behind Hugging Face's experts interface gets our implementation chosen in its config. A block that the
interface does not reach (`blocks.TABLE`) gets a forward of ours on the instance. Nothing else changes: modules,
parameters, buffers, routers, hooks and state_dict keys are the ones that were there.
"""

from __future__ import annotations

import copy
import functools
import gc
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .blocks import REFUSED, TABLE, Adapter
from .blocks.weights import adjoin, why_not
from .experts import activation_name, fused_gate, local_weights
from .hook import NAME, register

_BEFORE = "_moe_kernels_before"
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_LOOKS_LIKE_MOE = re.compile(r"(Experts|MoE|Moe|MOE|MoeBlock|MoEBlock|MoELayer|MoeLayer|SparseMLP|CDMoE)$")


@dataclass(frozen=True)
class Entry:
    """One MoE layer of a model."""

    name: str
    """its name in the model, without the prefixes of DDP and torch.compile"""
    kind: str
    """the name of its class"""
    how: str = ""
    """taken: by which way, and what runs"""
    reason: str = ""
    """skipped: why"""


@dataclass(frozen=True)
class ReplaceReport:
    """What `replace` did. `print(report)` groups layers that differ in their numbers only."""

    taken: list[Entry] = field(default_factory=list)
    skipped: list[Entry] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the model has MoE layers and all of them run on our kernels."""
        return bool(self.taken) and not self.skipped

    def __str__(self) -> str:
        total = len(self.taken) + len(self.skipped)
        if not total:
            return "moe_kernels.replace: no MoE layer found in this model"
        lines = [f"moe_kernels.replace: {len(self.taken)} of {total} MoE layers taken"]
        for word, entries in (("taken", self.taken), ("skipped", self.skipped)):
            groups: dict[tuple[str, str, str], list[Entry]] = {}
            for e in entries:
                groups.setdefault((re.sub(r"\d+", "*", e.name), e.kind, e.how or e.reason), []).append(e)
            for (pattern, kind, text), group in groups.items():
                name = group[0].name if len(group) == 1 else f"{pattern} ({len(group)} layers)"
                lines.append(f"  {word:<8}{name or 'the model itself'}: {kind}: {text}")
        return "\n".join(lines)


# ---- what there is


@dataclass(frozen=True)
class _Layer:
    """A layer that was found. adapter None: behind the experts interface, or skipped."""

    module: nn.Module
    entry: Entry
    adapter: Adapter | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return self.entry.how.startswith("already")


def _name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _layers(model: nn.Module) -> Iterator[_Layer]:
    """Every MoE layer of the model: those that we know first, then what looks like one."""
    found: set[int] = set()
    around: set[int] = set()  # modules that hold one that was found
    for name, module in model.named_modules():
        if id(module) in found:
            continue
        layer = _known(_name(name), module)
        if layer is not None:
            found.update(id(inner) for inner in module.modules())
            yield layer
    for module in model.modules():
        if any(id(inner) in found for inner in module.modules()):
            around.add(id(module))
    for name, module in model.named_modules():
        if id(module) not in around and id(module) not in found and _suspect(module):
            found.update(id(inner) for inner in module.modules())
            yield _skip(_name(name), module, "no adapter knows this class")


def _skip(name: str, module: nn.Module, reason: str) -> _Layer:
    return _Layer(module, Entry(name, type(module).__name__, reason=reason))


def _known(name: str, module: nn.Module) -> _Layer | None:
    """The layer that a module is, if it is one that we know to take or to refuse."""
    kind = type(module)
    for cls in kind.__mro__:
        adapter = TABLE.get(cls.__name__)
        if adapter is not None and adapter.home in ("", cls.__module__):
            return _block(name, module, cls, adapter)
        if cls.__name__ in REFUSED:
            return _skip(name, module, REFUSED[cls.__name__])
    if kind.__module__.startswith("moe_kernels.") and _LOOKS_LIKE_MOE.search(kind.__name__):
        return _Layer(module, Entry(name, kind.__name__, how="already a layer of moe_kernels"))
    if all(hasattr(module, flag) for flag in ("has_gate", "is_transposed", "config", "down_proj")):
        return _interface(name, module)
    return None


def _suspect(module: nn.Module) -> bool:
    """Whether a module of an unknown class is an MoE layer by its looks: its name, or a list of experts in it."""
    experts = module._modules.get("experts")
    listed = isinstance(experts, nn.ModuleList | nn.ModuleDict) and len(experts) > 1
    named = _LOOKS_LIKE_MOE.search(type(module).__name__) is not None
    return (listed or named) and next(module.parameters(), None) is not None


def _interface(name: str, module: Any) -> _Layer:
    """A layer behind the experts interface."""
    current = module.config._experts_implementation
    try:
        w13, _, w2, _ = local_weights(module)
    except (TypeError, ValueError) as error:
        return _skip(name, module, str(error).removeprefix("moe_kernels: "))
    reason = why_not([w13, w2])
    if current == "deepgemm_megamoe":
        reason = "it was loaded for deepgemm_megamoe, which has rearranged its weights"
    elif not register():
        reason = "this transformers has no experts interface: it needs 5.0 or newer"
    if reason:
        return _skip(name, module, reason)
    gate = fused_gate(module)
    if gate is not None and w13.dtype == w2.dtype:
        path = f"fused_experts ({gate[0]})"
    else:
        path = f"unfused path ({_why_unfused(module, gate)})"
    how = f"experts interface, {path}"
    return _Layer(module, Entry(name, type(module).__name__, how=f"already on the {how}" if current == NAME else how))


def _why_unfused(module: Any, gate: Any) -> str:
    if gate is not None:
        return "the two weights differ in dtype"
    if getattr(module, "has_post_expert_norm", False):
        return "a norm behind each expert"
    act_fn = getattr(module, "act_fn", None)
    if activation_name(act_fn) is None and act_fn is not None:
        return f"{_act(act_fn)} is no activation that we fuse"
    return "a gate function of its own"


def _act(act_fn: Any) -> str:
    return getattr(act_fn, "__name__", type(act_fn).__name__)


def _block(name: str, module: Any, cls: type, adapter: Adapter) -> _Layer:
    """A block of the table, or why this one cannot be taken."""
    mine = _is_ours(module)
    if type(module).forward is not cls.forward:  # type: ignore[attr-defined]
        return _skip(name, module, f"{type(module).__name__} overrides the forward of {cls.__name__}")
    if not mine and "forward" in vars(module):
        return _skip(name, module, "something else has put a forward on this instance")
    children = [module._modules.get(child) for child in adapter.inside] if adapter.inside else [module]
    for inner in (m for child in children if child is not None for m in child.modules() if m is not module):
        if inner._forward_hooks or inner._forward_pre_hooks or inner._backward_hooks or "forward" in vars(inner):
            return _skip(name, module, f"a hook sits on {type(inner).__name__} inside it and would no longer be called")
    try:
        reason = why_not([w for column in adapter.columns(module) for w in column]) or adapter.refuse(module)
        options = {} if reason or mine else adapter.options(module)
    except (TypeError, AttributeError, KeyError, IndexError) as error:
        reason, options = (str(error) if isinstance(error, TypeError) else f"it is laid out otherwise: {error!r}"), {}
    if reason:
        return _skip(name, module, reason)
    path = adapter.path
    if adapter.act_fn is not None:
        act_fn = adapter.act_fn(module)
        fused = activation_name(act_fn)
        path = f"{path} ({fused})" if fused else f"unfused path ({_act(act_fn)} is no activation that we fuse)"
    how = f"forward of our own, {path}"
    entry = Entry(name, type(module).__name__, how=f"already on a {how}" if mine else how)
    return _Layer(module, entry, adapter, options)


def survey(model: nn.Module) -> ReplaceReport:
    """What `replace` would take of a model and what not. Nothing is changed."""
    return _report(list(_layers(model)))


def _report(layers: list[_Layer]) -> ReplaceReport:
    return ReplaceReport([x.entry for x in layers if x.entry.how], [x.entry for x in layers if x.entry.reason])


# ---- what is done


_FORWARDS = frozenset(adapter.forward for adapter in TABLE.values())


def _is_ours(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return isinstance(forward, functools.partial) and forward.func in _FORWARDS


def replace(model: nn.Module, *, strict: bool = False) -> ReplaceReport:
    """Put the MoE layers of a model on our kernels, in place. Calling it again is harmless.

    Args:
        model: any module; a model inside DistributedDataParallel or torch.compile is changed where it is.
        strict: raise unless every MoE layer can be taken; then nothing has been changed.
    Returns:
        ReplaceReport: `taken` and `skipped`, one Entry a layer, and `ok`. Dense layers are not mentioned.

    Only layers of this model are switched. Where a layer outside of it (of a model built from the same config object,
    or one that had to be skipped) shares the config, ours get a copy of the config, and the report says so.
    Experts held as one nn.Linear each are moved, layer by layer, into one block of memory, which takes room for one
    layer more meanwhile; `blocks/weights.py` says what a cast or move afterwards costs.

    Errors: TypeError for something that is no module; ValueError with the list under strict.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace: model must be a torch.nn.Module, got {type(model).__name__}")
    layers = list(_layers(model))
    report = _report(layers)
    if strict and not report.ok:
        raise ValueError(f"replace(strict=True) has changed nothing:\n{report}")
    taken = [layer for layer in layers if layer.entry.how]
    for layer in taken:
        if layer.adapter is not None and layer.adapter.per_expert:
            for column in layer.adapter.columns(layer.module):
                adjoin(column)
    for layer in taken:
        if layer.adapter is not None and not layer.done:
            layer.module.forward = functools.partial(layer.adapter.forward, layer.module, **layer.options)
    copied = _switch([layer.module for layer in taken if layer.adapter is None and not layer.done])
    for i, layer in enumerate(taken):
        if id(layer.module) in copied:
            report.taken[i] = Entry(
                layer.entry.name, layer.entry.kind, f"{layer.entry.how}, on a copy of a config that other layers share"
            )
    return report


def _switch(modules: list[Any]) -> set[int]:
    """Choose our implementation for these modules and no other; returns the ids of those that got a copied config."""
    if not modules:
        return set()
    shared = _configs_elsewhere({id(module) for module in modules})
    copies: dict[int, Any] = {}
    for module in modules:
        config = module.config
        setattr(module, _BEFORE, (config, config._experts_implementation))
        if id(config) in shared:
            module.config = copies.setdefault(id(config), copy.copy(config))
    for config in {id(module.config): module.config for module in modules}.values():
        _choose(config, NAME)
    return {id(module) for module in modules if any(module.config is c for c in copies.values())}


def _configs_elsewhere(taken: set[int]) -> set[int]:
    """ids of the configs of all living experts modules but these."""
    gc.collect()  # what is garbage must not count
    living = (o for o in gc.get_objects() if issubclass(type(o), nn.Module) and id(o) not in taken)
    return {id(vars(o).get("config")) for o in living if "is_transposed" in vars(o)}


def _choose(config: Any, name: str | None) -> None:
    """Set the implementation of this config alone; the public property would set it in sub-configs as well."""
    if hasattr(config, "_experts_implementation_internal"):
        config._experts_implementation_internal = name
    else:
        config._experts_implementation = name


def restore(model: nn.Module) -> int:
    """Undo `replace`, in place: every module computes by its own code again. Returns how many modules changed.

    An experts implementation that was chosen after `replace` stays. A model that was not replaced: 0.

    Errors: TypeError for something that is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model must be a torch.nn.Module, got {type(model).__name__}")
    switched: list[Any] = [m for m in model.modules() if _BEFORE in vars(m)]
    before = [(m, *vars(m).pop(_BEFORE)) for m in switched]
    ours = [found for found in before if found[0].config._experts_implementation == NAME]
    for module, config, implementation in ours:
        module.config = config
        _choose(config, implementation)
    patched: list[Any] = [m for m in model.modules() if _is_ours(m)]
    for module in patched:
        del module.forward
    return len(ours) + len(patched)
