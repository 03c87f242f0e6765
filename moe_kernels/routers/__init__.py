# SPDX-License-Identifier: Apache-2.0
"""How a token chooses its experts: one settings class a router, each for `MoELayer(router=...)`, and their gates.

token_choice.py   `Router`: the K best experts of a token, in every form     noisy.py         `NoisyTopK`
expert_choice.py  `ExpertChoice`: the best tokens of an expert               hierarchical.py  `TwoLevel`
assignment.py     `Base`, `Sinkhorn`: balanced assignment                    hashed.py        `Hash`, `Modular`, ...
"""

from __future__ import annotations

from typing import Any

from .assignment import Base, Sinkhorn
from .expert_choice import ExpertChoice
from .hashed import BalancedHash, Hash, Modular, MultiHash, RandomHash, TableHash
from .hierarchical import TwoLevel
from .noisy import Noise, NoisyTopK
from .token_choice import (
    INITS,
    Gate,
    Router,
    RouterFn,
    RouterSettings,
    SparseMixer,
    as_routing,
    changed,
    count_experts,
    draw,
    revive,
    sample_second,
)

__all__ = [
    "INITS", "BalancedHash", "Base", "ExpertChoice", "Gate", "Hash", "Modular", "MultiHash", "Noise", "NoisyTopK",
    "RandomHash", "Router", "RouterFn", "RouterSettings", "Sinkhorn", "SparseMixer", "TableHash", "TwoLevel",
    "as_routing", "changed", "count_experts", "draw", "make_gate", "revive", "sample_second",
]  # fmt: skip


def make_gate(hidden_size: int, num_experts: int, top_k: int, router: Any, **place: Any) -> Gate:
    """The gate of a router: settings of any kind, a callable, or a gate that was built already."""
    if isinstance(router, Gate):
        return router
    if isinstance(router, RouterSettings):
        return router.gate(hidden_size, num_experts, top_k, **place)
    return Gate(hidden_size, num_experts, top_k, router, **place)
