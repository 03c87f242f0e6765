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
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import auto_pack, check, reference
from .capacity import Capacity
from .dropout import Dropout
from .losses import GlobalCounts, Load, Loss, LossInputs, ZLoss, groups_of, resolve, sums_wanted
from .ops import Routing
from .routers import INITS, Gate, RouterFn, RouterSettings, draw, make_gate
from .schemas import ACTIVATIONS, acc_dtype


class Experts(nn.Module):
    """E expert MLPs: their weights, and `fused_experts` on them, packed in inference on a CPU (`auto_pack`)."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int, *, activation: str = "silu",
                 gated: bool = True, bias: bool = False, interleaved: bool = False, swiglu_limit: float = 7.0,
                 swiglu_alpha: float = 1.702, recompute: bool = False, gradient_accumulation_fusion: bool = False,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:  # fmt: skip
        super().__init__()
        E, H, I, rows = num_experts, hidden_size, intermediate_size, (1 + gated) * intermediate_size
        self.options: dict[str, Any] = {
            "activation": activation, "gated": gated, "interleaved": interleaved, "recompute": recompute,
            "swiglu_limit": swiglu_limit, "swiglu_alpha": swiglu_alpha,
        }  # fmt: skip
        self.gradient_accumulation_fusion = gradient_accumulation_fusion
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

    def forward(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, weight_on_input: bool = False,
        hidden_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x [T, H], topk_weights [T, K], topk_ids [T, K], hidden_mask [T, K, I] -> y [T, H]."""
        main_grads: dict[str, Any] = {}
        if self.gradient_accumulation_fusion:
            main_grads = {f"{name}_main_grad": self._main_grad(name) for name in ("w13", "w2")}
        return auto_pack.fused_experts(
            self, x, self.w13, self.w2, topk_weights, topk_ids, w13_bias=self.w13_bias, w2_bias=self.w2_bias,
            apply_router_weight_on_input=weight_on_input, hidden_mask=hidden_mask, **self.options, **main_grads,
        )  # fmt: skip

    def _main_grad(self, name: str) -> Tensor:
        weight = getattr(self, name)
        main_grad = getattr(weight, "main_grad", None)
        if main_grad is None:
            acc = str(acc_dtype(weight.dtype)).removeprefix("torch.")
            check.refuse("Experts", f"{name}.main_grad", f"{acc} {list(weight.shape)} for gradient_accumulation_fusion",
                         "none")  # fmt: skip
        return main_grad  # type: ignore[no-any-return]


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
        router: settings of `moe_kernels.routers`, a `Router` or another; or a callable (x [T, H], logits [T, E], top_k)
            -> Routing or (topk_weights, topk_ids); or a `Gate` that was built already.
        num_identity_experts: Z experts more that return their input (LongCat's zero experts): ids E .. E+Z-1.
        activation, gated, interleaved, swiglu_limit, swiglu_alpha, recompute: as in `fused_experts`.
        gradient_accumulation_fusion: the backward adds the gradients of experts.w13 and experts.w2 to their attributes
            main_grad (float32, yours to make and to zero, as in Megatron) and leaves their .grad as it is.
        bias: experts have biases.
        num_shared_experts: shared experts, of width I each. shared_intermediate_size: their whole width instead.
        shared_gate: they are weighed by sigmoid(shared_expert_gate(x)) (Qwen2-MoE).
        experts: a module (x [T, H], topk_weights, topk_ids, weight_on_input) -> y [T, H], in place of `Experts`.
        shared_experts: a module x [T, H] -> y [T, H], in place of `SharedExperts`.
        capacity: a `Capacity`, a factor, or None: no token is dropped.
        dropout: a `Dropout` of hidden units, experts or outputs, in training.
        losses: of `moe_kernels.losses`, or their names, or any callable LossInputs -> 0-d tensor. They are computed in
            every forward; a layer that only serves does without them, losses=().
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
        router: RouterSettings | RouterFn | Gate | None = None, num_identity_experts: int = 0, activation: str = "silu",
        gated: bool = True, bias: bool = False,
        num_shared_experts: int = 0, shared_intermediate_size: int | None = None, shared_gate: bool = False,
        experts: nn.Module | None = None, shared_experts: nn.Module | None = None,
        capacity: Capacity | float | None = None, dropout: Dropout | None = None,
        losses: str | Loss | Iterable[str | Loss] = (),
        attach_losses: bool = False, interleaved: bool = False, swiglu_limit: float = 7.0, swiglu_alpha: float = 1.702,
        recompute: bool = False, gradient_accumulation_fusion: bool = False, init: str = "normal",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size),
                            ("num_experts", num_experts)):  # fmt: skip
            check.count("MoELayer", name, value, 1)
        check.count("MoELayer", "num_identity_experts", num_identity_experts, 0)
        choices = num_experts + num_identity_experts
        check.count("MoELayer", "top_k", top_k, 1, choices, "num_experts=" if choices == num_experts else "choices=")
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
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.init, self.attach_losses = init, attach_losses
        if isinstance(capacity, (int, float)) and not isinstance(capacity, bool):
            capacity = Capacity(capacity)
        if capacity is not None and not isinstance(capacity, Capacity):
            check.refuse("MoELayer", "capacity", "a Capacity, a factor or None", check.got(capacity), TypeError)
        self.capacity = capacity
        self.losses = resolve("MoELayer", losses)
        if experts is not None and gradient_accumulation_fusion:
            check.refuse("MoELayer", "gradient_accumulation_fusion", "False with experts of your own", "True")
        router = make_gate(hidden_size, choices, top_k, router, **place)
        if experts is None:
            experts = Experts(hidden_size, intermediate_size, num_experts, bias=bias, interleaved=interleaved,
                              recompute=recompute, gradient_accumulation_fusion=gradient_accumulation_fusion, **rule,
                              **place)  # fmt: skip
        self.router, self.experts = router, experts
        self.num_experts, self.dropout, self.global_counts = num_experts, dropout, GlobalCounts()
        self._check_combination()
        self.shared_experts: nn.Module | None = shared_experts
        self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False, **place) if shared_gate else None
        self.aux_loss: Tensor = torch.zeros(())
        self.last_routing: Routing | None = None
        self.parallel: Any = None
        """set by `ExpertParallel`, whose Engine then runs the experts"""
        self.reset_parameters()

    def _check_combination(self) -> None:
        """Refuses what has no meaning together."""
        gate, rule = self.router, type(getattr(self.router, "rule", self.router)).__name__
        if gate.own_balance and self.capacity is not None:
            check.refuse("MoELayer", "capacity", f"None: {rule} itself fixes how many tokens an expert takes",
                         repr(self.capacity))  # fmt: skip
        unfit = [loss for loss in self.losses if not gate.has_logits or (gate.own_balance and type(loss) is not ZLoss)]
        if unfit:
            why = "balances its experts itself" if gate.own_balance else "has no gate to train"
            check.refuse("MoELayer", "losses", f"without {type(unfit[0]).__name__}: {rule} {why}", repr(self.losses))
        if any(isinstance(loss, Load) for loss in self.losses) and rule != "NoisyTopK":
            want = "without Load: only the noise of NoisyTopK gives a load that has a gradient"
            check.refuse("MoELayer", "losses", want, repr(self.losses))
        if self.dropout is None:
            return
        if self.dropout.expert and (not gate.has_logits or rule in ("Base", "TwoLevel")):
            check.refuse("MoELayer", "dropout.expert", f"0: {rule} has no choice that could go to other experts",
                         str(self.dropout.expert))  # fmt: skip
        if self.dropout.inner and type(self.experts) is not Experts:
            check.refuse("MoELayer", "dropout.inner", "0 with experts of your own", str(self.dropout.inner))
        gate.expert_dropout = self.dropout.expert

    @classmethod
    def from_preset(cls, name: str, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
                    **overrides: Any) -> MoELayer:  # fmt: skip
        """The MoE layer of a published model, `presets.names()`, with any argument of the layer changed."""
        from . import presets

        return cls(**(presets.get(name).layer_kwargs() | overrides), device=device, dtype=dtype)

    @classmethod
    def from_config(cls, hf_config: Any, *, layer_idx: int | None = None, device: torch.device | str | None = None,
                    dtype: torch.dtype | None = None) -> MoELayer:  # fmt: skip
        """The MoE layer that a Hugging Face config describes; its weights come by `hf.state.state_dict_from`.

        layer_idx: the decoder layer, where layers differ; None: the first that is MoE.

        Errors: ValueError for a config without experts, an unknown model_type (lists the known), a dense layer.
        """
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

    def forward(
        self, x: Tensor, *, padding_mask: Tensor | None = None, token_ids: Tensor | None = None,
        position_ids: Tensor | None = None, protected: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x floating [..., H] -> y [..., H].

        padding_mask bool [...] (True for a token); token_ids and position_ids int [...], for routers by token and by
        position; protected bool [...], tokens that device-level dropping spares. Leading dimensions are free; where x
        has three or more, the second-last one is the sequence.
        """
        rows = self._rows(x)
        mask = _flat("padding_mask", padding_mask, check.BOOL, x)
        if mask is not None:  # masked rows are 0, so that nothing of them reaches anything
            rows = torch.where(mask[:, None], rows, 0.0)
        length = x.shape[-2] if x.dim() >= 3 else None
        known = {"sequence_length": length, "position_ids": _flat("position_ids", position_ids, check.IDS, x)}
        ids = _flat("token_ids", token_ids, check.IDS, x)
        more: dict[str, Any] = {name: known[name] for name in self.router.wants}
        wanted = sums_wanted(self.losses) if self.router.sums_scores else None
        if wanted is not None:
            more["sums"] = (groups_of(wanted[0], rows.shape[0], length), wanted[1])
        found = self.router(rows, padding_mask=mask, token_ids=ids, **more)
        logits, chosen = found[:2]
        counts = self.global_counts if self.training else None
        sums = (None, True) if wanted is None else (found[2], wanted[1])
        noise = (None, None) if wanted is not None else _noise(found)
        inputs = LossInputs(logits, chosen, self.router.settings, length, mask, *noise, counts, *sums)
        aux = self._aux_loss(inputs)
        routing = chosen
        if self.capacity is not None:
            scores = None
            if self.capacity.drop_policy == "device":
                scores = inputs.scores().detach().gather(1, chosen.topk_ids.clamp(min=0).long())
            spared = _flat("protected", protected, check.BOOL, x)
            routing = self.capacity.limit(chosen, sequence_length=length, training=self.training, scores=scores,
                                          protected=spared, counters=self.router.draws)  # fmt: skip
        if self.attach_losses:
            routing = routing._replace(topk_weights=_Attach.apply(routing.topk_weights, aux))  # type: ignore[no-untyped-call]
        y, shared = self._experts(rows, routing)
        y = y if shared is None else y + shared
        if not torch.compiler.is_exporting():  # an exported graph has no side effects
            self.aux_loss = aux
            self.last_routing = Routing._make(None if t is None else t.detach() for t in routing)
        return y.reshape(x.shape)

    def _rows(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.dtype not in check.FLOATS or x.dim() == 0 or x.shape[-1] != self.hidden_size:
            check.refuse("MoELayer", "x", f"floating [..., H={self.hidden_size}]", check.got(x),
                         ValueError if isinstance(x, Tensor) and x.dtype in check.FLOATS else TypeError)  # fmt: skip
        return x.reshape(-1, self.hidden_size)

    def _experts(self, rows: Tensor, routing: Routing) -> tuple[Tensor, Tensor | None]:
        """The routed experts and the identity ones, with dropout in training; and the shared ones."""
        weights, ids, options = routing.topk_weights, routing.topk_ids, {}
        if self.training and self.dropout is not None:
            if self.dropout.output:
                ids = self.dropout.output_ids(self.router.draws, ids)
            if self.dropout.inner:
                acc = acc_dtype(rows.dtype)
                options["hidden_mask"] = self.dropout.hidden_mask(self.router.draws, ids, self.intermediate_size, acc)
        E, on_input = self.num_experts, self.router.settings.weight_on_input
        whole = self.router.num_experts == E or type(self.experts) is not Experts  # own experts know what ids mean
        routed = ids if whole else torch.where(ids < E, ids, -1)
        if self.parallel is None:
            y, shared = self.experts(rows, weights, routed, on_input, **options), self._shared(rows)
        else:
            y, shared = self.parallel.run(self.experts, rows, weights, routed, on_input, partial(self._shared, rows))
        if not whole:
            y = (y + torch.where(ids >= E, weights, 0.0).sum(1, keepdim=True) * rows).to(y.dtype)
        return y, shared

    def _shared(self, rows: Tensor) -> Tensor | None:
        if self.shared_experts is None:
            return None
        shared = self.shared_experts(rows)
        if self.shared_expert_gate is not None:
            shared = torch.sigmoid(self.shared_expert_gate(rows)) * shared
        return shared  # type: ignore[no-any-return]

    def _aux_loss(self, inputs: LossInputs) -> Tensor:
        if not self.losses:
            return inputs.logits.new_zeros((), dtype=acc_dtype(inputs.logits.dtype))
        return torch.stack([loss(inputs) for loss in self.losses]).sum()

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: what the last forward left behind stays here."""
        return self.__dict__ | {"aux_loss": torch.zeros(()), "last_routing": None}

    def extra_repr(self) -> str:
        facts = {"capacity": self.capacity, "dropout": self.dropout, "losses": self.losses,
                 "attach_losses": self.attach_losses}  # fmt: skip
        return ", ".join(f"{name}={value}" for name, value in facts.items() if value)


def _flat(name: str, t: Tensor | None, kinds: frozenset[torch.dtype], x: Tensor) -> Tensor | None:
    """An argument with one value a token: [...] -> [T]."""
    if t is None:
        return None
    check.tensor("MoELayer", name, t, kinds, [("...", n) for n in x.shape[:-1]], x.device)
    return t.reshape(-1)


def _noise(found: tuple[Any, ...]) -> tuple[Tensor | None, Tensor | None]:
    """The standard deviation and the noisy logits that a noisy gate returns beside the rest."""
    noise = found[2] if len(found) > 2 else None
    return (None, None) if noise is None else (noise.std, noise.noisy_logits)


class _Attach(torch.autograd.Function):
    """topk_weights, with a gradient of 1 for aux: whatever pulls on the layer's output pulls on its losses too."""

    @staticmethod
    def forward(ctx: Any, topk_weights: Tensor, aux: Tensor) -> Tensor:
        ctx.dtype = aux.dtype
        return topk_weights.view_as(topk_weights)

    @staticmethod
    def backward(ctx: Any, grad_weights: Tensor) -> tuple[Tensor, Tensor]:
        return grad_weights, grad_weights.new_ones((), dtype=ctx.dtype)
