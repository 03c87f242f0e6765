# SPDX-License-Identifier: Apache-2.0
"""`Watch`: hooks that see what every MoE layer of a model chooses, in a `MoELayer` and in Hugging Face's blocks alike.

A block of Hugging Face is seen through its experts module, which is called as experts(hidden, top_k_index,
top_k_weights); so it does not matter which experts implementation serves it, or whether `replace` has been called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .layers import MoELayer
from .losses import recomputing
from .routers import Gate, count_experts


@dataclass(frozen=True, eq=False)
class Seen:
    """One forward of one layer."""

    name: str
    num_experts: int
    ids: Tensor
    """int [T, K] as chosen, -1 for absent"""
    weights: Tensor
    """floating [T, K]"""
    dropped: Tensor | None
    """bool [T, K]"""
    training: bool
    recomputed: bool
    counts: Tensor | None = None
    """int [E], where the router has counted already"""

    def chosen_counts(self) -> Tensor:
        """int64 [E]"""
        if self.counts is not None:
            return self.counts.long()
        return count_experts(torch.where(self.ids < self.num_experts, self.ids, -1), self.num_experts).long()


class Watch:
    """Calls callback(Seen) after the choice of every MoE layer of the model.

    names: the layers, in the order of `model.named_modules()`.
    """

    def __init__(self, model: nn.Module, callback: Callable[[Seen], None]) -> None:
        self.callback = callback
        self.layers: dict[str, nn.Module] = {}
        self._handles: list[Any] = []
        self._chosen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._blocks: dict[str, nn.Module] = {}  # what holds the experts, and the selection bias beside them
        modules = dict(model.named_modules())
        ours = [name for name, m in modules.items() if isinstance(m, MoELayer)]
        for name, module in modules.items():
            within = [*ours, *self.layers]
            if any(name.startswith(f"{layer}." if layer else "") and name != layer for layer in within):
                continue  # a part of one that is watched; adapters wrap experts in modules that look like them
            if isinstance(module, MoELayer):
                self.layers[name] = module
                self._handles.append(module.router.register_forward_hook(partial(self._routed, name)))
                self._handles.append(module.register_forward_hook(partial(self._ran, name)))
            elif is_experts(module):
                self.layers[name], self._blocks[name] = module, modules[name.rpartition(".")[0]]
                self._handles.append(module.register_forward_pre_hook(partial(self._called, name)))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.layers)

    def close(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _routed(self, name: str, gate: Gate, _args: Any, output: Any) -> None:
        routing = output[1]
        self._chosen[name] = (routing.topk_ids, routing.topk_weights.detach(), routing.tokens_per_expert)

    def _ran(self, name: str, layer: MoELayer, _args: Any, _output: Any) -> None:
        ids, weights, counts = self._chosen.pop(name)
        dropped = None if layer.last_routing is None else layer.last_routing.dropped
        E = layer.router.num_experts
        self.callback(Seen(name, E, ids, weights, dropped, layer.training, recomputing(), counts))

    def _called(self, name: str, module: Any, args: tuple[Any, ...]) -> None:
        ids, weights = _ids(args[1]), args[2].detach()
        self.callback(Seen(name, _num_experts(module), ids, weights, None, module.training, recomputing()))

    def zeros(self, name: str) -> Tensor:
        """int64 [E]: no slots."""
        layer = self.layers[name]
        return torch.zeros(_num_experts(layer), dtype=torch.int64, device=next(layer.parameters()).device)

    def bias(self, name: str) -> Tensor | None:
        """The selection bias of a layer: its own, or the one beside Hugging Face's experts."""
        layer = self.layers[name]
        if isinstance(layer, MoELayer):
            return layer.router.e_score_correction_bias
        found = (getattr(m, "e_score_correction_bias", None) for m in self._blocks[name].modules())
        return next((bias for bias in found if isinstance(bias, Tensor)), None)


def is_experts(module: nn.Module) -> bool:
    """Whether a module stands behind Hugging Face's experts interface, or holds Switch's experts."""
    return (hasattr(module, "has_gate") and hasattr(module, "down_proj")) or _is_switch(module)


def _is_switch(module: nn.Module) -> bool:
    return type(module).__name__ == "SwitchTransformersExperts"


def _ids(chosen: Tensor) -> Tensor:
    """int [T, K] as it is; Switch's one-hot [T, 1, E] -> [T, 1], -1 where all are 0."""
    if chosen.dim() == 2:
        return chosen
    kept, ids = chosen.max(dim=-1)
    return torch.where(kept > 0, ids, -1)


def _num_experts(module: Any) -> int:
    if isinstance(module, MoELayer):
        return module.router.num_experts
    return len(module) if _is_switch(module) else int(module.num_experts)
