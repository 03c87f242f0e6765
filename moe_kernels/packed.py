# SPDX-License-Identifier: Apache-2.0
"""Expert weights laid out once, for inference: `pack_experts`, and what `fused_experts` does with the result."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import check
from .schemas import ACTIVATION_CODE, DTYPE_CODE


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """Weights of all experts in panels of 32 units, with biases and activation. For inference: no gradient."""

    packed13: Tensor
    """[E, ceil(I/32), 2 if gated else 1, H, 32]"""
    packed2: Tensor
    """[E, ceil(H/32), I, 32]"""
    w13_bias: Tensor | None
    """[E, 2I] as [gate; up], or [E, I]"""
    w2_bias: Tensor | None
    """[E, H]"""
    hidden_size: int
    intermediate_size: int
    activation: str
    gated: bool
    swiglu_limit: float
    swiglu_alpha: float

    @property
    def nbytes(self) -> int:
        """Bytes of the panels and biases."""
        return sum(t.nbytes for t in (self.packed13, self.packed2, self.w13_bias, self.w2_bias) if t is not None)

    @property
    def shape(self) -> torch.Size:
        """[E, 2I, H] or [E, I, H]: the shape of the w13 that this stands for."""
        units = (2 if self.gated else 1) * self.intermediate_size
        return torch.Size((self.packed13.shape[0], units, self.hidden_size))

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored weights."""
        return self.packed13.dtype

    @property
    def device(self) -> torch.device:
        return self.packed13.device

    def __repr__(self) -> str:
        dtype, kind = str(self.dtype).removeprefix("torch."), "gated" if self.gated else "ungated"
        return f"PackedExperts({list(self.shape)}, {dtype}, {kind} {self.activation}, {self.nbytes} bytes)"


@torch.no_grad()
def pack_experts(
    w13: Tensor,
    w2: Tensor,
    *,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool | None = None,
    interleaved: bool = False,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
    swiglu_limit: float = 7.0,
    swiglu_alpha: float = 1.702,
) -> PackedExperts:
    """Lay expert weights out once, for inference with `fused_experts(x, packed, None, topk_weights, topk_ids)`.

    Args:
        w13, w2, w13_bias, w2_bias, activation, gated, interleaved, transposed, swiglu_*: as in `fused_experts`.
        dtype: of the stored weights and biases; None means w13's. It need not be that of x.
    Returns:
        PackedExperts: a copy; later changes of w13 and w2 do not reach it. For CPUs alone: on a GPU pass w13 and w2.

    Errors: TypeError, ValueError.
    Determinism: bitwise.
    """
    w13, w2 = check.plain_weight("pack_experts", "w13", w13), check.plain_weight("pack_experts", "w2", w2)
    if w13.device.type == "cuda":
        wanted = "weights on a CPU: panels are a format of its caches, CUDA kernels read w13 and w2 as they lie"
        check.refuse("pack_experts", "w13", wanted, f"one on {w13.device}")
    is_gated, I = check.weights("pack_experts", w13, w2, activation, gated, interleaved, transposed)
    E, H, units = w13.shape[0], w2.shape[2 if transposed else 1], w13.shape[2 if transposed else 1]
    dtype = w13.dtype if dtype is None else dtype
    if dtype not in check.FLOATS:
        check.refuse("pack_experts", "dtype", "float64, float32, bfloat16, float16 or None", str(dtype), TypeError)
    if w13_bias is not None:
        check.tensor("pack_experts", "w13_bias", w13_bias, check.FLOATS, [("E", E), ("rows of w13", units)], w13.device)
        w13_bias = torch.cat([w13_bias[:, ::2], w13_bias[:, 1::2]], 1) if interleaved else w13_bias.clone()
        w13_bias = w13_bias.to(dtype)
    if w2_bias is not None:
        check.tensor("pack_experts", "w2_bias", w2_bias, check.FLOATS, [("E", E), ("H", H)], w13.device)
        w2_bias = w2_bias.clone().to(dtype)
    packed13, packed2 = torch.ops.moe_kernels.pack_experts.default(
        w13.detach(), w2.detach(), is_gated, interleaved, transposed, DTYPE_CODE[dtype]
    )
    return PackedExperts(packed13, packed2, w13_bias, w2_bias, H, I, activation, is_gated, swiglu_limit, swiglu_alpha)


def fused_experts_packed(
    x: Tensor, packed: PackedExperts, w2: Tensor | None, topk_weights: Tensor, topk_ids: Tensor, *, activation: str,
    gated: bool | None, w13_bias: Tensor | None, w2_bias: Tensor | None, interleaved: bool, transposed: bool,
    expert_map: Tensor | None, hidden_mask: Tensor | None, weight_on_input: bool, swiglu_limit: float,
    swiglu_alpha: float,
) -> Tensor:  # fmt: skip
    """fused_experts on packed weights: what was packed decides, an argument that says otherwise is refused."""
    op, I, H, E = "fused_experts", packed.intermediate_size, packed.hidden_size, packed.packed13.shape[0]
    if w2 is not None or w13_bias is not None or w2_bias is not None:
        for name, value in (("w2", w2), ("w13_bias", w13_bias), ("w2_bias", w2_bias)):
            if value is not None:
                check.refuse(op, name, "None with PackedExperts, which hold it", check.got(value), TypeError)
    for name, said, default, own in (
        ("activation", activation, "silu", packed.activation), ("gated", gated, None, packed.gated),
        ("swiglu_limit", swiglu_limit, 7.0, packed.swiglu_limit), ("interleaved", interleaved, False, False),
        ("swiglu_alpha", swiglu_alpha, 1.702, packed.swiglu_alpha), ("transposed", transposed, False, False),
    ):  # fmt: skip
        if said != default and said != own:
            check.refuse(op, name, f"{own!r}, as it was packed", repr(said))
    check.tensor(op, "x", x, check.FLOATS, (("T", None), ("H", H)), packed.packed13.device)
    check.slots(op, x.shape[0], topk_weights, topk_ids, x.device)
    if expert_map is not None or hidden_mask is not None:
        sizes = (x.shape[0], topk_ids.shape[1], I, H, E, packed.shape[1])
        check.optional(op, x, sizes, None, None, expert_map, hidden_mask)
    if check.checked():
        known = E if expert_map is None else expert_map.shape[0]
        check.values(op, "topk_ids", topk_ids, -1, known, "an expert, or -1 for none")
    if torch.is_grad_enabled() and (x.requires_grad or topk_weights.requires_grad):
        raise RuntimeError(
            f"{op}: PackedExperts are for inference and have no backward, but x or topk_weights requires a gradient: "
            "run under torch.no_grad(), or pass w13 and w2"
        )
    if x.dtype != torch.float64 and not x.is_meta and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return torch.ops.moe_kernels.fused_experts_packed.default(  # type: ignore[no-any-return]
        x, packed.packed13, packed.packed2, I, topk_weights, topk_ids, packed.w13_bias, packed.w2_bias, expert_map,
        hidden_mask, ACTIVATION_CODE[packed.activation], packed.gated, weight_on_input, packed.swiglu_limit,
        packed.swiglu_alpha,
    )  # fmt: skip
