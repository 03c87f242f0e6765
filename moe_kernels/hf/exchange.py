# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's expert parallelism over our exchange: headers first, one row a (token, rank), deadlines.

    moe_kernels.hf.exchange.register_expert_parallel()
    config = DistributedConfig(tp_size=2, ep_size=2, ep_implementation="moe_kernels")
    model = AutoModelForCausalLM.from_pretrained(..., distributed_config=config, experts_implementation="moe_kernels")

transformers shards the experts and calls an implementation by name; this is one. Ranks that share a batch (tensor
parallelism) each send their slice of it and gather the results, as its own all-to-all does.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from ..expert_parallel.engine import Engine, places
from ..expert_parallel.layer import group_ranks
from ..planning import owners

NAME = "moe_kernels"
TIMEOUT = 30.0


class LocalExperts(nn.Module):
    """The sharded experts of transformers under the call of `Engine`: absent ids become those past the last."""

    def __init__(self, experts: nn.Module, forward: Any, held: int) -> None:
        super().__init__()
        self.experts, self.run, self.held = experts, forward, held

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, weight_on_input: bool) -> Tensor:
        here = topk_ids >= 0
        ids = torch.where(here, topk_ids, self.held).long()
        return self.run(x, ids, torch.where(here, topk_weights, 0.0).to(x.dtype))  # type: ignore[no-any-return]


def register_expert_parallel() -> None:
    """Makes `ep_implementation="moe_kernels"` known to transformers, which is imported. Calling it again is harmless.

    Errors: ImportError where transformers is missing or has no registry of implementations.
    """
    there = importlib.import_module("transformers.distributed.expert_parallel")
    tensors = importlib.import_module("torch.distributed.tensor")
    base: Any = there.EPImplementation

    class Exchanged(base):  # type: ignore[misc]
        """Of one experts module; (hidden_states, top_k_index, top_k_weights) of this rank's batch -> its output."""

        def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
            super().__init__(experts, ep_mesh, tp_mesh)
            ranks = group_ranks(ep_mesh)
            owner = owners(self.num_local_experts * len(ranks), len(ranks))
            self.local = LocalExperts(experts, self.experts_forward, self.num_local_experts)
            self.engine = Engine(
                ranks=ranks, owner=owner, place=places(owner, len(ranks)), transport="rank_dedup", capacity_factor=None,
                chunks=None, timeout=TIMEOUT, dispatch_dtype=None, ranks_per_node=len(ranks), lane="transformers",
            )  # fmt: skip

        def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            whole = hidden_states.shape
            given = (hidden_states, top_k_weights, top_k_index)
            if self.tp_mesh.size() > 1:
                given = tuple(self._slice(t) for t in given)  # type: ignore[assignment]
            y, _ = self.engine.run(self.local, *given)
            if self.tp_mesh.size() == 1:
                return y
            parts, strides = [tensors.Shard(0)], (whole[1], 1)
            spread = tensors.DTensor.from_local(y.contiguous(), self.tp_mesh, parts, shape=whole, stride=strides)
            return spread.full_tensor()  # type: ignore[no-any-return]

        def _slice(self, t: Tensor) -> Tensor:
            same = tensors.DTensor.from_local(t, self.tp_mesh, [tensors.Replicate()], run_check=False)
            return same.redistribute(self.tp_mesh, [tensors.Shard(0)]).to_local()  # type: ignore[no-any-return]

    there.EPImplementationInterface.register(NAME, Exchanged)
