# SPDX-License-Identifier: Apache-2.0
"""What others compute the same experts layer with. A peer that is not installed, or that cannot do a case, says why."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from shapes import Shape

import moe_kernels as mk

Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # x, topk_ids, topk_weights -> y
ACTIVATIONS = {"silu": F.silu, "relu": F.relu}


class UnavailableError(Exception):
    """Why a peer sits out a case."""


def ours(shape: Shape, w13: torch.Tensor, w2: torch.Tensor, tokens: int) -> Layer:
    return lambda x, ids, weights: mk.fused_experts(x, w13, w2, weights, ids, activation=shape.act, gated=shape.gated)


def ours_packed(shape: Shape, w13: torch.Tensor, w2: torch.Tensor, tokens: int) -> Layer:
    if w13.requires_grad:
        raise UnavailableError("packed weights have no backward")
    packed = mk.pack_experts(w13, w2, activation=shape.act, gated=shape.gated)
    return lambda x, ids, weights: mk.fused_experts(
        x, packed, None, weights, ids, activation=shape.act, gated=shape.gated
    )


def torch_loop(shape: Shape, w13: torch.Tensor, w2: torch.Tensor, tokens: int) -> Layer:
    """Expert by expert: the loop that everyone writes first."""
    act = ACTIVATIONS[shape.act]

    def layer(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        for e in ids.unique().tolist():
            token, k = (ids == e).nonzero(as_tuple=True)
            h = x[token] @ w13[e].T
            a = act(h[:, : shape.I]) * h[:, shape.I :] if shape.gated else act(h)
            y = y.index_add(0, token, ((a @ w2[e].T) * weights[token, k, None]).to(x.dtype))
        return y

    return layer


def torch_grouped_mm(shape: Shape, w13: torch.Tensor, w2: torch.Tensor, tokens: int) -> Layer:
    """Sort, torch.nn.functional.grouped_mm, activation, grouped_mm, weighted sum."""
    act = ACTIVATIONS[shape.act]

    def layer(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        flat = ids.reshape(-1)
        order = flat.argsort(stable=True)
        ends = torch.bincount(flat, minlength=shape.E).cumsum(0).to(torch.int32)
        h = F.grouped_mm(x[order // shape.K], w13.transpose(1, 2), offs=ends)
        a = act(h[:, : shape.I]) * h[:, shape.I :] if shape.gated else act(h)
        rows = F.grouped_mm(a, w2.transpose(1, 2), offs=ends) * weights.reshape(-1)[order, None].to(x.dtype)
        back = torch.empty_like(rows).index_copy(0, order, rows)
        return back.view(len(x), shape.K, -1).sum(1)

    return layer


def hugging_face(name: str) -> Callable[..., Layer]:
    """transformers' own experts implementation of that name, in a Qwen3-MoE experts module with these weights."""

    def make(shape: Shape, w13: torch.Tensor, w2: torch.Tensor, tokens: int) -> Layer:
        if not shape.gated:
            raise UnavailableError("the experts modules of transformers are gated")
        if name == "batched_mm" and tokens > 32:
            raise UnavailableError("copies the weights of every slot: no memory at this size")
        try:
            home = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
            config = importlib.import_module("transformers").Qwen3MoeConfig(
                hidden_size=shape.H, moe_intermediate_size=shape.I, num_experts=shape.E, num_experts_per_tok=shape.K
            )
        except (ImportError, AttributeError) as error:
            raise UnavailableError(f"transformers: {error}") from None
        with torch.device("meta"):
            module: Any = home.Qwen3MoeExperts(config)
        module.gate_up_proj = torch.nn.Parameter(w13, requires_grad=False)
        module.down_proj = torch.nn.Parameter(w2, requires_grad=False)
        if w13.requires_grad:  # the same leaves as everyone's, so that gradients land in one place
            del module._parameters["gate_up_proj"], module._parameters["down_proj"]
            module.gate_up_proj, module.down_proj = w13, w2
        module.config._experts_implementation = name
        return lambda x, ids, weights: module(x, ids, weights)

    return make


def zentorch(shape: Shape, w13: torch.Tensor, w2: torch.Tensor, tokens: int) -> Layer:
    """Its fused layer, on a copy: it reorders the weights that it is given in place."""
    try:
        importlib.import_module("zentorch")
    except (ImportError, OSError) as error:
        raise UnavailableError(f"zentorch: {error}") from None
    if w13.requires_grad:
        raise UnavailableError("zentorch: its fused layer has no backward")
    if "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        raise UnavailableError("zentorch: needs avx512_bf16; without it, its numbers are wrong and it corrupts memory")
    w13, w2 = w13.clone(), w2.clone()

    def layer(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        torch.ops.zentorch.zentorch_fused_moe(y, x, w13, w2, None, None, weights, ids.int(), False, shape.act)
        return y

    return layer


OURS = "moe_kernels"
PEERS: dict[str, Callable[..., Layer]] = {
    OURS: ours,
    "moe_kernels packed": ours_packed,
    "hf grouped_mm": hugging_face("grouped_mm"),
    "hf batched_mm": hugging_face("batched_mm"),
    "hf eager": hugging_face("eager"),
    "torch grouped_mm": torch_grouped_mm,
    "torch loop": torch_loop,
    "zentorch": zentorch,
}
