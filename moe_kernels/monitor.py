# SPDX-License-Identifier: Apache-2.0
"""`Monitor`: what the experts of a model do while it trains, for `MoELayer`s, replaced and plain Hugging Face models.

    monitor = Monitor(model, every=10)
    ...                                 # train; forwards are watched
    monitor.step()                      # once an optimizer step: closes the step's counts, over all ranks
    print("\\n".join(monitor.alerts())); monitor.save("moe.json"); plots.draw("moe.json", "moe.png")

Every step in which forwards are watched gives one record a layer (`RECORD`). Letters: E experts, K experts a token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import check
from .watch import Seen, Watch

RECORD = {
    "step": "of the monitor",
    "layer": "name of the module in the model",
    "counts": "slots that chose each expert, before any drop [E]",
    "share": "of the slots that go to each expert [E]",
    "max_violation": "(largest count - mean) / mean; 0 is balanced",
    "entropy": "of the shares over log E; 1 is balanced",
    "dead": "experts without a slot",
    "drop_rate": "of the slots that were chosen",
    "confidence": "mean weight of a token's first expert",
}
"""What a record holds."""
SCALARS = ("max_violation", "entropy", "dead", "drop_rate", "confidence")


class Monitor:
    """Collects what every MoE layer chooses.

    Args:
        model: any model with MoE layers (`watch.Watch`).
        every: watch one step of so many; the others cost nothing but the call.
        co_activation: count pairs of experts that a token uses together, [E, E] a layer.
        classes: a function of `Monitor.tokens` (whatever you set it to, such as token ids [T]) that gives the class of
            every token, int [T]; specialisation counts slots by class and expert, [classes, E] a layer.
        num_classes: how many there are.
        training_only: evaluation is not watched.
        group: process group whose counts are summed; None: all ranks.

    Recomputed forwards (activation checkpointing) are never counted. Errors: TypeError, ValueError.
    """

    def __init__(
        self, model: nn.Module, *, every: int = 1, co_activation: bool = False,
        classes: Callable[[Any], Tensor] | None = None, num_classes: int = 0, training_only: bool = True,
        group: Any = None,
    ) -> None:  # fmt: skip
        check.count("Monitor", "every", every, 1)
        if classes is not None:
            check.count("Monitor", "num_classes", num_classes, 1)
        self.every, self.co_activation, self.training_only, self.group = every, co_activation, training_only, group
        self.classes, self.num_classes = classes, num_classes
        self.tokens: Any = None
        """set it before a forward: what `classes` is called with"""
        self.steps = 0
        self.records: list[dict[str, Any]] = []
        self._sums: dict[str, Tensor] = {}
        self._pairs: dict[str, Tensor] = {}
        self._by_class: dict[str, Tensor] = {}
        self._watch = Watch(model, self._see)
        if not self._watch.names:
            check.refuse("Monitor", "model", "a model with MoE layers", type(model).__name__)

    def close(self) -> None:
        """Removes the hooks."""
        self._watch.close()

    # ---- collect: adds on the device, nothing is read back before `step`

    def _see(self, seen: Seen) -> None:
        skip = seen.recomputed or (self.training_only and not seen.training) or self.steps % self.every
        if skip or torch.compiler.is_exporting():
            return
        with torch.no_grad():
            E, ids, w = seen.num_experts, seen.ids, seen.weights
            here = ids[:, 0] >= 0
            drops = here.new_zeros(()) if seen.dropped is None else seen.dropped
            parts = (torch.where(here, w[:, 0], 0.0), here, drops)
            sums = [seen.chosen_counts().double(), *(part.sum(dtype=torch.float64).view(1) for part in parts)]
            self._add(self._sums, seen.name, torch.cat(sums))
            if self.co_activation or self.classes is not None:
                used = torch.zeros((ids.shape[0], E + 1), device=ids.device)
                used = used.scatter(1, torch.where((ids >= 0) & (ids < E), ids, E).long(), 1.0)[:, :E]
                if self.co_activation:
                    self._add(self._pairs, seen.name, (used.T @ used).double())
                if self.classes is not None:
                    self._add(self._by_class, seen.name, self._one_hot(ids.shape[0], ids.device).T @ used)

    def _one_hot(self, T: int, device: torch.device) -> Tensor:
        assert self.classes is not None
        found = self.classes(self.tokens)
        check.tensor("Monitor", "classes(tokens)", found, check.IDS, [("T", T)])
        check.values("Monitor", "classes(tokens)", found, 0, self.num_classes, "a class")
        return torch.nn.functional.one_hot(found.long().to(device), self.num_classes).float()

    @staticmethod
    def _add(store: dict[str, Tensor], name: str, value: Tensor) -> None:
        store[name] = store[name] + value if name in store else value

    # ---- read

    @torch.no_grad()
    def step(self) -> list[dict[str, Any]]:
        """Ends a step: one record a layer that was watched, of all ranks. Every rank has to call it."""
        records = []
        if self.steps % self.every == 0:
            sums = [self._sums[name] if name in self._sums else self._nothing(name) for name in self._watch.names]
            together = torch.cat([s.to(sums[0].device) for s in sums])
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(together, group=self.group)
            numbers = iter(together.tolist())  # one transfer for all layers; from here on it is plain arithmetic
            for name, own in zip(self._watch.names, sums):
                *counts, first, tokens, drops = (next(numbers) for _ in range(len(own)))
                if sum(counts) > 0:
                    records.append(_record(self.steps, name, counts, first, tokens, drops))
        self._sums.clear()
        self.records += records
        self.steps += 1
        return records

    def _nothing(self, name: str) -> Tensor:
        zeros = self._watch.zeros(name)
        return torch.zeros(len(zeros) + 3, dtype=torch.float64, device=zeros.device)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that are watched."""
        return self._watch.names

    def history(self, layer: str, what: str) -> Tensor:
        """One field of `RECORD` over the steps: float64 [steps] or [steps, E]."""
        check.choice("Monitor.history", "layer", layer, self.layers)
        check.choice("Monitor.history", "what", what, tuple(RECORD))
        return torch.tensor([r[what] for r in self.records if r["layer"] == layer], dtype=torch.float64)

    def pairs(self, layer: str) -> Tensor:
        """float64 [E, E]: tokens of this rank that used both experts; the diagonal: one of them."""
        return self._known(self._pairs, layer, "co_activation=True")

    def specialisation(self, layer: str) -> Tensor:
        """float64 [classes, E]: the share of a class's slots that goes to each expert, on this rank."""
        counts = self._known(self._by_class, layer, "classes")
        return counts / counts.sum(1, keepdim=True).clamp(min=1)

    def _known(self, store: dict[str, Tensor], layer: str, option: str) -> Tensor:
        if layer not in store:
            check.refuse("Monitor", "layer", f"one that was watched with {option}", repr(layer))
        return store[layer].double().cpu()

    def alerts(self, *, dead_after: int = 1, max_violation: float = 4.0, drop_rate: float = 0.2) -> list[str]:
        """What the last record of every layer warns of, in words.

        dead_after: an expert is dead after so many records in a row without a slot.
        """
        found = []
        for layer in self.layers:
            mine = [r for r in self.records if r["layer"] == layer]
            if not mine:
                continue
            last, recent = mine[-1], mine[-dead_after:]
            gone = sum(max(c) == 0 for c in zip(*(r["counts"] for r in recent)))
            if gone and len(recent) == dead_after:
                found.append(f"layer {layer}: {gone} of {len(last['counts'])} experts dead")
            if last["max_violation"] > max_violation:
                found.append(
                    f"layer {layer}: its fullest expert has {last['max_violation'] + 1:.1f} times the mean load"
                )
            if last["drop_rate"] > drop_rate:
                found.append(f"layer {layer}: {last['drop_rate']:.0%} of the slots dropped")
        return found

    # ---- export

    def scalars(self) -> dict[str, float]:
        """Tags and values of the last step, for add_scalar of TensorBoard and the like."""
        last = [r for r in self.records if r["step"] == self.steps - 1]
        return {f"moe/{r['layer']}/{name}": float(r[name]) for r in last for name in SCALARS}

    def to_pandas(self) -> Any:
        """A pandas.DataFrame of all records."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("Monitor.to_pandas: needs pandas: pip install pandas") from error
        return pandas.DataFrame(self.records, columns=list(RECORD))

    def save(self, path: str | Path) -> None:
        """Writes a JSON file for `python -m moe_kernels plot` and `plots.load`."""
        extra = {"pairs": self._pairs, "by_class": self._by_class}
        tables = {kind: {name: t.double().tolist() for name, t in store.items()} for kind, store in extra.items()}
        Path(path).write_text(json.dumps({"records": self.records, **tables}))


def _record(step: int, layer: str, counts: list[float], first: float, tokens: float, drops: float) -> dict[str, Any]:
    """first: the weights of the first experts, summed over so many tokens."""
    total, E = sum(counts), len(counts)
    share = [count / total for count in counts]
    entropy = -sum(s * math.log(s) for s in share if s > 0) / math.log(E) if E > 1 else 1.0
    return {
        "step": step, "layer": layer, "counts": [int(count) for count in counts], "share": share,
        "max_violation": max(share) * E - 1, "entropy": entropy, "dead": counts.count(0.0),
        "drop_rate": drops / total, "confidence": first / max(tokens, 1),
    }  # fmt: skip
