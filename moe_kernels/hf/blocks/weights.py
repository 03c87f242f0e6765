# SPDX-License-Identifier: Apache-2.0
"""The weights of experts that are held one by one (`nn.Linear` each), as the one tensor that the kernels read.

`adjoin` moves the values of such parameters into one block of memory, once; the Parameter objects, their names and
values stay, so optimisers, state_dict and saving see nothing of it. `stack` then reads that block without a copy.
Whatever takes a parameter out of the block (a cast, a move to a device, a deepcopy, a flattening wrapper) costs speed
only: `stack` sees it and copies, all experts where a gradient is wanted or under torch.compile, else those in use.
Calling `replace` again puts them back together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import check


def linears(experts: Iterable[nn.Module], *names: str) -> list[nn.Module]:
    """Expert by expert the layers of these names (none: the expert is a layer); TypeError where one is no nn.Linear."""
    found: list[nn.Module] = []
    for number, expert in enumerate(experts):
        for layer in [expert] if not names else [expert._modules.get(name) for name in names]:
            if type(layer) is not nn.Linear:
                raise TypeError(
                    f"expert {number} holds a {type(layer).__name__} where a plain nn.Linear is wanted: merge or "
                    "dequantise it first"
                )
            found.append(layer)
    return found


def values(layers: Sequence[nn.Module], name: str = "weight") -> list[Tensor]:
    """The parameter of that name of every layer."""
    return [layer._parameters[name] for layer in layers]  # type: ignore[misc]


def why_not(weights: Sequence[Tensor]) -> str:
    """Why the kernels cannot read these weights, or an empty string."""
    for w in weights:
        if hasattr(type(w), "to_local"):
            return "its weights are DTensors: call replace before the model is sharded"
        if torch.utils._python_dispatch.is_traceable_wrapper_subclass(w):
            return f"its weights are quantised ({type(w).__name__}): load the model dequantised"
        if w.dtype not in check.FLOATS:
            return f"its weights are quantised ({check.got(w)}): load the model dequantised"
        if w.is_meta:
            return "its weights are on the meta device: load them first"
    kinds = {(w.dtype, w.device) for w in weights}
    if len({device for _, device in kinds}) > 1:
        return "its experts are on several devices"
    return ""


def adjoin(weights: Sequence[Tensor]) -> None:
    """Moves equal-shaped parameters into one block of memory in this order. Needs room for one copy meanwhile."""
    first = weights[0]
    if _adjacent(weights) or len({id(w) for w in weights}) < len(weights):
        return
    if any(w.shape != first.shape or w.dtype != first.dtype or w.is_inference() for w in weights):
        return
    with torch.no_grad():
        block = torch.empty((len(weights), *first.shape), dtype=first.dtype, device=first.device)
        for place, weight in zip(block.unbind(), weights):
            place.copy_(weight)
            weight.data = place


def _adjacent(weights: Sequence[Tensor]) -> bool:
    """Whether the weights lie one behind the other in one block."""
    first = weights[0]
    at, size, dtype = first.data_ptr(), first.numel() * first.element_size(), first.dtype
    storage = first.untyped_storage()
    if at + size * len(weights) > storage.data_ptr() + storage.nbytes():
        return False
    for number, w in enumerate(weights):  # inside one storage: a pointer says it all
        if w.data_ptr() != at + number * size or w.dtype != dtype or not w.is_contiguous():
            return False
    return True


class _Adjacent(torch.autograd.Function):
    """n weights that lie one behind the other -> [n, ...] on the same memory; the gradient goes back in parts."""

    @staticmethod
    def forward(*weights: Tensor) -> Tensor:
        first = weights[0].detach()
        shape = (len(weights), *first.shape)
        return first.as_strided(shape, (first.numel(), *first.stride()), first.storage_offset())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(g if need else None for g, need in zip(grads[0].unbind(), ctx.needs_input_grad))


def stack(weights: list[Tensor]) -> Tensor:
    """[n, ...] of n equal-shaped weights, differentiable; without a copy where they lie side by side."""
    if not torch.compiler.is_compiling() and _adjacent(weights):
        return _Adjacent.apply(*weights)  # type: ignore[no-any-return, no-untyped-call]
    return torch.stack(weights)


def stacks(columns: Sequence[list[Tensor]], topk_ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """One stack a column, [E, ...] each, and the ids into them.

    Args:
        columns: E*n weights each, n a column, in the order of the experts.
        topk_ids: int [T, K]; -1 is absent.
    Returns:
        The stacks and topk_ids, or, where copies are due and no gradient is, stacks of the experts in use and new ids.
    """
    E = len(columns[-1])
    if not torch.compiler.is_compiling():
        copied = not all(_adjacent(column) for column in columns)
        needs_grad = torch.is_grad_enabled() and any(w.requires_grad for column in columns for w in column)
        if copied and not needs_grad and topk_ids.numel() < E:
            used = sorted({e for e in topk_ids.flatten().tolist() if 0 <= e < E}) or [0]
            place = topk_ids.new_full((E + 1,), -1)  # the last one answers for id -1
            place[torch.tensor(used, device=place.device)] = torch.arange(len(used), dtype=place.dtype).to(place.device)
            columns = [[w for e in used for w in c[e * (len(c) // E) : (e + 1) * (len(c) // E)]] for c in columns]
            topk_ids, E = place[topk_ids.long()], len(used)
    stacked = [stack(column) for column in columns]
    return [s if s.shape[0] == E else s.unflatten(0, (E, -1)).flatten(1, 2) for s in stacked], topk_ids
