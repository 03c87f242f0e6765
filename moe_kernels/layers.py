# SPDX-License-Identifier: Apache-2.0
"""`MoELayer`: router, experts, shared experts, capacity and losses as one module.

    logits, routing = router(x);  routing = capacity(routing);  y = experts(x, routing) + shared_experts(x)

The routed experts are summed as `fused_experts` does and cast to x's dtype, then the shared experts are added. No
residual is added. Names in state_dict, which stay as they are:

    router.weight [E, H]          router.bias [E]               router.e_score_correction_bias [E] (buffer, float32)
    router.token_table [V, K]     router.router_fn.*            (a custom router that is a module)
    experts.w13 [E, 2I, H]        experts.w2 [E, H, I]          experts.w13_bias [E, 2I]     experts.w2_bias [E, H]
    shared_experts.w13 [2Is, H]   shared_experts.w2 [H, Is]     shared_expert_gate.weight [1, H]

Rows of w13 are [gate; up], or I rows without a gate.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import check, ops, reference
from .capacity import Capacity, limit_capacity
from .losses import Loss, LossInputs, resolve
from .ops import Routing
from .routers import INITS, Gate, Router, RouterFn, count_experts, draw
from .schemas import ACTIVATIONS, acc_dtype


class Experts(nn.Module):
    """E expert MLPs: their weights, and `fused_experts` on them."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int, *, activation: str = "silu",
                 gated: bool = True, bias: bool = False, interleaved: bool = False, swiglu_limit: float = 7.0,
                 swiglu_alpha: float = 1.702, recompute: bool = False, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None) -> None:  # fmt: skip
        super().__init__()
        E, H, I, rows = num_experts, hidden_size, intermediate_size, (1 + gated) * intermediate_size
        self.options: dict[str, Any] = {
            "activation": activation, "gated": gated, "interleaved": interleaved, "recompute": recompute,
            "swiglu_limit": swiglu_limit, "swiglu_alpha": swiglu_alpha,
        }  # fmt: skip
        self.w13 = nn.Parameter(torch.empty(E, rows, H, device=device, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(E, H, I, device=device, dtype=dtype))
        self.w13_bias = nn.Parameter(torch.empty(E, rows, device=device, dtype=dtype)) if bias else None
        self.w2_bias = nn.Parameter(torch.empty(E, H, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self, init: str = "normal") -> None:
        draw(self, init)

    def extra_repr(self) -> str:
        E, H, I = self.w2.shape
        return f"{E} x ({H} -> {I} -> {H}), " + ", ".join(f"{k}={v}" for k, v in self.options.items() if v is not False)

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, weight_on_input: bool = False) -> Tensor:
        """x [T, H], topk_weights [T, K], topk_ids [T, K] -> y [T, H]."""
        return ops.fused_experts(
            x, self.w13, self.w2, topk_weights, topk_ids, w13_bias=self.w13_bias, w2_bias=self.w2_bias,
            apply_router_weight_on_input=weight_on_input, **self.options,
        )  # fmt: skip


class SharedExperts(nn.Module):
    """One dense MLP that every token passes; of the width of several shared experts it is their sum."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, activation: str = "silu", gated: bool = True,
                 swiglu_limit: float = 7.0, swiglu_alpha: float = 1.702, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None) -> None:  # fmt: skip
        super().__init__()
        self.rule = (activation, gated, swiglu_limit, swiglu_alpha)
        rows = (1 + gated) * intermediate_size
        self.w13 = nn.Parameter(torch.empty(rows, hidden_size, device=device, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(hidden_size, intermediate_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self, init: str = "normal") -> None:
        draw(self, init)

    def extra_repr(self) -> str:
        H, I = self.w2.shape
        return f"{H} -> {I} -> {H}, activation={self.rule[0]}, gated={self.rule[1]}"

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(reference.activate(F.linear(x, self.w13), *self.rule), self.w2)


class MoELayer(nn.Module):
    """A Mixture-of-Experts layer, in place of a transformer's MLP.

    Args:
        hidden_size, intermediate_size, num_experts, top_k: H, I, E, K.
        router: a `Router`; or a callable (x [T, H], logits [T, E], top_k) -> Routing or (topk_weights, topk_ids); or a
            `Gate` that was built already.
        activation, gated, interleaved, swiglu_limit, swiglu_alpha, recompute: as in `fused_experts`.
        bias: experts have biases.
        num_shared_experts: shared experts, of width I each. shared_intermediate_size: their whole width instead.
        shared_gate: they are weighed by sigmoid(shared_expert_gate(x)) (Qwen2-MoE).
        experts: a module (x [T, H], topk_weights, topk_ids, weight_on_input) -> y [T, H], in place of `Experts`.
        shared_experts: a module x [T, H] -> y [T, H], in place of `SharedExperts`.
        capacity: a `Capacity`, a factor, or None: no token is dropped.
        losses: of `moe_kernels.losses`, or their names, or any callable LossInputs -> 0-d tensor.
        attach_losses: the backward of the output adds the gradient of aux_loss, with weight 1 whatever the output's own
            gradient is (so not under a loss scaler); its value does not change.
        init: the rule of `reset_parameters`.
    Attributes after a forward:
        aux_loss: 0-d tensor with gradient, the sum of the losses, 0 without any. Add it to your loss.
        last_routing: detached `Routing`; a dropped slot has id -1, weight 0 and dropped True, and is not counted.

    Errors: TypeError, ValueError.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_experts: int, top_k: int, *,
        router: Router | RouterFn | Gate | None = None, activation: str = "silu", gated: bool = True,
        bias: bool = False,
        num_shared_experts: int = 0, shared_intermediate_size: int | None = None, shared_gate: bool = False,
        experts: nn.Module | None = None, shared_experts: nn.Module | None = None,
        capacity: Capacity | float | None = None, losses: str | Loss | Iterable[str | Loss] = (),
        attach_losses: bool = False, interleaved: bool = False, swiglu_limit: float = 7.0, swiglu_alpha: float = 1.702,
        recompute: bool = False, init: str = "normal", device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size),
                            ("num_experts", num_experts)):  # fmt: skip
            check.count("MoELayer", name, value, 1)
        check.count("MoELayer", "top_k", top_k, 1, num_experts, "num_experts=")
        check.count("MoELayer", "num_shared_experts", num_shared_experts, 0)
        check.choice("MoELayer", "activation", activation, ACTIVATIONS)
        check.choice("MoELayer", "init", init, INITS)
        if not gated and (interleaved or activation == "swigluoai"):
            check.refuse("MoELayer", "gated", f"True for {'interleaved' if interleaved else activation}", "False")
        width = num_shared_experts * intermediate_size if shared_intermediate_size is None else shared_intermediate_size
        check.count("MoELayer", "shared_intermediate_size", width, 0)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        rule: dict[str, Any] = {"activation": activation, "gated": gated, "swiglu_limit": swiglu_limit,
                                "swiglu_alpha": swiglu_alpha}  # fmt: skip
        if shared_experts is None and width:
            shared_experts = SharedExperts(hidden_size, width, **rule, **place)
        if shared_gate and shared_experts is None:
            check.refuse("MoELayer", "shared_gate", "False without shared experts", "True")
        self.hidden_size, self.init, self.attach_losses = hidden_size, init, attach_losses
        if isinstance(capacity, (int, float)) and not isinstance(capacity, bool):
            capacity = Capacity(capacity)
        if capacity is not None and not isinstance(capacity, Capacity):
            check.refuse("MoELayer", "capacity", "a Capacity, a factor or None", check.got(capacity), TypeError)
        self.capacity = capacity
        self.losses = resolve("MoELayer", losses)
        if not isinstance(router, Gate):
            router = Gate(hidden_size, num_experts, top_k, router, **place)
        if experts is None:
            experts = Experts(hidden_size, intermediate_size, num_experts, bias=bias, interleaved=interleaved,
                              recompute=recompute, **rule, **place)  # fmt: skip
        self.router, self.experts = router, experts
        self.shared_experts: nn.Module | None = shared_experts
        self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False, **place) if shared_gate else None
        self.aux_loss: Tensor = torch.zeros(())
        self.last_routing: Routing | None = None
        self.reset_parameters()

    @classmethod
    def from_preset(cls, name: str, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
                    **overrides: Any) -> MoELayer:  # fmt: skip
        """The MoE layer of a published model, `presets.names()`, with any argument of the layer changed."""
        from . import presets

        return cls(**(presets.get(name).layer_kwargs() | overrides), device=device, dtype=dtype)

    @classmethod
    def from_config(cls, hf_config: Any, *, layer_idx: int | None = None, device: torch.device | str | None = None,
                    dtype: torch.dtype | None = None) -> MoELayer:  # fmt: skip
        """The MoE layer that a Hugging Face config describes. layer_idx: which one, where layers differ."""
        from .hf.config import layer_kwargs

        place: dict[str, Any] = {"device": device, "dtype": dtype}
        return cls(**layer_kwargs(hf_config, layer_idx, **place), **place)

    def reset_parameters(self) -> None:
        """Draws all parameters anew; biases become 0. Modules that were passed in do so themselves.

        init: "normal" N(0, 0.02); "fan_in" N(0, 0.1 / fan_in) cut at two standard deviations (Switch); "zero_router"
        as normal, with the router at 0 (Grok-1).
        """
        for module in self.children():
            if isinstance(module, nn.Linear):
                draw(module, self.init)
            elif isinstance(module, (Gate, Experts, SharedExperts)):
                module.reset_parameters(self.init)
            elif (reset := getattr(module, "reset_parameters", None)) is not None:
                reset()

    def forward(self, x: Tensor, *, padding_mask: Tensor | None = None, token_ids: Tensor | None = None) -> Tensor:
        """x floating [..., H], padding_mask bool [...] (True for a token), token_ids int [...] -> y [..., H].

        Leading dimensions are free; where x has three or more, the second-last one is the sequence.
        """
        rows, mask, ids = self._flat(x, padding_mask, token_ids)
        logits, chosen = self.router(rows, padding_mask=mask, token_ids=ids)
        length = x.shape[-2] if x.dim() >= 3 else None
        aux = self._aux_loss(LossInputs(logits, chosen, self.router.settings, length, mask))
        routing = chosen if self.capacity is None else self._limit(chosen, length)
        weights = routing.topk_weights
        if self.attach_losses:
            weights = _Attach.apply(weights, aux)  # type: ignore[no-untyped-call]
        y = self.experts(rows, weights, routing.topk_ids, self.router.settings.weight_on_input)
        if self.shared_experts is not None:
            shared = self.shared_experts(rows)
            if self.shared_expert_gate is not None:
                shared = torch.sigmoid(self.shared_expert_gate(rows)) * shared
            y = y + shared
        if not torch.compiler.is_exporting():  # an exported graph has no side effects
            self.aux_loss = aux
            self.last_routing = Routing._make(None if t is None else t.detach() for t in routing)
        return y.reshape(x.shape)  # type: ignore[no-any-return]

    def _flat(
        self, x: Tensor, padding_mask: Tensor | None, token_ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Rows [T, H], mask [T] and ids [T]; masked rows are 0, so that nothing of them reaches anything."""
        if not isinstance(x, Tensor) or x.dtype not in check.FLOATS or x.dim() == 0 or x.shape[-1] != self.hidden_size:
            check.refuse("MoELayer", "x", f"floating [..., H={self.hidden_size}]", check.got(x),
                         ValueError if isinstance(x, Tensor) and x.dtype in check.FLOATS else TypeError)  # fmt: skip
        rows = x.reshape(-1, self.hidden_size)
        sizes = [("...", n) for n in x.shape[:-1]]
        if token_ids is not None:
            check.tensor("MoELayer", "token_ids", token_ids, check.IDS, sizes, x.device)
            token_ids = token_ids.reshape(-1)
        if padding_mask is not None:
            check.tensor("MoELayer", "padding_mask", padding_mask, check.BOOL, sizes, x.device)
            padding_mask = padding_mask.reshape(-1)
            rows = torch.where(padding_mask[:, None], rows, 0.0)
        return rows, padding_mask, token_ids

    def _aux_loss(self, inputs: LossInputs) -> Tensor:
        if not self.losses:
            return inputs.logits.new_zeros((), dtype=acc_dtype(inputs.logits.dtype))
        return torch.stack([loss(inputs) for loss in self.losses]).sum()

    def _limit(self, routing: Routing, length: int | None) -> Routing:
        """The routing with the slots taken out that exceed the capacity of their expert."""
        assert self.capacity is not None
        (T, K), E, rule = routing.topk_ids.shape, self.router.num_experts, self.capacity
        if rule.group == "sequence" and length is None:
            check.refuse("MoELayer", "x", 'at least 3-D with capacity.group="sequence"', "2-D")
        tokens: Any = T if rule.group == "batch" else length if rule.group == "sequence" else rule.group
        slots = rule.slots(tokens, K, E, self.training)
        dropped = limit_capacity(routing.topk_ids, E, slots, group_size=torch.sym_max(tokens, 1))
        ids, weights = torch.where(dropped, -1, routing.topk_ids), torch.where(dropped, 0.0, routing.topk_weights)
        if rule.renormalize_after_drop:
            kept, whole = weights.sum(-1, keepdim=True), routing.topk_weights.sum(-1, keepdim=True)
            weights = weights * torch.where(kept > 0, whole / torch.where(kept > 0, kept, 1.0), 1.0)
        return Routing(weights, ids, count_experts(ids, E), routing.lse, dropped)

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: what the last forward left behind stays here."""
        return self.__dict__ | {"aux_loss": torch.zeros(()), "last_routing": None}

    def extra_repr(self) -> str:
        facts = {"capacity": self.capacity, "losses": self.losses, "attach_losses": self.attach_losses}
        return ", ".join(f"{name}={value}" for name, value in facts.items() if value)


class _Attach(torch.autograd.Function):
    """topk_weights, with a gradient of 1 for aux: whatever pulls on the layer's output pulls on its losses too."""

    @staticmethod
    def forward(ctx: Any, topk_weights: Tensor, aux: Tensor) -> Tensor:
        ctx.dtype = aux.dtype
        return topk_weights.view_as(topk_weights)

    @staticmethod
    def backward(ctx: Any, grad_weights: Tensor) -> tuple[Tensor, Tensor]:
        return grad_weights, grad_weights.new_ones((), dtype=ctx.dtype)
