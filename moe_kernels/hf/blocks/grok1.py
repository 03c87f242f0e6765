# SPDX-License-Identifier: Apache-2.0
"""Grok-1: a block in the layout of the released checkpoint, its converter, and the same block in remote code.

    gate.weight [E, H];  experts.{e}.linear.weight [I, H] (gate), .linear_v.weight [I, H] (up), .linear_1.weight [H, I]

Source: xai-org/grok-1 model.py. Softmax over all experts in float32, top 2, weights not renormalised, tanh GELU.
Ports of that model in remote code differ in the renormalisation: which one a block does is found by running it once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import check, ops
from ...schemas import acc_dtype
from .adapter import Adapter
from .mlp import expert_mlp
from .weights import adjoin, linears, stacks, values

NAMES = ("moe/linear/w", "moe/linear_v/w", "moe/linear_1/w", "router/w")


class Grok1Expert(nn.Module):
    """The weights of one expert: linear_1(gelu_tanh(linear(x)) * linear_v(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int, **factory: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, intermediate_size, bias=False, **factory)
        self.linear_v = nn.Linear(hidden_size, intermediate_size, bias=False, **factory)
        self.linear_1 = nn.Linear(intermediate_size, hidden_size, bias=False, **factory)
        self.act_fn = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., H], in plain torch: the block itself does not call it."""
        return self.linear_1(self.act_fn(self.linear(x)) * self.linear_v(x))  # type: ignore[no-any-return]


class Grok1MoE(nn.Module):
    """The MoE block of Grok-1 on our kernels, with the parameter names of the remote code.

    Args:
        hidden_size, intermediate_size, num_experts, top_k: H, I, E, K (6144, 32768, 8, 2 in the release).
        device, dtype: of the experts; the router is float32 unless dtype is float64.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int = 8,
        top_k: int = 2,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check.count("Grok1MoE", "top_k", top_k, 1, num_experts, "num_experts=")
        router_dtype = acc_dtype(dtype or torch.get_default_dtype())
        self.top_k = top_k
        self.gate = nn.Linear(hidden_size, num_experts, bias=False, device=device, dtype=router_dtype)
        nn.init.zeros_(self.gate.weight)
        self.experts = nn.ModuleList(
            Grok1Expert(hidden_size, intermediate_size, device=device, dtype=dtype) for _ in range(num_experts)
        )
        if not self.gate.weight.is_meta:
            for column in columns(self):
                adjoin(column)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., H] -> y [..., H] in x.dtype, and the router's logits [T, E]."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        acc = acc_dtype(x.dtype)
        with torch.autocast(x.device.type, enabled=False):  # the router stays in full precision
            logits = F.linear(x.to(acc), self.gate.weight.to(acc))
        y = _experts(self, x, logits, renormalize=False)
        return y.view(hidden_states.shape), logits

    @classmethod
    def from_checkpoint(
        cls, tensors: Mapping[str, Any], *, top_k: int = 2, device: Any = None, dtype: torch.dtype | None = None
    ) -> Grok1MoE:
        """The block of one layer of the released checkpoint.

        Args:
            tensors: "moe/linear/w" and "moe/linear_v/w" [E, H, I], "moe/linear_1/w" [E, I, H], "router/w" [H, E], each
                an array, or an 8-bit weight as (weight, scales) or an object with these two attributes. A prefix such
                as "transformer/decoder_layer_3/" is ignored, and so are other names.
            dtype: of the experts; None: that of the array, or of the scales.

        Errors: KeyError for a missing name, ValueError for shapes that do not fit.
        """
        linear, linear_v, linear_1, router = (_find(tensors, name) for name in NAMES)
        E, H, I = linear.shape if linear.dim() == 3 else (0, 0, 0)
        for name, t, want in zip(
            NAMES, (linear, linear_v, linear_1, router), ((E, H, I), (E, H, I), (E, I, H), (H, E))
        ):
            if tuple(t.shape) != want or E == 0:
                check.refuse("Grok1MoE.from_checkpoint", name, str(list(want)), str(list(t.shape)))
        block = cls(H, I, E, top_k, device=device, dtype=dtype or linear.dtype)
        with torch.no_grad():
            block.gate.weight.copy_(router.T)
            up, down = columns(block)
            for e in range(E):
                for parameter, value in zip((*up[2 * e : 2 * e + 2], down[e]), (linear[e], linear_v[e], linear_1[e])):
                    parameter.copy_(value.T)
        return block

    def to_checkpoint(self) -> dict[str, Tensor]:
        """The four arrays of the released checkpoint, in this block's dtype: the inverse of `from_checkpoint`."""
        return to_checkpoint(self)


def to_checkpoint(block: Any) -> dict[str, Tensor]:
    """The four arrays of the released checkpoint from any block of this layout, one of remote code too."""

    def together(name: str) -> Tensor:
        return torch.stack([getattr(expert, name).weight.detach().T for expert in block.experts])

    parts = (together("linear"), together("linear_v"), together("linear_1"), block.gate.weight.detach().T.clone())
    return dict(zip(NAMES, parts))


def _find(tensors: Mapping[str, Any], name: str) -> Tensor:
    for key, value in tensors.items():
        if f"/{key}".endswith(f"/{name}"):
            weight, scales = (value.weight, value.scales) if hasattr(value, "scales") else (value, None)
            if isinstance(value, tuple | list):
                weight, scales = value
            return torch.as_tensor(weight) if scales is None else _dequantise(name, weight, scales)
    raise KeyError(f"Grok1MoE.from_checkpoint: no {name} among {', '.join(map(str, tensors)) or 'no tensors'}")


def _dequantise(name: str, weight: Any, scales: Any) -> Tensor:
    """int8 weight times its scales, which hold one number a block along every dimension."""
    weight, scales = torch.as_tensor(weight), torch.as_tensor(scales)
    fits = weight.dim() == scales.dim() and all(n % max(m, 1) == 0 for n, m in zip(weight.shape, scales.shape))
    if not fits:
        check.refuse("Grok1MoE.from_checkpoint", f"the scales of {name}", f"blocks of {list(weight.shape)}",
                     str(list(scales.shape)))  # fmt: skip
    for dim, (n, m) in enumerate(zip(weight.shape, scales.shape)):
        scales = scales.repeat_interleave(n // m, dim) if 1 < m < n else scales
    return weight.to(scales.dtype) * scales  # type: ignore[no-any-return]


# ---- the block, and the one of remote code


def columns(module: Any) -> list[list[Tensor]]:
    """[gate, up] of every expert, and down."""
    return [values(linears(module.experts, "linear", "linear_v")), values(linears(module.experts, "linear_1"))]


def _experts(module: Any, x: Tensor, logits: Tensor, *, renormalize: bool) -> Tensor:
    routing = ops.route(logits.to(acc_dtype(logits.dtype)), module.top_k, renormalize=renormalize)
    (w13, w2), ids = stacks(columns(module), routing.topk_ids)
    return expert_mlp(x, w13, w2, routing.topk_weights, ids, module.experts[0].act_fn)


def forward(module: Any, hidden_states: Tensor, *, renormalize: bool, with_logits: bool) -> Any:
    """x [..., H] -> y [..., H], with the router's logits [T, E] where the block returns them too."""
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    logits = module.gate(x)
    y = _experts(module, x, logits, renormalize=renormalize).view(hidden_states.shape)
    return (y, logits) if with_logits else y


def options(module: Any) -> dict[str, Any]:
    """Runs the block's own forward on a few tokens and finds the routing that gives the same; TypeError if none."""
    weight = module.gate.weight
    x = torch.randn(1, 5, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    with torch.no_grad():
        x = x / module.gate(x).abs().max().clamp(min=1e-6)  # small logits: far from weights that sum to 1 anyway
        own = type(module).forward(module, x)
        y = own[0] if isinstance(own, tuple) else own
        for renormalize in (False, True):
            found = {"renormalize": renormalize, "with_logits": isinstance(own, tuple)}
            ours = forward(module, x, **found)
            error = torch.linalg.vector_norm((ours[0] if isinstance(ours, tuple) else ours).double() - y.double())
            if error <= 0.05 * torch.linalg.vector_norm(y.double()):
                return found
    raise TypeError("run on a few tokens, its own forward gives something else than Grok-1, renormalised or not")


def refuse(module: Any) -> str:
    return "" if isinstance(getattr(module, "top_k", None), int) else "it says no top_k"


ADAPTERS = (
    Adapter(
        kind="MoeBlock",
        home="",
        forward=forward,
        columns=columns,
        per_expert=True,
        act_fn=lambda module: module.experts[0].act_fn,
        inside=("experts",),
        refuse=refuse,
        options=options,
    ),
)
