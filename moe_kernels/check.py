# SPDX-License-Identifier: Apache-2.0
"""What a public op refuses, and the sentence it says: the argument, what was wanted and what came.

A wrong kind (no tensor, integer where floating is wanted, quantised) is a TypeError, a wrong size or device a
ValueError. The ops call the longer explanations here only after their own short check has failed.
"""

import os
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

from .schemas import ACTIVATIONS, DTYPES, acc_dtype

FLOATS = frozenset(DTYPES)
IDS = frozenset((torch.int32, torch.int64))
BOOL = frozenset((torch.bool,))
INT32 = frozenset((torch.int32,))
MAX_ROWS = 2**31 - 1
_KIND = {FLOATS: "floating", IDS: "int32 or int64", BOOL: "bool", INT32: "int32"}


def got(value: Any) -> str:
    """A value in a few words: a tensor as `int64 [8, 4]`."""
    if not isinstance(value, Tensor):
        return f"{type(value).__name__} {value!r}" if isinstance(value, (int, float, str)) else type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def refuse(op: str, name: str, want: str, came: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{op}: {name} must be {want}, got {came}")


def tensor(op: str, name: str, t: Any, kinds: frozenset[torch.dtype], sizes: Sequence[tuple[str, int | None]],
           device: torch.device | None = None) -> None:  # fmt: skip
    """Refuses t unless it has one of the dtypes, the named sizes (None: any) and the device."""
    if isinstance(t, Tensor) and t.dtype in kinds and _fits(t.shape, sizes) and (device is None or t.device == device):
        return
    named = ", ".join(letter if size is None else f"{letter}={size}" for letter, size in sizes)
    want = f"{_KIND[kinds]} [{named}]"
    if not isinstance(t, Tensor) or t.dtype not in kinds:
        refuse(op, name, want, got(t), TypeError)
    if not _fits(t.shape, sizes):
        refuse(op, name, want, str(list(t.shape)))
    refuse(op, name, f"on {device} like the other tensors", str(t.device))


def _fits(shape: torch.Size, sizes: Sequence[tuple[str, int | None]]) -> bool:
    if len(shape) != len(sizes):
        return False
    for have, (_, size) in zip(shape, sizes):  # noqa: SIM110  a loop is a microsecond faster than a generator
        if size is not None and size != have:
            return False
    return True


def choice(op: str, name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        refuse(op, name, f"one of {', '.join(choices)}", repr(value))


def count(op: str, name: str, value: Any, low: int, high: int | None = None, meaning: str = "") -> None:
    """Refuses an integer argument outside low..high."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        refuse(op, name, "an int", got(value), TypeError)
    if value < low or (high is not None and value > high):
        refuse(op, name, f"{low} or more" if high is None else f"in {low}..{meaning}{high}", str(value))


def group(op: str, value: Any) -> None:
    """Refuses what names no group of tokens."""
    if value not in ("batch", "sequence"):
        if isinstance(value, str):
            refuse(op, "group", '"batch", "sequence" or a number of tokens', repr(value))
        count(op, "group", value, 1)


def plain_weight(op: str, name: str, w: Any) -> Tensor:
    """A weight as an ordinary floating tensor: a DTensor gives this rank's part; quantised ones are refused."""
    if type(w) is Parameter or type(w) is Tensor:
        return w
    if not isinstance(w, Tensor):
        refuse(op, name, "a floating tensor", got(w), TypeError)
    if hasattr(type(w), "to_local"):
        if any(p.is_partial() for p in w.placements):  # type: ignore[attr-defined]
            refuse(op, name, "sharded or replicated", "a DTensor with a partial placement: reduce it first")
        return w.to_local()  # type: ignore[attr-defined, no-any-return]
    if torch.utils._python_dispatch.is_traceable_wrapper_subclass(w):
        refuse(op, name, "a plain floating tensor (dequantise it first)", type(w).__name__, TypeError)
    return w


def weight_dtype(op: str, name: str, w: Tensor) -> None:
    if w.dtype not in FLOATS:
        refuse(op, name, "a plain floating tensor (float64, float32, bfloat16 or float16; dequantise it first)", got(w),
               TypeError)  # fmt: skip


def experts(op: str, x: Any, w13: Tensor, w2: Tensor, topk_weights: Any, topk_ids: Any, *, activation: str,
            gated: bool | None, interleaved: bool, transposed: bool) -> NoReturn:  # fmt: skip
    """Says what is wrong with the arguments of fused_experts."""
    tensor(op, "x", x, FLOATS, [("T", None), ("H", None)])
    weights(op, w13, w2, activation, gated, interleaved, transposed, hidden_size=x.shape[1])
    for name, w in (("w13", w13), ("w2", w2)):
        if w.dtype != x.dtype:
            refuse(op, name, f"of x's dtype {str(x.dtype).removeprefix('torch.')}", got(w), TypeError)
        if w.device != x.device:
            refuse(op, name, f"on {x.device} like x", str(w.device))
    slots(op, x.shape[0], topk_weights, topk_ids, x.device)
    raise AssertionError(f"{op}: arguments refused without a reason")


def weights(op: str, w13: Tensor, w2: Tensor, activation: str, gated: bool | None, interleaved: bool, transposed: bool,
            hidden_size: int | None = None) -> tuple[bool, int]:  # fmt: skip
    """Refuses weights that do not make expert MLPs; returns whether they are gated, and I."""
    for name, w in (("w13", w13), ("w2", w2)):
        weight_dtype(op, name, w)
        if w.dim() != 3:
            refuse(op, name, "3-D, one matrix an expert", str(list(w.shape)))
    E, H, I = (w2.shape[0], w2.shape[2], w2.shape[1]) if transposed else (w2.shape[0], w2.shape[1], w2.shape[2])
    H = H if hidden_size is None else hidden_size
    if w13.dtype != w2.dtype:
        refuse(op, "w2", f"of w13's dtype {str(w13.dtype).removeprefix('torch.')}", got(w2), TypeError)
    sizes: list[tuple[str, int | None]] = [("E", w13.shape[0]), ("H", H), ("I", None)]
    tensor(op, "w2", w2, FLOATS, [sizes[0], sizes[2], sizes[1]] if transposed else sizes, w13.device)
    fits = [
        flag for flag in (True, False) if gated in (None, flag) and w13.shape[2 if transposed else 1] == (1 + flag) * I
    ]
    if w13.shape[1 if transposed else 2] != H or not fits:
        wide, narrow = (f"[E={E}, H={H}, 2I={2 * I}]", f"[E={E}, H={H}, I={I}]")
        if not transposed:
            wide, narrow = f"[E={E}, 2I={2 * I}, H={H}]", f"[E={E}, I={I}, H={H}]"
        want = {None: f"{wide} (gated) or {narrow}", True: f"{wide} (gated)", False: f"{narrow} (not gated)"}[gated]
        turned = w13.shape[2 if transposed else 1] == H
        hint = f"; is transposed={not transposed} meant?" if turned else ""
        refuse(op, "w13", f"{want}, as w2 is {list(w2.shape)}", f"{list(w13.shape)}{hint}")
    choice(op, "activation", activation, ACTIVATIONS)
    if not fits[0] and (activation == "swigluoai" or interleaved):
        refuse(
            op, "w13", f"gated for {'interleaved=True' if interleaved else activation}", f"{list(w13.shape)}, not gated"
        )
    if E == 0 or H == 0 or I == 0:
        refuse(op, "w13", "without a size of 0", str(list(w13.shape)))
    return fits[0], I


def slots(op: str, T: int, topk_weights: Any, topk_ids: Any, device: torch.device) -> None:
    """Refuses topk_weights and topk_ids that are not a pair [T, K]."""
    if isinstance(topk_weights, Tensor) and topk_weights.dtype in IDS:
        refuse(
            op,
            "topk_weights (4th argument)",
            "floating [T, K]",
            f"{got(topk_weights)}: topk_ids are the 5th",
            TypeError,
        )
    K = topk_ids.shape[1] if isinstance(topk_ids, Tensor) and topk_ids.dim() == 2 else None
    tensor(op, "topk_ids", topk_ids, IDS, [("T", T), ("K", None)], device)
    tensor(op, "topk_weights", topk_weights, FLOATS, [("T", T), ("K", K)], device)
    count(op, "K, the second size of topk_ids,", K, 1)
    if T * topk_ids.shape[1] > MAX_ROWS:
        refuse(op, "T*K", f"at most {MAX_ROWS}", str(T * topk_ids.shape[1]))


def optional(op: str, x: Tensor, sizes: tuple[int, ...], w13_bias: Any, w2_bias: Any, expert_map: Any,
             hidden_mask: Any) -> None:  # fmt: skip
    T, K, I, H, E, width = sizes
    if w13_bias is not None:
        tensor(op, "w13_bias", w13_bias, FLOATS, [("E", E), ("I" if width == I else "2I", width)], x.device)
    if w2_bias is not None:
        tensor(op, "w2_bias", w2_bias, FLOATS, [("E", E), ("H", H)], x.device)
    if expert_map is not None:
        tensor(op, "expert_map", expert_map, IDS, [("G", None)], x.device)
    if hidden_mask is not None:
        tensor(op, "hidden_mask", hidden_mask, FLOATS, [("T", T), ("K", K), ("I", I)], x.device)


def main_grad(op: str, name: str, main: Any, weight_name: str, weight: Tensor, either_major: bool = False) -> None:
    """Refuses what the backward cannot add the gradient of a weight to."""
    kinds = frozenset((acc_dtype(weight.dtype),))
    want = f"{str(acc_dtype(weight.dtype)).removeprefix('torch.')} {list(weight.shape)} like {weight_name}"
    if not isinstance(main, Tensor) or main.dtype not in kinds:
        refuse(op, name, want, got(main), TypeError)
    if main.shape != weight.shape:
        refuse(op, name, want, str(list(main.shape)))
    if main.device != weight.device:
        refuse(op, name, f"on {weight.device} like {weight_name}", str(main.device))
    if not (main.is_contiguous() or (either_major and main.mT.is_contiguous())):
        refuse(op, name, "contiguous" + (", itself or its mT" if either_major else ""), f"strides {main.stride()}")
    if main.requires_grad:
        refuse(op, name, "without a gradient of its own", "a tensor that requires one")


def operands(op: str, a: Any, b: Any, offs: Any, bias: Any, out_dtype: Any) -> None:
    """Refuses what grouped_gemm cannot multiply."""
    for name, t in (("a", a), ("b", b)):
        if not isinstance(t, Tensor) or t.dtype not in FLOATS:
            refuse(op, name, "a floating tensor", got(t), TypeError)
        if t.dim() not in (2, 3):
            refuse(op, name, "2-D or 3-D", str(list(t.shape)))
    if a.dtype != b.dtype:
        refuse(op, "b", f"of a's dtype {str(a.dtype).removeprefix('torch.')}", got(b), TypeError)
    if b.device != a.device:
        refuse(op, "b", f"on {a.device} like a", str(b.device))
    if a.shape[-1] != b.shape[-2]:
        refuse(op, "b", f"[..., k={a.shape[-1]}, N] as a is {list(a.shape)}", str(list(b.shape)))
    both = a.dim() == 3 and b.dim() == 3
    E = a.shape[0] if a.dim() == 3 else b.shape[0] if b.dim() == 3 else None
    if both and a.shape[0] != b.shape[0]:
        refuse(op, "b", f"[E={a.shape[0]}, k, N] as a is {list(a.shape)}", str(list(b.shape)))
    if both != (offs is None):
        refuse(
            op,
            "offs",
            "None for two 3-D operands" if both else "int32 [E], the end of each group",
            got(offs),
            TypeError,
        )
    if offs is not None:
        if E is not None and isinstance(offs, Tensor) and offs.shape == (E + 1,):
            refuse(op, "offs", f"int32 [E={E}], the end of each group",
                   f"{list(offs.shape)}; of exclusive offsets pass expert_offsets[1:]")  # fmt: skip
        tensor(op, "offs", offs, INT32, [("E", E)], a.device)
        E = offs.shape[0]
        count(op, "E, the number of groups,", E, 1)
    if bias is not None:
        if a.dim() == 3 and b.dim() == 2:
            refuse(op, "bias", "None for a 3-D a and a 2-D b", got(bias))
        tensor(op, "bias", bias, FLOATS, [("E", E), ("N", b.shape[-1])], a.device)
    if out_dtype is not None and out_dtype not in FLOATS:
        refuse(op, "out_dtype", "float64, float32, bfloat16, float16 or None", str(out_dtype), TypeError)


# ---- checked mode: what only the values tell


def checked() -> bool:
    """MOE_KERNELS_DEBUG=1: inputs that the kernels define away (NaN logits, ids out of range) raise instead."""
    return not torch.compiler.is_compiling() and os.environ.get("MOE_KERNELS_DEBUG", "0") not in ("", "0")


def values(op: str, name: str, t: Tensor, low: int, high: int, meaning: str) -> None:
    """Refuses integers outside low .. high-1."""
    if t.device.type == "meta" or t.numel() == 0:
        return
    least, most = int(t.min()), int(t.max())
    if least < low or most >= high:
        refuse(op, name, f"in {low}..{high - 1} ({meaning})", f"values from {least} to {most}")


def ends(op: str, offs: Tensor, length: int) -> None:
    """Refuses group ends that decrease or leave the operand."""
    values(op, "offs", offs, 0, length + 1, "the size of the grouped dimension")
    if bool((offs.diff() < 0).any()):
        refuse(op, "offs", "non-decreasing", str(offs.tolist()))


def no_nan(op: str, name: str, t: Tensor) -> None:
    if t.device.type != "meta" and bool(t.isnan().any()):
        refuse(op, name, "free of NaN", f"{int(t.isnan().sum())} NaN in {got(t)}")
