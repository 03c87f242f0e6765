# SPDX-License-Identifier: Apache-2.0
"""A row on the wire: hidden state, scales, ids and weights as plain bytes, one row after the other.

    H elements of the dtype | ceil(H / 128) float32 scales of a float8 row | K int32 ids | K weights

Bytes, because not every collective knows every dtype, and because what belongs to a row then cannot be separated from
it. A float8 row (e4m3) is rounded once, in blocks of 128 elements scaled to the largest; its gradient is that of the
unrounded one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
LARGEST = 448.0
"""of float8_e4m3fn"""


@dataclass(frozen=True)
class Format:
    """What a row consists of. wire: the dtype that its elements travel in; ids, weights: how many of each."""

    hidden: int
    dtype: torch.dtype
    wire: torch.dtype
    ids: int = 0
    weights: int = 0
    weights_dtype: torch.dtype = torch.float32

    @property
    def sizes(self) -> list[int]:
        """Bytes of elements, scales, ids and weights."""
        scales = 4 * -(-self.hidden // BLOCK) if self.wire.itemsize == 1 else 0
        return [self.hidden * self.wire.itemsize, scales, 4 * self.ids, self.weights_dtype.itemsize * self.weights]

    def pack(self, rows: Tensor, weights: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        """rows [R, H], weights [R, K], ids int32 [R, K] -> uint8 [R, B]."""
        parts = list(quantize(rows)) if self.wire.itemsize == 1 else [rows]
        parts += [part for part in (ids, weights) if part is not None]
        return torch.cat([_bytes(part) for part in parts], 1)

    def unpack(self, data: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The reverse; None for what the format has none of."""
        elements, scales, ids, weights = data.split(self.sizes, 1)
        rows = _read(elements, self.wire)
        if self.wire.itemsize == 1:
            rows = dequantize(rows, _read(scales, torch.float32), self.dtype)
        found = _read(weights, self.weights_dtype) if self.weights else None
        return rows, found, _read(ids, torch.int32) if self.ids else None


def _bytes(part: Tensor) -> Tensor:
    """[R, n] as bytes. Strides are said anew: those of a size 0 or 1 may be anything in a contiguous tensor."""
    return part.contiguous().as_strided(part.shape, (part.shape[1], 1)).view(torch.uint8)


def _read(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Columns of bytes as dtype. A copy always: a single row counts as contiguous wherever it begins."""
    return part.clone(memory_format=torch.contiguous_format).view(dtype)


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[R, H] -> float8_e4m3fn [R, H] and the float32 scale of every block of 128 elements [R, ceil(H / 128)]."""
    blocks = _blocks(rows.float())
    scale = blocks.abs().amax(2) / LARGEST
    scale = torch.where(scale > 0, scale, 1.0)
    whole = (blocks / scale[:, :, None]).clamp(-LARGEST, LARGEST).flatten(1)[:, : rows.shape[1]]
    return whole.to(torch.float8_e4m3fn), scale


def dequantize(rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    blocks = _blocks(rows.float()) * scale[:, :, None]
    return blocks.flatten(1)[:, : rows.shape[1]].to(dtype)


def _blocks(rows: Tensor) -> Tensor:
    R, H = rows.shape
    return torch.nn.functional.pad(rows, (0, -H % BLOCK)).view(R, -(-H // BLOCK), BLOCK)
