# SPDX-License-Identifier: Apache-2.0
"""Deterministic routing: the expert follows from the token's id, position or index. Roller et al. 2021 (2106.04426).

There is no gate: weights are 1 (1/K for a table of K columns) and the router has no parameters. The id is that of the
current position's input token. Letters: T tokens, V vocabulary, E experts, K experts a token.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import check, draws
from ..ops import Routing
from .token_choice import Gate, Router, RouterSettings, as_routing


@dataclass(frozen=True, repr=False)
class _Hashed(RouterSettings):
    def gate(self, hidden_size: int, num_experts: int, top_k: int, **place: Any) -> HashedGate:
        return HashedGate(hidden_size, num_experts, top_k, self, **place)

    def table(self, E: int, K: int) -> Tensor | None:
        """int64 [V, K], or None where no table is kept."""
        return None


@dataclass(frozen=True, repr=False)
class Modular(_Hashed):
    """Expert = position mod E; the position is position_ids, or the index in the sequence."""


@dataclass(frozen=True, repr=False)
class RandomHash(_Hashed):
    """Expert = splitmix64((step << 32 | index of the token) XOR splitmix64(seed)) mod E; `draws.set_step` sets step."""

    seed: int = 0


@dataclass(frozen=True, repr=False)
class Hash(_Hashed):
    """Expert = splitmix64(token id XOR splitmix64(seed)) mod E."""

    vocab_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        check.count("Hash", "vocab_size", self.vocab_size, 1)

    def table(self, E: int, K: int) -> Tensor:
        key = draws.splitmix64(self.seed)
        return draws.unsigned_mod(draws.splitmix64(torch.arange(self.vocab_size) ^ key), E)[:, None]


@dataclass(frozen=True, repr=False)
class BalancedHash(_Hashed):
    """A table in which every expert has the same share of the corpus, as far as token ids can be split."""

    frequency: Tensor = field(compare=False)
    """int or floating [V]: how often each token id occurs in the corpus"""

    def table(self, E: int, K: int) -> Tensor:
        return balanced_table(self.frequency, E)[:, None]


@dataclass(frozen=True, repr=False)
class TableHash(_Hashed):
    """Any table of your own: int [V] or [V, K], the experts of every token id; K columns weigh 1/K each."""

    experts: Tensor = field(compare=False)

    def table(self, E: int, K: int) -> Tensor:
        table = self.experts[:, None] if self.experts.dim() == 1 else self.experts
        check.tensor("TableHash", "experts", table, check.IDS, [("V", None), ("K", K)])
        check.values("TableHash", "experts", table, 0, E, "an expert")
        return table


@dataclass(frozen=True, repr=False)
class MultiHash(_Hashed):
    """N = top_k hashes, each choosing one N-th of an expert's width; their hidden vectors are concatenated.

    The layer holds the parts: build it with num_experts = N * experts and intermediate_size = width / N. Part n of
    expert e is expert n * experts + e of the layer, and all weights are 1: a sum over parts through w2 is w2 applied to
    the concatenation.
    """

    tables: Tensor = field(compare=False)
    """int [V, N]: the expert of every token id by every hash, 0 .. experts-1"""

    def table(self, E: int, K: int) -> Tensor:
        check.tensor("MultiHash", "tables", self.tables, check.IDS, [("V", None), ("N=top_k", K)])
        if E % K:
            check.refuse("MultiHash", "num_experts", f"a multiple of top_k={K}: every expert in {K} parts", str(E))
        check.values("MultiHash", "tables", self.tables, 0, E // K, f"an expert of num_experts / top_k = {E // K}")
        return self.tables + torch.arange(K) * (E // K)


def balanced_table(frequency: Tensor, num_experts: int) -> Tensor:
    """frequency [V] -> int64 [V]: the most frequent ids first (ties: lowest), each to the emptiest expert so far."""
    kinds = check.FLOATS if frequency.is_floating_point() else check.IDS
    check.tensor("balanced_table", "frequency", frequency, kinds, [("V", None)])
    table = torch.zeros_like(frequency, dtype=torch.int64)
    mass = [(0, e) for e in range(num_experts)]
    values = frequency.tolist()
    for token in frequency.sort(descending=True, stable=True).indices.tolist():
        load, e = heapq.heappop(mass)
        table[token] = e
        heapq.heappush(mass, (load + values[token], e))
    return table


class HashedGate(Gate):
    """The gate of the hashes: no parameters. Buffer: table int64 [V, K] where the rule has one."""

    wants = ("sequence_length", "position_ids")
    has_logits = False

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, rule: _Hashed, *,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:  # fmt: skip
        super().__init__(1, num_experts, top_k, Router(), device="meta", dtype=dtype)
        del self.weight
        self.rule, self.hidden_size = rule, hidden_size
        if not isinstance(rule, (TableHash, MultiHash)) and top_k != 1:
            check.refuse(type(rule).__name__, "top_k", "1: one expert a token", str(top_k))
        table = rule.table(num_experts, top_k)
        self.share = 1.0 if isinstance(rule, MultiHash) else 1.0 / top_k
        self.table: Tensor | None
        self.register_buffer("table", None if table is None else table.to(device, torch.int64, copy=True))

    def reset_parameters(self, init: str = "normal") -> None:
        """There are none."""

    def extra_repr(self) -> str:
        return f"{self.hidden_size} -> {self.num_experts}, top_k={self.top_k}, {self.rule}"

    def forward(
        self, x: Tensor, *, padding_mask: Tensor | None = None, token_ids: Tensor | None = None,
        sequence_length: int | None = None, position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:  # fmt: skip
        """Logits are 0: there is no gate."""
        T, E, name = x.shape[0], self.num_experts, type(self.rule).__name__
        index = torch.arange(T, device=x.device)
        if self.table is not None:
            if token_ids is None:
                check.refuse(name, "token_ids", "given: the experts follow from them", "None", TypeError)
            if check.checked() or (x.device.type == "cpu" and not torch.compiler.is_compiling()):
                check.values(name, "token_ids", token_ids, 0, self.table.shape[0], "a token id of the table")
            ids = self.table[token_ids.long()]
        elif isinstance(self.rule, RandomHash):
            counters = (self.draws.counter() << 32 | index) ^ draws.splitmix64(self.rule.seed)
            ids = draws.unsigned_mod(draws.splitmix64(counters), E)[:, None]
        else:
            position = index % (sequence_length or max(T, 1)) if position_ids is None else position_ids
            ids = (position % E)[:, None]
        weights = torch.full_like(ids, self.share, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        return x.new_zeros(()).expand(T, E), as_routing(weights, ids, padding_mask, E)
