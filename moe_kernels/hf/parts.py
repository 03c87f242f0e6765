# SPDX-License-Identifier: Apache-2.0
"""What single families do differently: gates, experts and activations for the places of a MoELayer.

Letters: T tokens, H hidden, I expert width, E experts, K experts a token, P rows in expert order. `place` is device and
dtype. Parameters that MoELayer has no name for keep the names they have in the family's own modules.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops, reference
from ..layers import Experts, SharedExperts
from ..losses import LossInputs, Switch
from ..ops import Routing
from ..routers import Gate, Router, as_routing, draw
from ..schemas import acc_dtype

Activation = Callable[[Tensor], Tensor]
"""rows [P, 2I], gate before up, -> [P, I]"""


# ---- norms


def rms_norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """x / rms(x) (* weight), in float32 at least, in x.dtype."""
    wide = x.to(acc_dtype(x.dtype))
    return F.rms_norm(wide, x.shape[-1:], None if weight is None else weight.to(wide.dtype), eps).to(x.dtype)


class RMSNorm(nn.Module):
    """rms_norm with weight offset + weight, which starts at 1. scale_first: x * weight is normed (Muse Spark)."""

    def __init__(self, size: int, eps: float, offset: float = 0.0, scale_first: bool = False, **place: Any) -> None:
        super().__init__()
        self.eps, self.offset, self.scale_first = eps, offset, scale_first
        self.weight = nn.Parameter(torch.empty(size, **place))
        self.reset_parameters()

    def reset_parameters(self, init: str = "normal") -> None:
        nn.init.constant_(self.weight, 1.0 - self.offset)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, offset={self.offset}, scale_first={self.scale_first}"

    def forward(self, x: Tensor) -> Tensor:
        weight = self.offset + self.weight
        return rms_norm((x * weight).to(x.dtype), self.eps) if self.scale_first else rms_norm(x, self.eps, weight)


class AddBias(nn.Module):
    """x + bias (JetMoe's experts as a whole)."""

    def __init__(self, size: int, **place: Any) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size, **place))

    def reset_parameters(self, init: str = "normal") -> None:
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def reset(module: nn.Module, init: str) -> None:
    """Resets the modules below, each by its own rule or, for linear ones, as MoELayer draws its matrices."""
    for child in module.children():
        if isinstance(child, nn.Linear):
            draw(child, init)
        elif isinstance(child, (Experts, RMSNorm, AddBias)):
            child.reset_parameters(init)
        else:
            reset(child, init)


# ---- activations without a kernel


class Gated(nn.Module):
    """act(gate) * up; clamped to limit: act(min(gate, limit)) * clamp(up, -limit, limit) (DeepSeek-V4).

    clamp_last: min(act(gate), limit) instead (Step 3.7).
    """

    def __init__(self, act: Activation, limit: float = float("inf"), clamp_last: bool = False) -> None:
        super().__init__()
        self.act, self.limit, self.clamp_last = act, limit, clamp_last

    def extra_repr(self) -> str:
        return f"limit={self.limit}, clamp_last={self.clamp_last}"

    def forward(self, rows: Tensor) -> Tensor:
        gate, up = rows.chunk(2, dim=-1)
        gate = self.act(gate).clamp(max=self.limit) if self.clamp_last else self.act(gate.clamp(max=self.limit))
        return gate * up.clamp(-self.limit, self.limit)


class SoftcappedSwiGLU(nn.Module):
    """cap(gate) * sigmoid(gate) * cap(up), cap(v) = c * tanh(v / c), in float32 (Inkling 2)."""

    def __init__(self, gate_cap: float, up_cap: float) -> None:
        super().__init__()
        self.gate_cap, self.up_cap = gate_cap, up_cap

    def extra_repr(self) -> str:
        return f"gate_cap={self.gate_cap}, up_cap={self.up_cap}"

    def forward(self, rows: Tensor) -> Tensor:
        gate, up = rows.to(acc_dtype(rows.dtype)).chunk(2, dim=-1)
        linear = self.gate_cap * torch.tanh(gate / self.gate_cap)
        return (linear * gate.sigmoid() * (self.up_cap * torch.tanh(up / self.up_cap))).to(rows.dtype)


# ---- experts


class OpenExperts(Experts):
    """Experts with any activation, and a norm of every expert's output: five ops in place of the fused one.

    norm: a module [P, H] -> [P, H], before the weighting.
    """

    def __init__(self, *sizes: int, activation: str | Activation, gated: bool = True, norm: nn.Module | None = None,
                 **kwargs: Any) -> None:  # fmt: skip
        super().__init__(*sizes, gated=gated, **kwargs)
        if isinstance(activation, str):
            activation = functools.partial(reference.activate, activation=activation, gated=gated)
        self.options = {"gated": gated}
        self.activation, self.norm = activation, norm

    def reset_parameters(self, init: str = "normal") -> None:
        super().reset_parameters(init)
        reset(self, init)

    def forward(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, weight_on_input: bool = False,
        hidden_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if weight_on_input or hidden_mask is not None:
            name = "weight_on_input" if weight_on_input else "hidden_mask"
            raise ValueError(f"OpenExperts: {name} needs an activation that has a kernel")
        rows = ops.permute(x, topk_ids, self.w13.shape[0])
        ends = rows.expert_offsets[1:]
        hidden = self.activation(ops.grouped_gemm(rows.x_rows, self.w13.transpose(1, 2), ends, bias=self.w13_bias))
        y_rows = ops.grouped_gemm(hidden, self.w2.transpose(1, 2), ends, bias=self.w2_bias)
        if self.norm is not None:
            y_rows = self.norm(y_rows)
        return ops.unpermute(y_rows, rows.slot_to_row, topk_weights)


class WrappedExperts(nn.Module):
    """after(inner(before(x))): latent projections or norms around the routed experts alone; the router sees x."""

    def __init__(self, before: nn.Module, inner: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before, self.inner, self.after = before, inner, after

    def reset_parameters(self, init: str = "normal") -> None:
        reset(self, init)

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, weight_on_input: bool = False) -> Tensor:
        y: Tensor = self.after(self.inner(self.before(x), topk_weights, topk_ids, weight_on_input))
        return y


class ZeroExperts(Experts):
    """Ids >= E are experts that return their input (LongCat)."""

    def forward(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, weight_on_input: bool = False,
        hidden_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        through = torch.where(topk_ids >= self.w13.shape[0], topk_weights, 0.0).sum(-1, keepdim=True)
        y = super().forward(x, topk_weights, topk_ids, weight_on_input, hidden_mask)
        return y + (through * x).to(x.dtype)


class OpenSharedExperts(SharedExperts):
    """Shared experts with any activation, biases and a factor on the output."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, activation: str | Activation, gated: bool = True,
                 bias: bool = False, scale: float = 1.0, **place: Any) -> None:  # fmt: skip
        kernel = activation if isinstance(activation, str) else "silu"
        super().__init__(hidden_size, intermediate_size, activation=kernel, gated=gated, **place)
        self.activation, self.scale = None if isinstance(activation, str) else activation, scale
        self.w13_bias = nn.Parameter(torch.zeros(self.w13.shape[0], **place)) if bias else None
        self.w2_bias = nn.Parameter(torch.zeros(hidden_size, **place)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        rows = F.linear(x, self.w13, self.w13_bias)
        hidden = reference.activate(rows, *self.rule) if self.activation is None else self.activation(rows)
        return F.linear(hidden, self.w2, self.w2_bias) * self.scale


# ---- gates


class LogitBiasGate(Gate):
    """The K highest of logit + e_score_correction_bias; weights sigmoid(logit), renormalised or not (Kolibri)."""

    def forward(
        self, x: Tensor, *, padding_mask: Tensor | None = None, token_ids: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        logits = self.logits(x)
        assert self.e_score_correction_bias is not None
        ids = reference.select((logits + self.e_score_correction_bias).detach(), self.top_k)
        weights = logits.to(acc_dtype(logits.dtype)).gather(1, ids).sigmoid()
        if self.settings.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, as_routing(weights, ids, padding_mask, self.num_experts)


class ScaledGate(Gate):
    """logits * logit_scale (Muse Spark)."""

    logit_scale = 1.0

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x) * self.logit_scale


class NormedGate(Gate):
    """The logits of rms_norm(x) * scale / sqrt(H); the weights times a learned per_expert_scale (Gemma 4)."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, router: Router, *, eps: float,
                 **place: Any) -> None:  # fmt: skip
        super().__init__(hidden_size, num_experts, top_k, router, **place)
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(hidden_size, **place))
        self.per_expert_scale = nn.Parameter(torch.ones(num_experts, **place))

    def reset_parameters(self, init: str = "normal") -> None:
        super().reset_parameters(init)
        if hasattr(self, "per_expert_scale"):  # not yet in Gate's constructor
            nn.init.ones_(self.scale)
            nn.init.ones_(self.per_expert_scale)

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(rms_norm(x, self.eps) * self.scale * x.shape[-1] ** -0.5)

    def forward(
        self, x: Tensor, *, padding_mask: Tensor | None = None, token_ids: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        logits, routing = super().forward(x, padding_mask=padding_mask, token_ids=token_ids)
        scale = self.per_expert_scale[routing.topk_ids.clamp(min=0)]
        return logits, routing._replace(topk_weights=routing.topk_weights * scale)


class SharedSinkGate(Gate):
    """Shared experts as the last S of the list: always chosen, weighed in one sum with the others (Inkling).

    The K - S best of sigmoid(logit) + e_score_correction_bias [E - S] among the first E - S, and the last S; weights
    sigmoid(logit) / their sum * scale * global_scale, which is learned.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, *, num_shared: int, scale: float,
                 **place: Any) -> None:  # fmt: skip
        router = Router(scoring_func="sigmoid", correction_bias=True)
        super().__init__(hidden_size, num_experts, top_k, router, **place)
        assert self.e_score_correction_bias is not None
        self.num_shared, self.scale = num_shared, scale
        self.e_score_correction_bias = self.e_score_correction_bias[num_shared:].clone()
        self.global_scale = nn.Parameter(torch.ones(1, **place))

    def reset_parameters(self, init: str = "normal") -> None:
        super().reset_parameters(init)
        if hasattr(self, "global_scale"):  # not yet in Gate's constructor
            nn.init.ones_(self.global_scale)

    def forward(
        self, x: Tensor, *, padding_mask: Tensor | None = None, token_ids: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        logits = self.logits(x)
        routed = self.num_experts - self.num_shared
        assert self.e_score_correction_bias is not None
        choice = logits[:, :routed].detach().sigmoid() + self.e_score_correction_bias
        chosen = reference.select(choice, self.top_k - self.num_shared)
        shared = torch.arange(routed, self.num_experts, device=x.device).expand(x.shape[0], -1)
        ids = torch.cat([chosen, shared], 1)
        scores = F.logsigmoid(logits.to(acc_dtype(logits.dtype)).gather(1, ids))
        weights = scores.softmax(-1) * self.scale * self.global_scale
        return logits, as_routing(weights, ids, padding_mask, self.num_experts)


class DeepGate(Gate):
    """A small network makes the logits of E experts and of "none", with a bias on the choice (Zaya).

    weight [E + 1, D] is the network's last layer. A gate built with after=True adds the states [T, D] that another gate
    left in its last forward, times router_states_scale: layer.router.follow(layer_before.router).

    Errors: RuntimeError in the forward of a gate that should follow another and does not.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, *, inner_size: int, eps: float,
                 after: bool = False, **place: Any) -> None:  # fmt: skip
        router = Router(renormalize=False, correction_bias=True, dtype="input")
        super().__init__(inner_size, num_experts + 1, top_k, router, **place)
        self.none = num_experts
        self.down_proj = nn.Linear(hidden_size, inner_size, **place)
        self.norm = RMSNorm(inner_size, eps, **place)
        self.fc1 = nn.Linear(inner_size, inner_size, **place)
        self.fc2 = nn.Linear(inner_size, inner_size, **place)
        self.router_states_scale = nn.Parameter(torch.ones(inner_size, **place)) if after else None
        self.states: Tensor | None = None
        self.leader: tuple[DeepGate, ...] = ()  # a tuple, so that it is no submodule

    def follow(self, gate: DeepGate) -> None:
        """Takes the states of that gate, whose layer has to run before."""
        self.leader = (gate,)

    @torch.no_grad()
    def reset_parameters(self, init: str = "normal") -> None:
        super().reset_parameters(init)
        reset(self, init)
        assert self.e_score_correction_bias is not None
        self.e_score_correction_bias[-1] = -1.0
        scale = getattr(self, "router_states_scale", None)
        if scale is not None:  # there is none yet in Gate's constructor
            nn.init.ones_(scale)

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: what the last forward left behind stays here."""
        return self.__dict__ | {"states": None}

    def logits(self, x: Tensor) -> Tensor:
        states = self.down_proj(x)
        if self.router_states_scale is not None:
            before = self.leader[0].states if self.leader else None
            if before is None or before.shape != states.shape:
                raise RuntimeError(
                    "DeepGate: this router adds the states of the layer before, on the same tokens: call "
                    "layer.router.follow(layer_before.router), and run that layer first"
                )
            states = states + before * self.router_states_scale
        self.states = states
        return super().logits(F.gelu(self.fc2(F.gelu(self.fc1(self.norm(states))))))

    def forward(
        self, x: Tensor, *, padding_mask: Tensor | None = None, token_ids: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        logits, routing = super().forward(x, padding_mask=padding_mask, token_ids=token_ids)
        ids = routing.topk_ids.masked_fill(routing.topk_ids == self.none, -1)
        return logits, as_routing(routing.topk_weights, ids, padding_mask, self.none)


# ---- losses


@dataclass(frozen=True)
class Balance:
    """The balance loss of transformers: coef * E * sum_i f_i P_i of a softmax, whatever the router's own scores are.

    f_i = slots / T of the K highest logits. transformers pools the tokens of all layers; this is one layer's.
    """

    coef: float

    def __call__(self, inputs: LossInputs) -> Tensor:
        router = Router(logit_softcap=inputs.router.logit_softcap)
        K = inputs.routing.topk_ids.shape[1]
        routing = ops.route(inputs.logits.detach(), K, padding_mask=inputs.padding_mask)
        return Switch(self.coef, divide_by_k=False)(replace(inputs, router=router, routing=routing, score_sums=None))
