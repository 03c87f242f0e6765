# SPDX-License-Identifier: Apache-2.0
"""Where torchtitan's MoE lets others move its tokens: two seams, our exchange behind both. torchtitan is not imported.

    parallelize_module(moe.experts, mesh["ep"], ExchangedExperts())        # a ParallelStyle, of GroupedExperts
    moe.experts.token_dispatcher = TokenDispatcher(num_experts, top_k)     # an object with dispatch and combine

The style is given rows that are sorted by expert already, a slot each, and returns them in that order; it moves what it
is given (`flat`). The dispatcher is given tokens with their scores and ids, so a token goes once to a rank or a node.

What runs between dispatch and combine is the caller's. An exception there is seen by the other ranks when they come to
their next exchange and this rank does not: after the timeout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from .. import check, ops
from ..planning import owners
from .engine import DISPATCH_DTYPES, TRANSPORTS, Engine, places
from .layer import group_ranks


@dataclass
class Dispatched:
    """What `combine` has to know: of one call of `dispatch`.

    weights [R, K] of the rows that came, slot_to_row [R*K] of their slots here.
    """

    hop: Any
    weights: Tensor
    slot_to_row: Tensor


class TokenDispatcher:
    """Tokens to the ranks of their experts, sorted by expert there, and back, weighed and summed.

    Args:
        num_experts: E, contiguous blocks of them on the ranks.
        top_k: K.
        group: as of `ExpertParallel`; None: all ranks, or those of `wire_meshes`.
        transport, timeout, dispatch_dtype, ranks_per_node: as of `ExpertParallel`.
        score_before_experts: rows are multiplied by their scores before the experts, not after.
    """

    def __init__(
        self, num_experts: int, top_k: int, group: Any = None, *, transport: str = "rank_dedup", timeout: float = 30.0,
        dispatch_dtype: torch.dtype | None = None, ranks_per_node: int | None = None,
        score_before_experts: bool = False,
    ) -> None:  # fmt: skip
        op = "TokenDispatcher"
        check.count(op, "num_experts", num_experts, 1)
        check.count(op, "top_k", top_k, 1, num_experts, "num_experts=")
        check.choice(op, "transport", transport, TRANSPORTS)
        if dispatch_dtype not in DISPATCH_DTYPES:
            check.refuse(op, "dispatch_dtype", "torch.float8_e4m3fn or None", str(dispatch_dtype))
        self.num_experts, self.top_k, self.score_before_experts = num_experts, top_k, score_before_experts
        self.settings: dict[str, Any] = {"transport": transport, "timeout": timeout, "dispatch_dtype": dispatch_dtype}
        self.ranks_per_node = ranks_per_node
        self.group, self.engine = group, None if group is None else self._made(group)

    def wire_meshes(self, *, ep_mesh: Any, tp_mesh: Any = None) -> None:
        """torchtitan's own name for: these are the ranks. A rank of tp_mesh brings its own part of the tokens."""
        self.engine = self._made(ep_mesh)

    def _made(self, group: Any) -> Engine:
        ranks = group_ranks(group)
        owner = owners(self.num_experts, len(ranks))
        return Engine(
            ranks=ranks, owner=owner, place=places(owner, len(ranks)), capacity_factor=None, chunks=1,
            ranks_per_node=min(self.ranks_per_node or len(ranks), len(ranks)), lane="torchtitan", **self.settings,
        )  # fmt: skip

    def dispatch(self, x: Tensor, topk_scores: Tensor, topk_ids: Tensor, num_tokens_per_expert: Tensor | None = None,
                 ) -> tuple[Tensor, Tensor, Dispatched]:  # fmt: skip
        """x [T, H], topk_scores [T, K], topk_ids [T, K] -> rows [R, H] sorted by local expert, their counts [L], state.

        num_tokens_per_expert is what the ids say already and is not read.

        Errors: MoECommError on all ranks.
        """
        self.engine = self.engine or self._made(None)
        hop, came, weights, ids = self.engine.go(x, topk_scores, topk_ids)
        held = int((self.engine.owner == self.engine.position).sum())
        rows, row_to_slot, slot_to_row, offsets = ops.permute(came, ids, held)
        counts = offsets.diff().long()
        R = int(offsets[-1])
        rows, slots = rows[:R], row_to_slot[:R].long()
        if self.score_before_experts:
            scores = weights.flatten()[slots]
            rows, weights = (rows * scores[:, None]).to(rows.dtype), torch.ones_like(weights)
        return rows, counts, Dispatched(hop, weights, slot_to_row)

    def combine(self, rows: Tensor, metadata: Dispatched, x: Tensor | None = None, **_: Any) -> Tensor:
        """rows [R, H] in the order of `dispatch` -> y [T, H]."""
        if self.engine is None:
            check.refuse("TokenDispatcher.combine", "metadata", "of a dispatch before", "none", RuntimeError)
        return self.engine.come_back(metadata.hop, ops.unpermute(rows, metadata.slot_to_row, metadata.weights))


class ExchangedExperts(ParallelStyle):
    """A style for a module of stacked experts called as (rows [N, H] sorted by expert, counts [E]) -> [N, H].

    Its parameters become DTensors, Shard(0) over the mesh; inside, it sees the rows of its own experts, sorted, and
    their counts [L].
    """

    def __init__(self, *, timeout: float = 30.0, dispatch_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {"timeout": timeout, "dispatch_dtype": dispatch_dtype}
        self.dispatcher: TokenDispatcher | None = None
        self.under_way: Dispatched | None = None

    def _partition_fn(self, name: str, mod: nn.Module, device_mesh: Any) -> None:
        for key, p in list(mod.named_parameters(recurse=False)):
            if not isinstance(p, DTensor):
                whole = distribute_tensor(p.detach(), device_mesh, [Shard(0)])
                mod.register_parameter(key, nn.Parameter(whole, requires_grad=p.requires_grad))

    def _token_dispatch(self, mod: nn.Module, inputs: tuple[Tensor, Tensor], device_mesh: Any) -> tuple[Tensor, Tensor]:
        rows, counts = inputs
        E = counts.shape[0]
        if self.dispatcher is None or self.dispatcher.num_experts != E:
            self.dispatcher = TokenDispatcher(E, 1, device_mesh, transport="flat", **self.settings)
        ids = torch.repeat_interleave(torch.arange(E, device=rows.device), counts.to(rows.device).long())[:, None]
        ones = torch.ones(ids.shape, dtype=torch.float32, device=rows.device)
        came, here, self.under_way = self.dispatcher.dispatch(rows, ones, ids)
        return came, here

    def _token_combine(self, mod: nn.Module, routed_output: Tensor, device_mesh: Any) -> Tensor:
        assert self.dispatcher is not None and self.under_way is not None
        state, self.under_way = self.under_way, None
        return self.dispatcher.combine(routed_output, state)

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        ends: tuple[Any, Any] = (self._token_dispatch, self._token_combine)
        return distribute_module(module, device_mesh, self._partition_fn, *ends)
