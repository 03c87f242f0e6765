# SPDX-License-Identifier: Apache-2.0
"""A small Mixtral learns a text, once with Hugging Face's default experts ("grouped_mm") and once with ours.

Three runs from the same initial weights on the same batches, step by step in turn so that the machine treats them
alike: theirs, ours, and theirs with every experts layer off by a rounding error (tolerance.py). Training amplifies
rounding, so the tolerance of a step is what the third run has strayed from the first one by then, times SLACK.
"""

from __future__ import annotations

import importlib
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from .. import hf
from .progress import progress
from .text import batch, standard_library
from .tolerance import SLACK, experts_modules, layer_delta, nudged

BASELINE = "grouped_mm"


@dataclass(frozen=True)
class Size:
    hidden: int = 256
    width: int = 512
    layers: int = 4
    experts: int = 8
    top_k: int = 2
    rows: int = 8
    length: int = 128
    steps: int = 60
    seconds: float = 100.0  # on a busy machine fewer steps, and the table says so

    @property
    def tokens(self) -> int:
        return self.rows * self.length


FULL = Size()
QUICK = Size(hidden=128, width=256, layers=2, rows=4, steps=20, seconds=15.0)


class Run:
    """One model in training."""

    def __init__(self, size: Size, implementation: str, delta: float = 0.0) -> None:
        transformers = importlib.import_module("transformers")
        config = transformers.MixtralConfig(
            vocab_size=256,
            hidden_size=size.hidden,
            intermediate_size=size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.hidden // 32,
            num_key_value_heads=size.hidden // 64,
            num_local_experts=size.experts,
            num_experts_per_tok=size.top_k,
            max_position_embeddings=size.length,
            output_router_logits=True,  # the balance loss is part of the training
            router_aux_loss_coef=0.02,
        )
        config._experts_implementation = implementation
        torch.manual_seed(0)
        self.model = transformers.MixtralForCausalLM(config).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
        self.delta = delta
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, ids: torch.Tensor) -> None:
        started = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        with nudged(self.model, self.delta, seed=len(self.losses)) if self.delta else nullcontext():
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(float(loss.detach()))
        self.seconds.append(time.perf_counter() - started)

    def tokens_per_second(self, tokens: int) -> float:
        return tokens / statistics.median(self.seconds[min(3, len(self.seconds) - 1) :])


def tolerances(theirs: list[float], strayed: list[float]) -> list[float]:
    """Per step: SLACK times the largest difference so far of the strayed run, plus the last digits of the loss."""
    eps, largest, found = torch.finfo(torch.float32).eps, 0.0, []
    for a, b in zip(theirs, strayed, strict=True):
        largest = max(largest, abs(a - b))
        found.append(SLACK * (largest + 4 * eps * abs(a)))
    return found


def expert_load(model: Any, ids: torch.Tensor) -> list[list[float]]:
    """The share of the assignments that goes to each expert, layer by layer, on one batch."""
    load: list[list[float]] = []

    def count(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        counts = torch.bincount(args[1].reshape(-1), minlength=module.num_experts).double()
        load.append((counts / counts.sum()).tolist())

    hooks = [module.register_forward_pre_hook(count) for module in experts_modules(model)]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return load


def compare(*, quick: bool, size: Size | None = None) -> dict[str, Any]:
    """Train, compare, count."""
    size = size or (QUICK if quick else FULL)
    text = standard_library()
    delta = layer_delta(size.hidden, size.width, size.top_k)
    theirs, ours, strayed = Run(size, BASELINE), Run(size, hf.NAME), Run(size, BASELINE, delta)
    deadline = time.perf_counter() + size.seconds
    for step in progress(range(size.steps), "training steps"):
        if step >= 5 and time.perf_counter() > deadline:
            break
        ids = batch(text, step, size.rows, size.length)
        pair = (theirs, ours) if step % 2 == 0 else (ours, theirs)
        for run in (*pair, strayed):
            run.step(ids)

    limits = tolerances(theirs.losses, strayed.losses)
    differences = [abs(a - b) for a, b in zip(theirs.losses, ours.losses, strict=True)]
    shares = [d / limit for d, limit in zip(differences, limits, strict=True)]
    speed = {BASELINE: theirs.tokens_per_second(size.tokens), hf.NAME: ours.tokens_per_second(size.tokens)}
    return {
        "ok": max(shares) <= 1.0 and theirs.losses[-1] < theirs.losses[0],
        "size": vars(size),
        "steps": len(ours.losses),
        "parameters": sum(p.numel() for p in theirs.model.parameters()),
        "text": f"standard library source, {text.numel()} bytes",
        "losses": {BASELINE: theirs.losses, hf.NAME: ours.losses},
        "difference": differences,
        "tolerance": limits,
        "worst_share_of_tolerance": max(shares),
        "tokens_per_second": speed,
        "speedup": speed[hf.NAME] / speed[BASELINE],
        "expert_load": expert_load(ours.model, batch(text, size.steps, size.rows, size.length)),
    }
