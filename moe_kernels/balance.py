# SPDX-License-Identifier: Apache-2.0
"""Balance without a loss, and help against collapse: what happens once an optimizer step.

    balance = Balance(model, reinit=Reinit(period=500), optimizer=optimizer)
    for batch in data:
        loss(model(batch)).backward()          # any number of micro-batches
        optimizer.step(); optimizer.zero_grad()
        balance.step()

`step` moves the selection biases of the layers that have one (DeepSeek-V3), revives dead experts where asked, and
starts a new step for random draws and for losses over the global batch. Counts are those of the experts that were
chosen, before any drop, over all micro-batches and ranks; recomputed forwards and evaluation are not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import check, draws
from .layers import MoELayer
from .routers import changed, draw
from .watch import Seen, Watch

RULES = ("sign", "proportional")
OnReset = Callable[[nn.Parameter, int], None]


def updated_bias(bias: Tensor, counts: Tensor, rate: float = 1e-3, rule: str = "sign") -> Tensor:
    """bias [E] + rate * sign(mean - counts), or rate * (mean - counts) for "proportional".

    counts int or floating [E]. sign(0) = 0. Wang et al. 2024 (arXiv 2408.15664), algorithm 1.
    """
    check.choice("updated_bias", "rule", rule, RULES)
    low = counts.double().mean() - counts.double()
    return bias + (rate * (low.sign() if rule == "sign" else low)).to(bias.dtype)


def max_violation(counts: Tensor) -> Tensor:
    """counts [..., E] -> float32 [...]: (max - mean) / mean; 0 without any."""
    counts = counts.double()
    mean = counts.mean(-1)
    return ((counts.amax(-1) - mean) / torch.where(mean > 0, mean, 1.0)).float()


@dataclass(frozen=True, kw_only=True, repr=False)
class Reinit:
    """Dead experts start anew: those whose running share of the load is below threshold / E.

    Errors: ValueError.
    """

    period: int = 1000
    """steps between two looks"""
    threshold: float = 0.1
    decay: float = 0.99
    """of the running share, r = decay * r + (1 - decay) * slots / (T K), which starts at 1/E"""
    mode: str = "copy"
    """the weights: a "copy" of a donor's with noise, or "redraw" by the layer's own initialisation"""
    sigma: float = 0.01
    """the noise has this times the standard deviation of the copied weights"""
    seed: int = 0

    def __post_init__(self) -> None:
        check.count("Reinit", "period", self.period, 1)
        check.choice("Reinit", "mode", self.mode, ("copy", "redraw"))
        for name, low, high in (("threshold", 0, 1), ("decay", 0, 1), ("sigma", 0, float("inf"))):
            if not low <= getattr(self, name) < high:
                check.refuse("Reinit", name, f"in {low}..{high}, {high} excluded", str(getattr(self, name)))

    def __repr__(self) -> str:
        return changed(self)


class Balance:
    """What a trainer does for the MoE layers once an optimizer step; see the head of this module.

    Args:
        model: its `MoELayer`s, and Hugging Face blocks that hold experts and an e_score_correction_bias.
        rate: gamma of the bias update, 0 leaves the biases alone (DeepSeek-V3: 0.001, and 0 at the end of training).
        rule: "sign" or "proportional" (`updated_bias`).
        reinit: a `Reinit`, for `MoELayer`s.
        optimizer: whose state of a re-initialised expert is zeroed; on_reset(parameter, expert) is called as well.
        group: the process group of the data-parallel ranks; None: all ranks.
        seed: of counter-based draws; None leaves them to torch's generator.

    Errors: TypeError, ValueError.
    """

    def __init__(
        self, model: nn.Module, *, rate: float = 1e-3, rule: str = "sign", reinit: Reinit | None = None,
        optimizer: torch.optim.Optimizer | None = None, on_reset: OnReset | None = None, group: Any = None,
        seed: int | None = None,
    ) -> None:  # fmt: skip
        check.choice("Balance", "rule", rule, RULES)
        if not rate >= 0:
            check.refuse("Balance", "rate", "0 or positive", str(rate))
        self.model, self.rate, self.rule, self.reinit, self.group, self.seed = model, rate, rule, reinit, group, seed
        self.optimizer, self.on_reset = optimizer, on_reset
        self.steps = 0
        self.pending: dict[str, Tensor] = {}
        """int64 [E] by layer: slots chosen since the last step"""
        self.share: dict[str, Tensor] = {}
        """float64 [E] by layer: the running share of the load"""
        self.layers = {name: m for name, m in model.named_modules() if isinstance(m, MoELayer)}
        self._watch = Watch(model, self._count)
        if not self._watch.names:
            check.refuse("Balance", "model", "a model with MoE layers", type(model).__name__)
        for layer in self.layers.values():
            layer.global_counts.group = group
        self._new_step()

    def close(self) -> None:
        """Removes the hooks."""
        self._watch.close()

    def _count(self, seen: Seen) -> None:
        if not seen.training or seen.recomputed:
            return
        counts = seen.chosen_counts()
        before = self.pending.get(seen.name)
        self.pending[seen.name] = counts if before is None else before + counts

    @torch.no_grad()
    def step(self) -> dict[str, list[int]]:
        """After `optimizer.step()`. Returns the experts that were re-initialised, by layer."""
        revived = {}
        for name in self._watch.names:
            counts = self._global(name)
            bias = self._watch.bias(name)
            if bias is not None and self.rate:
                bias.copy_(updated_bias(bias, counts.to(bias.device), self.rate, self.rule))
            if self.reinit is not None and name in self.layers:
                dead = self._revive(name, counts)
                if dead:
                    revived[name] = dead
        self.pending.clear()
        self.steps += 1
        self._new_step()
        return revived

    def _global(self, name: str) -> Tensor:
        """int64 [E], all ranks; every rank takes part, whatever it counted."""
        counts = self.pending.get(name)
        if counts is None:
            counts = self._watch.zeros(name)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts := counts.clone(), group=self.group)
        return counts

    def _new_step(self) -> None:
        for layer in self.layers.values():
            layer.global_counts.reset()
        if self.seed is not None:
            draws.set_step(self.model, self.steps, seed=self.seed)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; the biases themselves are in the model's state_dict."""
        return {"steps": self.steps, "pending": dict(self.pending), "share": dict(self.share)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.pending, self.share = state["steps"], dict(state["pending"]), dict(state["share"])
        self._new_step()

    # ---- dead experts

    def _revive(self, name: str, counts: Tensor) -> list[int]:
        assert self.reinit is not None
        rule, layer = self.reinit, self.layers[name]
        counts = counts[: layer.num_experts].double().cpu()  # identity experts have nothing to re-initialise
        E = len(counts)
        share = self.share.get(name, torch.full((E,), 1 / E, dtype=torch.float64))
        if counts.sum() > 0:
            share = rule.decay * share + (1 - rule.decay) * counts / counts.sum()
        self.share[name] = share
        if (self.steps + 1) % rule.period:
            return []
        dead = (share < rule.threshold / E).nonzero()[:, 0].tolist()
        donors = [e for e in share.argsort(descending=True, stable=True).tolist() if e not in set(dead)]
        for i, e in enumerate(dead):
            donor = donors[i % len(donors)]
            key = int(draws.splitmix64(rule.seed ^ (self.steps << 32 | list(self.layers).index(name) << 16 | e)))
            restart(layer, e, donor, rule, torch.Generator().manual_seed(key), self._forget)
            share[e] = 1 / E
        return dead

    def _forget(self, parameter: nn.Parameter, expert: int) -> None:
        """Zeroes the optimizer's state of one expert's rows."""
        state = {} if self.optimizer is None else self.optimizer.state.get(parameter, {})
        for value in state.values():
            if isinstance(value, Tensor) and value.dim() and value.shape[0] == parameter.shape[0]:
                value[expert] = 0
        if self.on_reset is not None:
            self.on_reset(parameter, expert)


@torch.no_grad()
def restart(
    layer: MoELayer, expert: int, donor: int, rule: Reinit, generator: torch.Generator, forget: OnReset
) -> None:
    """Gives an expert the weights, router row and selection bias of a donor, as `Reinit` says."""
    if rule.mode == "redraw":
        fresh = type("Rows", (nn.Module,), {})()
        for name, p in layer.experts.named_parameters(recurse=False):
            fresh.register_parameter(name, nn.Parameter(torch.empty_like(p[expert])))
        with torch.random.fork_rng(devices=[p.device] if p.is_cuda else []):
            torch.manual_seed(generator.initial_seed())
            draw(fresh, layer.init)
    for name, p in [*layer.experts.named_parameters(recurse=False), *layer.router.named_parameters(recurse=False)]:
        if hasattr(type(p), "to_local"):
            check.refuse("Balance", "reinit", "None for sharded parameters (DTensor)", name)
        if p.shape[0] not in (layer.num_experts, layer.router.num_experts):
            continue  # not one row an expert: the gate of groups
        if rule.mode == "redraw" and p in set(layer.experts.parameters()):
            p[expert] = fresh.get_parameter(name)
        else:
            noise = torch.randn(p[donor].shape, generator=generator).to(p.device, p.dtype)
            spread = p[donor].std() if p[donor].numel() > 1 else torch.zeros((), device=p.device, dtype=p.dtype)
            p[expert] = p[donor] + rule.sigma * spread * noise
        forget(p, expert)
    bias = layer.router.e_score_correction_bias
    if bias is not None:
        bias[expert] = bias[donor]
