# SPDX-License-Identifier: Apache-2.0
"""Layers in inference on a CPU pack their expert weights by themselves: when, for how long, and how to stop it.

A copy of the weights in panels (`pack_experts`) is laid beside the parameters once a layer has been called `AFTER`
times with the same weights and a batch that gives some expert `few_rows()` rows or more: below that a kernel reads the
parameters themselves, and nothing here costs or gains anything. The bits of the answer are those of the parameters.
A quarter of the memory (of the machine, or of its control group) has to stay free; where that is not known, nothing is
packed. `MOE_KERNELS_PACK=0` or `enable(False)` switches it off.

A copy serves only as long as the weights are what they were. At every use it is compared with them: the same parameter
objects, addresses, sizes, dtypes and version counters, and, of each expert that will be read from the copy, `SAMPLES`
elements of both matrices, spread over rows and columns, bit by bit. That finds load_state_dict, in-place updates,
.to(), new parameters, and writes through `.data` that reach many elements: a merged adapter, a scaled or zeroed expert.
Not found: a write through `.data` (or numpy, or a C pointer) that misses every sampled element, such as a single
number. After such a write call `repack(module)`.

Only plain contiguous `nn.Parameter`s [E, rows, k] in x's dtype are packed, and none in shared memory. Under autocast,
tracing, autograd, dispatch modes and MOE_KERNELS_DEBUG=1 the parameters are read.

The copies belong to no module: they are in no state_dict, no deepcopy and no pickle, and die with their module.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import _build, check, ops
from .schemas import ACTIVATION_CODE, DTYPE_CODE

AFTER = 8  # calls with the same weights: packing costs about as much as they gain
SAMPLES = 128  # elements of each matrix of an expert that are compared
VARIABLE = "MOE_KERNELS_PACK"
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # NaN equals itself
_ROOT = Path("/")
_on = True


@dataclass(frozen=True)
class _Copy:
    key: tuple[Any, ...]
    packed13: Tensor
    packed2: Tensor
    samples: tuple[Tensor, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.packed13, self.packed2, *self.samples))


@dataclass
class _Slot:
    """What is known of one module."""

    calls: int = 0
    key: tuple[Any, ...] = ()
    """of the weights that the calls were counted for"""
    copy: _Copy | None = None
    refused: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """held by whoever counts or packs; the others read the parameters meanwhile"""

    def clear(self, calls: int = 0) -> None:
        self.copy, self.calls, self.key = None, calls, ()


_slots: weakref.WeakKeyDictionary[nn.Module, _Slot] = weakref.WeakKeyDictionary()


# ---- the call


def fused_experts(module: nn.Module, x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor,
                  **options: Any) -> Tensor:  # fmt: skip
    """`ops.fused_experts` on the weights of a module, or on their packed copy where there is one that is up to date."""
    copy = None
    if not torch.compiler.is_compiling() and _suits(x, w13, w2, topk_weights, topk_ids, options):
        copy = _up_to_date(module, w13, w2, topk_ids, options.get("gated"))
    if copy is None:
        return ops.fused_experts(x, w13, w2, topk_weights, topk_ids, **options)
    return torch.ops.moe_kernels.fused_experts_packed.default(  # type: ignore[no-any-return]
        x, copy.packed13, copy.packed2, w2.shape[2], topk_weights, topk_ids, options.get("w13_bias"),
        options.get("w2_bias"), None, None, ACTIVATION_CODE[options.get("activation", "silu")],
        copy.packed13.shape[2] == 2, options.get("apply_router_weight_on_input", False),
        options.get("swiglu_limit", 7.0), options.get("swiglu_alpha", 1.702), w13, w2,
    )  # fmt: skip


def _suits(x: Any, w13: Any, w2: Any, topk_weights: Any, topk_ids: Any, options: dict[str, Any]) -> bool:
    """Whether this is a plain call of inference that panels could serve; the cheapest questions first."""
    if type(x) is not Tensor or x.dim() != 2 or x.shape[0] < few_rows() or not enabled():
        return False
    if type(w13) is not nn.Parameter or type(w2) is not nn.Parameter or not (x.is_cpu and w13.is_cpu and w2.is_cpu):
        return False
    if any(options.get(name) for name in ("interleaved", "transposed")) or options.get("hidden_mask") is not None:
        return False
    if x.dtype != w13.dtype or options.get("activation", "silu") not in ACTIVATION_CODE:
        return False
    biases = [t for t in (options.get("w13_bias"), options.get("w2_bias")) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, w13, w2, topk_weights, *biases)):
        return False
    if not (w13.is_contiguous() and w2.is_contiguous()) or w13.is_inference() or w2.is_inference():
        return False
    if is_in_torch_dispatch_mode() or torch.is_autocast_enabled("cpu") or check.checked():
        return False
    if any(b.dtype != w13.dtype for b in biases) or type(topk_ids) is not Tensor:
        return False
    return ops._gated(x, w13, w2, topk_weights, topk_ids, options.get("gated"), False) is not None


def _up_to_date(module: nn.Module, w13: Tensor, w2: Tensor, topk_ids: Tensor, gated: bool | None) -> _Copy | None:
    """The copy of the module's weights, made if it is time to; None where the parameters are to be read."""
    E = w13.shape[0]
    counts = torch.bincount(topk_ids.reshape(-1).clamp(-1, E) + 1, minlength=E + 2)[1 : E + 1]
    used = (counts >= few_rows()).nonzero().view(-1)
    if used.numel() == 0:
        return None
    slot = _slots.get(module)
    if slot is None:
        slot = _slots.setdefault(module, _Slot())
    key, copy = (_identity(w13), _identity(w2)), slot.copy
    if copy is not None:
        if copy.key == key and all(
            torch.equal(_samples(w).index_select(0, used), was.index_select(0, used))
            for w, was in zip((w13, w2), copy.samples, strict=True)
        ):
            return copy
        slot.clear()
    if not slot.lock.acquire(blocking=False):
        return None
    try:
        slot.calls = slot.calls + 1 if slot.key in ((), key) else 1
        slot.key = key
        if slot.calls <= AFTER:
            return None
        slot.copy = _pack(slot, key, w13, w2, w13.shape[1] == 2 * w2.shape[2] if gated is None else gated)
        slot.calls = 0
        return slot.copy
    finally:
        slot.lock.release()


@dataclass(frozen=True, eq=False)
class _Identity:
    """Of a parameter at one moment; equal only for the same object (== of tensors compares elements)."""

    of: weakref.ref[Tensor]
    facts: tuple[Any, ...]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.facts == other.facts and self.of() is other.of() is not None


def _identity(w: Tensor) -> _Identity:
    return _Identity(weakref.ref(w), (w.data_ptr(), w._version, w.dtype, w.shape))


def _samples(w: Tensor) -> Tensor:
    """A view [E, samples] of elements spread over the rows and columns of every expert, as bits."""
    size = w.shape[1] * w.shape[2]
    count = min(SAMPLES, size)
    step = size // count
    while math.gcd(step, w.shape[2]) != 1:  # else they would all stand in a few columns
        step -= 1
    bits = w.detach().view(_BITS[w.element_size()])
    return bits.as_strided((w.shape[0], count), (size, step))


def _pack(slot: _Slot, key: tuple[Any, ...], w13: Tensor, w2: Tensor, gated: bool) -> _Copy | None:
    E, H, I = w2.shape
    slot.refused = no_room(panel_bytes(E, H, I, gated, w13.element_size())) or (
        "the weights are in shared memory" if w13.is_shared() or w2.is_shared() else ""
    )
    if slot.refused:
        return None
    samples = _samples(w13).clone(), _samples(w2).clone()
    try:
        packed = torch.ops.moe_kernels.pack_experts.default(w13, w2, gated, False, False, DTYPE_CODE[w13.dtype])
    except (RuntimeError, MemoryError) as error:  # no memory after all
        slot.refused = f"packing failed: {error}"
        return None
    return _Copy(key, packed[0], packed[1], samples)


# ---- switches


def enabled() -> bool:
    """Whether layers may pack: MOE_KERNELS_PACK is not 0, and nobody called enable(False)."""
    return _on and os.environ.get(VARIABLE, "1") != "0" and _build.ops_loaded


def enable(on: bool = True) -> None:
    """Let layers pack their weights by themselves, or free every copy and never pack again."""
    global _on
    _on = on
    for slot in [] if on else list(_slots.values()):
        slot.clear()


def repack(module: nn.Module) -> int:
    """Forget the packed copies of `module` and of everything in it; the next call that can use one packs anew.

    For writes to weights that cannot be noticed (see the head of this file). Returns how many copies were dropped.
    """
    dropped = 0
    for part in module.modules():
        slot = _slots.get(part)
        if slot is not None:
            dropped += slot.copy is not None
            slot.clear(AFTER)
    return dropped


# ---- the rule, and what came of it


@functools.cache
def few_rows() -> int:
    """Rows of an expert from which on a kernel reads panels; 2^62 where the host module is missing."""
    try:
        return int(importlib.import_module(f"{__package__}._host").dot_rows)
    except (ImportError, AttributeError):
        return 1 << 62


def panel_bytes(E: int, H: int, I: int, gated: bool, element: int) -> int:
    """Bytes of the packed copy of one layer."""
    return E * 32 * ((1 + gated) * -(-I // 32) * H + -(-H // 32) * I) * element


def no_room(nbytes: int) -> str:
    """Why a copy of so many bytes is not made, or an empty string."""
    known = free_memory()
    if known is None:
        return "the free memory is not known here"
    free, total = known
    if free - nbytes >= total // 4:
        return ""
    return f"{_size(nbytes)} of {_size(free)} free memory would leave less than a quarter of {_size(total)}"


def free_memory() -> tuple[int, int] | None:
    """(free, total) bytes of the machine or of the control group of this process, whichever has less free."""
    return min(_memories(), default=None)


def _memories() -> Iterator[tuple[int, int]]:
    try:
        facts = dict(line.split(":", 1) for line in (_ROOT / "proc/meminfo").read_text().splitlines())
        yield tuple(int(facts[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))  # type: ignore[misc]
        groups = [line.split(":", 2)[1:] for line in (_ROOT / "proc/self/cgroup").read_text().splitlines()]
    except (OSError, KeyError, ValueError):
        return
    for controllers, path in groups:
        if controllers == "":
            root, limit, used, cache = _ROOT / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit = _ROOT / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            used, cache = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder == root.parent:
                break
            try:
                most = int((folder / limit).read_text())  # "max": no limit
                now = int((folder / used).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            yield most - now + int(stat.get(cache, 0)), most


def packed() -> tuple[int, int]:
    """(layers that have a packed copy now, bytes of all copies)."""
    copies = [slot.copy for slot in list(_slots.values()) if slot.copy is not None]
    return len(copies), sum(copy.nbytes for copy in copies)


def rule() -> str:
    """The rule in one sentence, for `doctor` and `explain`."""
    if not enabled():
        return "off" + (f" ({VARIABLE}=0)" if os.environ.get(VARIABLE, "1") == "0" else "")
    return f"after {AFTER} calls with the same weights, while a quarter of the memory stays free"


def report() -> list[str]:
    """Lines for `doctor`: the rule, what is free, what was packed, and what was refused and why."""
    known, (layers, nbytes) = free_memory(), packed()
    free = "free memory not known" if known is None else f"{_size(known[0])} of {_size(known[1])} free"
    refused = {slot.refused for slot in list(_slots.values()) if slot.refused}
    return [f"{rule()}; {free}", f"packed now: {layers} layers, {nbytes} bytes"] + [f"not packed: {r}" for r in refused]


def explain(T: int, H: int, I: int, E: int, gated: bool, transposed: bool, element: int) -> tuple[str, str]:
    """(what a layer of these sizes does in inference, or why it does not)."""
    nbytes = panel_bytes(E, H, I, gated, element)
    if not enabled():
        return "", f"it is {rule()}"
    if transposed:
        return "", "transposed weights run along the columns of a panel already"
    if few_rows() > T:
        return "", f"no expert gets {few_rows()} rows"
    return ("", why) if (why := no_room(nbytes)) else (f"a layer in inference packs {nbytes} bytes {rule()}", "")


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
