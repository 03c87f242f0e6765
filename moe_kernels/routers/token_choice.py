# SPDX-License-Identifier: Apache-2.0
"""How a token chooses its experts: `Router`, the settings of `route`, and `Gate`, the module that holds its weight.

Letters: T tokens, H hidden, E experts, K experts a token. A router that is no `Router` is any callable
(x [T, H], logits [T, E], top_k) -> Routing or (topk_weights, topk_ids); `SparseMixer` is one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import check, draws, ops
from ..ops import Routing
from ..schemas import SCORING, acc_dtype

RouterFn = Callable[[Tensor, Tensor, int], "Routing | tuple[Tensor, Tensor]"]


def changed(settings: Any) -> str:
    """A dataclass as a call with what is not its default."""
    pairs = [(f.name, getattr(settings, f.name)) for f in dataclasses.fields(settings) if f.repr]
    defaults = {f.name: f.default for f in dataclasses.fields(settings)}
    told = [(n, v) for n, v in pairs if isinstance(v, Tensor) or v != defaults[n]]
    shown = [(n, check.got(v) if isinstance(v, Tensor) else repr(v)) for n, v in told]
    return f"{type(settings).__name__}({', '.join(f'{name}={value}' for name, value in shown)})"


class RouterSettings:
    """Settings of a router, without its sizes; they build the gate of a layer."""

    def __repr__(self) -> str:
        return changed(self)

    def gate(self, hidden_size: int, num_experts: int, top_k: int, **place: Any) -> Gate:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, repr=False)
class Router(RouterSettings):
    """Token-choice routing without its sizes. The first nine fields are those of `route`, by the same names.

    Errors: TypeError, ValueError for values that fit no layer; `Gate` refuses what does not fit its sizes.
    """

    scoring_func: str = "softmax"
    renormalize: bool = True
    renormalize_eps: float | None = None
    num_expert_group: int | None = None
    topk_group: int | None = None
    group_top: int | None = None
    routed_scaling_factor: float = 1.0
    scale_when_renormalized: bool = True
    logit_softcap: float = 0.0
    bias: bool = False
    """a learned bias on the logits (gpt-oss)"""
    correction_bias: bool = False
    """the buffer e_score_correction_bias, added to the scores for the choice only (DeepSeek-V3)"""
    weight_on_input: bool = False
    """the weight multiplies the expert's input instead of its output (Llama 4)"""
    input_jitter: float = 0.0
    """eps: in training the router's input is multiplied by uniform draws of [1 - eps, 1 + eps) (Switch)"""
    logit_noise_std: float = 0.0
    """in training the logits get noise of N(0, std)"""
    gumbel_noise: float = 0.0
    """in training the logits get this times Gumbel noise: with 1 and K = 1, experts are drawn by their probability"""
    second_threshold: float | None = None
    """K = 2, in training: the second expert is taken with probability weight / threshold, at most 1 (GShard: 0.5)"""
    dtype: str = "float32"
    """the logits' product in "float32" (float64 stays float64), or in the dtype of the "input" """
    token_table: Tensor | int | None = dataclasses.field(default=None, compare=False)
    """int [V, K]: the experts of every token id, weighed as learned (DeepSeek-V4); V alone leaves the table to a
    checkpoint. The forward then needs token_ids."""

    def __post_init__(self) -> None:
        check.choice("Router", "scoring_func", self.scoring_func, SCORING)
        check.choice("Router", "dtype", self.dtype, ("float32", "input"))
        if not 0 <= self.input_jitter < 1:
            check.refuse("Router", "input_jitter", "in 0..1, 1 excluded", str(self.input_jitter))
        for name in ("logit_noise_std", "gumbel_noise"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                check.refuse("Router", name, "0 (off) or positive", str(getattr(self, name)))
        if self.second_threshold is not None and not 0 < self.second_threshold <= 1:
            check.refuse("Router", "second_threshold", "in 0..1, 0 excluded", str(self.second_threshold))
        if not (math.isfinite(self.logit_softcap) and self.logit_softcap >= 0):
            check.refuse("Router", "logit_softcap", "0 (off) or positive", str(self.logit_softcap))
        if self.token_table is None:
            return
        if self.scoring_func == "softmax" and not self.renormalize:
            check.refuse("Router", "renormalize", "True for softmax with a token_table", "False")
        if self.num_expert_group not in (None, 1) or self.correction_bias:
            check.refuse("Router", "token_table", "alone: it makes the choice, not groups or a bias", repr(self))

    def gate(self, hidden_size: int, num_experts: int, top_k: int, **place: Any) -> Gate:
        return Gate(hidden_size, num_experts, top_k, self, **place)

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `route`."""
        return {name: getattr(self, name) for name in _ROUTE_FIELDS}


_ROUTE_FIELDS = (
    "scoring_func", "renormalize", "renormalize_eps", "num_expert_group", "topk_group", "group_top",
    "routed_scaling_factor", "scale_when_renormalized", "logit_softcap",
)  # fmt: skip


class Gate(nn.Module):
    """The router of a layer: logits = x @ weight^T (+ bias), then the choice.

    Args:
        hidden_size, num_experts, top_k: H, E, K.
        router: a `Router`, or a callable as the head of this module says; an nn.Module among them becomes the submodule
            router_fn, so that its parameters train.
    Parameters: weight [E, H]; bias [E] if router.bias. Buffers: e_score_correction_bias float32 [E] if
    router.correction_bias (it stays float32 when the module is cast down); token_table int64 [V, K] if
    router.token_table.

    Errors: TypeError, ValueError for sizes that the router's settings do not fit, worded by `route`.
    """

    wants: tuple[str, ...] = ()
    """what `forward` takes beside its usual arguments: of sequence_length, position_ids"""
    own_balance = False
    """the rule fixes how many tokens an expert gets: neither balance losses nor a capacity go with it"""
    has_logits = True
    """False: there are no logits to lose, mask or measure"""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, router: Router | RouterFn | None = None, *,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:  # fmt: skip
        super().__init__()
        if router is not None and not callable(router) and not isinstance(router, Router):
            want = "a Router or a callable (x, logits, top_k) -> Routing"
            check.refuse("Gate", "router", want, check.got(router), TypeError)
        custom = None if router is None or isinstance(router, Router) else router
        self.settings = router if isinstance(router, Router) else Router()
        self.num_experts, self.top_k = num_experts, top_k
        self.router_fn: RouterFn | None = custom
        self.draws, self.expert_dropout = draws.Draws(), 0.0
        if self.settings.second_threshold is not None and top_k != 2:
            check.refuse("Gate", "top_k", "2 with a second_threshold", str(top_k))
        ops.route(torch.empty(0, num_experts, device="meta"), top_k, **self.settings.options())  # do the sizes fit?
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if self.settings.bias else None
        self.e_score_correction_bias: Tensor | None
        self.token_table: Tensor | None
        correction = torch.zeros(num_experts, device=device, dtype=acc_dtype(self.weight.dtype))
        self.register_buffer("e_score_correction_bias", correction if self.settings.correction_bias else None)
        self.register_buffer("token_table", self._table(device))
        self.reset_parameters()

    def _table(self, device: torch.device | str | None) -> Tensor | None:
        table, E, K = self.settings.token_table, self.num_experts, self.top_k
        if table is None:
            return None
        if not isinstance(table, Tensor):  # every expert in turn, until a checkpoint is loaded
            check.count("Gate", "token_table", table, 1)
            return torch.arange(table * K, device=device).reshape(table, K) % E
        check.tensor("Gate", "token_table", table, check.IDS, [("V", None), ("K", K)])
        check.values("Gate", "token_table", table, 0, E, "an expert")
        return table.to(device, torch.int64, copy=True)

    def reset_parameters(self, init: str = "normal") -> None:
        """weight and bias by the rule init, e_score_correction_bias to 0."""
        draw(self, init)
        if init == "zero_router":
            nn.init.zeros_(self.weight)
        if self.e_score_correction_bias is not None:
            nn.init.zeros_(self.e_score_correction_bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Gate:
        kept = self.e_score_correction_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = self.e_score_correction_bias
        if kept is not None and moved is not None and moved.dtype.itemsize < 4:  # updates of 0.001 need float32
            self.e_score_correction_bias = (moved if kept.is_meta else kept.to(moved.device)).float()
        return self

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.num_experts}, top_k={self.top_k}, {self.router_fn or self.settings}"

    def logits(self, x: Tensor) -> Tensor:
        """x [T, H] -> [T, E] in the precision of the settings; in training with jitter, noise and expert dropout."""
        if self.training and self.settings.input_jitter > 0:
            u = draws.uniform(self.draws.key(draws.JITTER), *x.shape, device=x.device, dtype=acc_dtype(x.dtype))
            x = x * (1 + self.settings.input_jitter * (2 * u - 1))
        return self._mask(self._noisy(self._product(x)))

    def _product(self, x: Tensor) -> Tensor:
        if self.settings.dtype == "input":
            return F.linear(x, self.weight, self.bias)
        acc, kind = acc_dtype(x.dtype), x.device.type
        mixed = not x.is_meta and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if mixed else contextlib.nullcontext():
            return F.linear(x.to(acc), self.weight.to(acc), None if self.bias is None else self.bias.to(acc))

    def _noisy(self, logits: Tensor) -> Tensor:
        rule = self.settings
        if not self.training or not (rule.logit_noise_std or rule.gumbel_noise):
            return logits
        kind, scale = (
            (draws.normal, rule.logit_noise_std) if rule.logit_noise_std else (draws.gumbel, rule.gumbel_noise)
        )
        noise = kind(self.draws.key(draws.NOISE), *logits.shape, device=logits.device, dtype=acc_dtype(logits.dtype))
        return logits + (scale * noise).to(logits.dtype)

    def _mask(self, logits: Tensor) -> Tensor:
        """Expert dropout: -inf for the experts that a whole step does without."""
        if not self.training or not self.expert_dropout:
            return logits
        u = draws.uniform(self.draws.key(draws.EXPERT), self.num_experts, device=logits.device)
        groups, limit = self.settings.num_expert_group or 1, self.settings.topk_group or 1
        alive = revive(u >= self.expert_dropout, -(-self.top_k // limit), groups)
        return torch.where(alive, logits, -math.inf)

    @property
    def sums_scores(self) -> bool:
        """Whether `forward` takes `sums`: `route` chooses from the very logits that it returns."""
        return type(self).forward is Gate.forward and self.router_fn is None and self.token_table is None

    def _choose(
        self, x: Tensor, *, padding_mask: Tensor | None = None, token_ids: Tensor | None = None,
        sums: tuple[int, bool] | None = None,
    ) -> tuple[Tensor, Routing] | tuple[Tensor, Routing, Tensor]:  # fmt: skip
        """x [T, H], padding_mask bool [T] (True for a token), token_ids int [T] -> logits [T, E], Routing.

        sums: groups and normalize of `route_with_sums`, whose score_sums are then the third result.
        """
        logits = self.logits(x)
        if self.router_fn is not None:
            return logits, self._custom(x, logits, padding_mask)
        if self.token_table is not None:
            return logits, self._from_table(logits, padding_mask, token_ids)
        bias = self.e_score_correction_bias
        options = self.settings.options() | {"e_score_correction_bias": bias, "padding_mask": padding_mask}
        score_sums: Tensor | None = None
        if sums is None:
            found = ops.route(logits, self.top_k, **options)
        else:
            found, score_sums = ops.route_with_sums(logits, self.top_k, sums[0], normalize=sums[1], **options)
        if self.training and self.settings.second_threshold is not None:
            u = draws.uniform(self.draws.key(draws.SECOND), x.shape[0], device=x.device, dtype=found.topk_weights.dtype)
            found = sample_second(found, u, self.settings.second_threshold)
        return (logits, found) if score_sums is None else (logits, found, score_sums)

    forward: Callable[..., Any] = _choose  # not by its name: gates of other rules take other arguments

    def _from_table(self, logits: Tensor, padding_mask: Tensor | None, token_ids: Tensor | None) -> Routing:
        """The ids of the table, in its order; the weights are those of `route` over these K experts alone."""
        assert self.token_table is not None
        if token_ids is None:
            check.refuse("Gate", "token_ids", "given, as the router has a token_table", "None", TypeError)
        check.tensor("Gate", "token_ids", token_ids, check.IDS, [("T", logits.shape[0])], logits.device)
        if check.checked() or (logits.device.type == "cpu" and not torch.compiler.is_compiling()):
            check.values("Gate", "token_ids", token_ids, 0, self.token_table.shape[0], "a row of token_table")
        ids = self.token_table[token_ids]
        options = self.settings.options() | {"num_expert_group": None, "topk_group": None}
        routing = ops.route(logits.gather(1, ids), self.top_k, **options)
        weights = torch.zeros_like(routing.topk_weights).scatter(1, routing.topk_ids.long(), routing.topk_weights)
        return as_routing(weights, ids, padding_mask, self.num_experts)

    def _custom(self, x: Tensor, logits: Tensor, padding_mask: Tensor | None) -> Routing:
        assert self.router_fn is not None
        found = self.router_fn(x, logits, self.top_k)
        name = getattr(self.router_fn, "__qualname__", type(self.router_fn).__qualname__)
        if not isinstance(found, tuple) or len(found) not in (2, len(Routing._fields)):
            check.refuse(name, "its result", "a Routing or (topk_weights, topk_ids)", check.got(found), TypeError)
        sizes = [("T", x.shape[0]), ("K", self.top_k)]
        check.tensor(name, "topk_weights", found[0], check.FLOATS, sizes, x.device)
        check.tensor(name, "topk_ids", found[1], check.IDS, sizes, x.device)
        if check.checked():
            check.values(name, "topk_ids", found[1], -1, self.num_experts, "an expert, or -1 for none")
        return as_routing(found[0], found[1], padding_mask, self.num_experts)


def as_routing(weights: Tensor, ids: Tensor, padding_mask: Tensor | None, num_experts: int) -> Routing:
    """A Routing from weights and ids that `route` did not choose: masked, counted."""
    present = (ids >= 0) & (ids < num_experts)
    if padding_mask is not None:
        present = present & padding_mask[:, None]
    ids, weights = torch.where(present, ids, -1).int(), torch.where(present, weights, 0.0)
    return Routing(weights.to(acc_dtype(weights.dtype)), ids, count_experts(ids, num_experts), None, None)


def count_experts(topk_ids: Tensor, num_experts: int) -> Tensor:
    """topk_ids [T, K] with -1 for absent -> tokens_per_expert int32 [E]."""
    ids = torch.where(topk_ids < 0, num_experts, topk_ids).flatten().long()
    counts = torch.zeros(num_experts + 1, dtype=torch.int32, device=ids.device)
    return counts.scatter_add(0, ids, torch.ones_like(ids, dtype=torch.int32))[:num_experts]


def sample_second(routing: Routing, u: Tensor, threshold: float = 0.5) -> Routing:
    """GShard: the second expert stays where weight / threshold > u; u [T] in [0, 1). One that does not has id -1."""
    w, ids = routing.topk_weights, routing.topk_ids
    keep = torch.stack([torch.ones_like(u, dtype=torch.bool), w[:, 1].detach() > threshold * u], 1)
    ids, w = torch.where(keep, ids, -1), torch.where(keep, w, 0.0)
    return Routing(w, ids, count_experts(ids, routing.tokens_per_expert.shape[0]), routing.lse, routing.dropped)


def revive(alive: Tensor, least: int, groups: int = 1) -> Tensor:
    """alive bool [E], with the first dropped experts brought back until every group has `least` of them."""
    rows = alive.reshape(groups, -1)
    missing = (least - rows.sum(1, keepdim=True)).clamp(min=0)
    return (rows | ((~rows).cumsum(1) <= missing)).flatten()


INITS = ("normal", "fan_in", "zero_router")


@torch.no_grad()
def draw(module: nn.Module, init: str) -> None:
    """A module's own matrices from N(0, 0.02), or "fan_in" N(0, 0.1 / fan_in) cut at two deviations; biases 0."""
    for name, t in module.named_parameters(recurse=False):
        if name.endswith("bias"):
            nn.init.zeros_(t)
        elif init == "fan_in":
            std = math.sqrt(0.1 / t.shape[-1])
            nn.init.trunc_normal_(t, std=std, a=-2 * std, b=2 * std)
        else:
            nn.init.normal_(t, std=0.02)


_DEAD = -1e30  # a logit that is -inf or NaN, finite so that gradients are


class SparseMixer(nn.Module):
    """The router of Phi-3.5-MoE in evaluation: K = 2, each weight a softmax over the experts near its own maximum.

    An expert whose logit l is further than 2 * eps below the maximum m, (m - l) / max(|l|, m) > 2 * eps, is left out.
    The second choice does the same without the first. The two weights do not sum to 1.

    Errors: ValueError for another K; RuntimeError in training, which samples instead and is not built.
    """

    def __init__(self, eps: float = 0.01) -> None:
        super().__init__()
        self.eps = eps

    def extra_repr(self) -> str:
        return f"eps={self.eps}"

    def forward(self, x: Tensor, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        if top_k != 2:
            check.refuse("SparseMixer", "top_k", "2", str(top_k))
        if self.training:
            raise RuntimeError("SparseMixer: only evaluation is built: call .eval() on the layer, or choose a Router")
        l = logits.to(acc_dtype(logits.dtype))
        l = torch.where(l.isnan(), _DEAD, l).clamp(_DEAD, -_DEAD)
        weights, ids, rest = [], [], l
        for _ in range(2):
            best = rest.argmax(-1, keepdim=True)
            top = rest.gather(1, best).detach()
            far = (top - l) / torch.maximum(l.abs(), top) > 2 * self.eps
            near = torch.where(far.detach(), -math.inf, rest)
            weights.append(torch.where(top > _DEAD, near.softmax(-1).gather(1, best), 0.0))
            ids.append(best)
            rest = rest.scatter(1, best, -math.inf)
        return torch.cat(weights, 1), torch.cat(ids, 1)
