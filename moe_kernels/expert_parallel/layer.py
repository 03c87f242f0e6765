# SPDX-License-Identifier: Apache-2.0
"""`ExpertParallel`: the experts of a layer spread over the ranks of a group."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import check
from ..layers import Experts, MoELayer
from ..planning import Plan, owners
from ..routers import ExpertChoice
from .engine import DISPATCH_DTYPES, TRANSPORTS, Engine, places

_OP = "ExpertParallel"


class ExpertParallel(nn.Module):
    """A Mixture-of-Experts layer whose experts live on different ranks; every rank brings tokens of its own.

    Tokens travel to the ranks of their experts and the results come back. Forward and backward are collective: every
    rank of the group calls, in the same order, with any number of tokens, none included.

    Args:
        layer_or_experts: a `MoELayer`, which is changed in place (its `experts` keep this rank's part; names in
            state_dict stay), or a module of experts: `moe_kernels.layers.Experts`, or any module called as
            (x [R, H], topk_weights [R, K], topk_ids int32 [R, K], weight_on_input) -> [R, H].
        group: a ProcessGroup, a one-dimensional DeviceMesh, global ranks in order, or None: all ranks. With a mesh the
            parameters become DTensors, Shard(0).
        transport: "flat" one row a slot, "rank_dedup" one a (token, rank), "two_level" one a (token, node) and then one
            a (token, rank) inside the node, "allgather" every token everywhere; "auto" asks the planner in the first
            forward.
        capacity_factor: with it, ceil(T * K / E * factor) places for each pair of rank and expert, and slots beyond
            are dropped: shapes depend on nothing, the host reads no count. All ranks need the same T then.
        chunks: pieces of the tokens that travel while others are computed. None: the planner's choice.
        timeout: seconds that any exchange may take.
        dispatch_dtype: torch.float8_e4m3fn sends rows with a scale for every 128 elements; None: as they are.
        placement: int [E], the position in the group of every expert, -1 for one that is nowhere (its slots are
            absent); or [E, 2], position and index there. None: contiguous blocks.
        num_experts: E, where `layer_or_experts` holds this rank's experts only. None: it holds all, and the others are
            let go.
        ranks_per_node: ranks that share a node. None: LOCAL_WORLD_SIZE of torchrun, or all.
        average_gradients: divide the experts' gradients by the number of ranks, as data parallelism does with others.
        lane: layers of the same group and lane share a connection. Threads that run layers at once need a lane each.
    Attributes:
        plan: of `moe_kernels.plan`, from the first forward on: what "auto" chose by, for the mean of the ranks' tokens
            then; with a transport by name, what the planner says of this rank's last forward. None before.
        bytes_sent: class of link ("nic" between nodes, "nvlink" inside) -> bytes of rows that this rank sent in the
            last forward.
        dropped: bool [T, K] of the last forward with a capacity.

    Errors: TypeError, ValueError here; `MoECommError` on all ranks in forward and backward.
    """

    def __init__(
        self, layer_or_experts: nn.Module, group: Any = None, *, transport: str = "auto",
        capacity_factor: float | None = None, chunks: int | None = None, timeout: float = 30.0,
        dispatch_dtype: torch.dtype | None = None, placement: Tensor | Sequence[int] | None = None,
        num_experts: int | None = None, ranks_per_node: int | None = None, average_gradients: bool = False,
        lane: str = "",
    ) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(layer_or_experts, nn.Module):
            check.refuse(_OP, "layer_or_experts", "a MoELayer or a module of experts", check.got(layer_or_experts),
                         TypeError)  # fmt: skip
        self.is_layer = isinstance(layer_or_experts, MoELayer)
        layer = layer_or_experts
        experts: nn.Module = layer.experts if isinstance(layer, MoELayer) else layer
        ranks = group_ranks(group)
        held = None if num_experts is not None else _held(experts)
        E: Any = num_experts if held is None else held
        per_node = ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", len(ranks)))
        _check_settings(layer, len(ranks), E, transport, capacity_factor, chunks, timeout, dispatch_dtype, per_node)
        owner, place = _placement(placement, E, len(ranks), capacity_factor is not None)
        self.engine = Engine(
            ranks=ranks, owner=owner, place=place, transport=transport, capacity_factor=capacity_factor, chunks=chunks,
            timeout=float(timeout), dispatch_dtype=dispatch_dtype, ranks_per_node=min(per_node, len(ranks)), lane=lane,
        )  # fmt: skip
        if held is not None:
            keep_local(experts, owner, place, self.engine.position)
        if isinstance(experts, Experts):
            self.engine.intermediate_size = int(experts.w2.shape[2])
        shard(experts, owner, group, len(ranks))
        if average_gradients:
            for p in experts.parameters():
                if p.requires_grad:
                    p.register_hook(lambda grad: grad / len(ranks))
        if isinstance(layer, MoELayer):
            layer.parallel = self.engine
            self.engine.any_top_k = isinstance(getattr(layer.router, "rule", None), ExpertChoice)
            self.layer = layer
        else:
            self.experts = experts

    def forward(self, x: Tensor, topk_weights: Tensor | None = None, topk_ids: Tensor | None = None,
                **options: Any) -> Tensor:  # fmt: skip
        """x [..., H] -> y [..., H]; differentiable in x, topk_weights and the experts.

        Around experts: topk_weights floating [T, K] and topk_ids int32 or int64 [T, K], global ids, of x's T rows; an
        id outside [0, E) is absent. Around a MoELayer: neither, and the layer's own options, such as padding_mask.
        """
        if self.is_layer:
            if topk_weights is not None or topk_ids is not None:
                check.refuse(_OP, "topk_ids", "left out around a MoELayer, which routes itself", check.got(topk_ids))
            return self.layer(x, **options)  # type: ignore[no-any-return]
        rows = x.flatten(0, -2) if isinstance(x, Tensor) and x.dim() > 2 else x
        y, _ = self.engine.run(self.experts, rows, topk_weights, topk_ids, **options)
        return y.reshape(x.shape)

    @property
    def plan(self) -> Plan | None:
        return self.engine.plan

    @property
    def bytes_sent(self) -> dict[str, int]:
        return self.engine.bytes_sent

    @property
    def dropped(self) -> Tensor | None:
        return self.engine.dropped

    def raise_if_failed(self) -> None:
        """On a GPU: raises MoECommError for rows of the last forward that never came, and with a capacity for a rank
        that failed, which nothing else reads. Every next forward does the former too."""
        self.engine.raise_if_failed()

    def extra_repr(self) -> str:
        e = self.engine
        return f"{e.owner.shape[0]} experts over {len(e.ranks)} ranks, transport={e.transport}, timeout={e.timeout}"


def group_ranks(group: Any) -> list[int]:
    """Global ranks of a group, a mesh, a sequence, or of all."""
    if group is None:
        return list(range(dist.get_world_size())) if dist.is_initialized() else [0]
    if isinstance(group, Sequence) and not isinstance(group, str):
        ranks = list(group)
        for rank in ranks:
            check.count(_OP, "a rank of group", rank, 0)
    elif isinstance(group, dist.ProcessGroup):
        ranks = dist.get_process_group_ranks(group)
    elif hasattr(group, "get_group") and getattr(group, "ndim", 0) == 1:
        ranks = dist.get_process_group_ranks(group.get_group())
    else:
        check.refuse(_OP, "group", "a ProcessGroup, a DeviceMesh of one dimension, ranks or None", check.got(group),
                     TypeError)  # fmt: skip
    if len(set(ranks)) != len(ranks) or not ranks:
        check.refuse(_OP, "group", "different ranks, at least one", str(ranks))
    mine = dist.get_rank() if dist.is_initialized() else 0
    if mine not in ranks:
        check.refuse(_OP, "group", f"with this rank, {mine}", str(ranks))
    return ranks


def _held(experts: nn.Module) -> int | None:
    """How many experts a module holds: all first sizes of its parameters are the same."""
    sizes = {p.shape[0] for p in experts.parameters() if p.dim() > 0}
    if len(sizes) != 1:
        check.refuse(_OP, "num_experts", "given, for a module whose parameters are not stacked by expert", "None")
    return int(sizes.pop())


def _check_settings(layer: nn.Module, W: int, E: Any, transport: str, factor: Any, chunks: Any, timeout: Any,
                    dtype: Any, per_node: Any) -> None:  # fmt: skip
    check.count(_OP, "num_experts", E, 1)
    check.choice(_OP, "transport", transport, TRANSPORTS)
    check.count(_OP, "ranks_per_node", per_node, 1)
    if transport == "two_level" and per_node < W and W % per_node:
        check.refuse(_OP, "ranks_per_node", f"a divisor of the {W} ranks for two_level", str(per_node))
    if chunks is not None:
        check.count(_OP, "chunks", chunks, 1, 64)
    if factor is not None:
        if not isinstance(factor, (int, float)) or not 0 < factor < 1e6:
            check.refuse(_OP, "capacity_factor", "a number above 0, or None", check.got(factor))
        if transport not in ("auto", "flat") or (chunks or 1) > 1:
            check.refuse(_OP, "capacity_factor", "None with another transport than flat, or chunks", str(factor))
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < 1e6:
        check.refuse(_OP, "timeout", "a number of seconds above 0", check.got(timeout))
    if dtype not in DISPATCH_DTYPES:
        check.refuse(_OP, "dispatch_dtype", "torch.float8_e4m3fn or None", str(dtype))
    if isinstance(layer, MoELayer):
        if layer.parallel is not None:
            check.refuse(_OP, "layer_or_experts", "a layer that is not spread over ranks yet", "one that is")
        if layer.dropout is not None and layer.dropout.inner:
            check.refuse(_OP, "layer_or_experts", "without dropout of hidden units", f"inner={layer.dropout.inner}")


def _placement(placement: Any, E: int, W: int, even: bool) -> tuple[Tensor, Tensor]:
    """owner and place, int64 [E]."""
    if placement is None:
        owner = owners(E, W)
        place = places(owner, W)
    else:
        given = torch.as_tensor(placement).cpu()
        if given.dtype not in check.IDS or given.shape not in ((E,), (E, 2)):
            check.refuse(_OP, "placement", f"int [E={E}] or [E={E}, 2]", check.got(given))
        owner = given.long() if given.dim() == 1 else given[:, 0].long()
        check.values(_OP, "placement", owner, -1, W, "a position in the group, or -1 for nowhere")
        place = places(owner, W)
        if given.dim() == 2:
            asked = torch.where(owner < 0, -1, given[:, 1].long())
            for rank in range(W):
                if sorted(asked[owner == rank].tolist()) != list(range(int((owner == rank).sum()))):
                    check.refuse(_OP, "placement", f"indices 0, 1, ... once each on rank {rank}",
                                 str(asked[owner == rank].tolist()))  # fmt: skip
            place = asked
    counts = torch.bincount(owner[owner >= 0], minlength=W)
    if int(counts.min()) == 0:
        check.refuse(_OP, "placement", "an expert or more on every rank", f"{counts.tolist()} experts")
    if even and (len(set(counts.tolist())) > 1 or bool((owner < 0).any())):
        check.refuse(_OP, "placement", "the same number of experts on every rank with a capacity", str(counts.tolist()))
    return owner, place


def local_ids(owner: Tensor, place: Tensor, position: int) -> Tensor:
    """int64 [L]: the global ids of a rank's experts, by their place there."""
    mine = (owner == position).nonzero()[:, 0]
    return mine[place[mine].argsort()]


def keep_local(experts: nn.Module, owner: Tensor, place: Tensor, position: int) -> None:
    """Leaves a module of stacked experts this rank's rows of every parameter."""
    mine = local_ids(owner, place, position)
    for module in experts.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if not hasattr(p, "placements"):  # a DTensor is cut already
                part = p.detach()[mine.to(p.device)].clone()
                setattr(module, name, nn.Parameter(part, requires_grad=p.requires_grad))


def shard(experts: nn.Module, owner: Tensor, mesh: Any, W: int) -> None:
    """With a mesh: parameters become DTensors, so that a distributed checkpoint knows whose part this is."""
    if not hasattr(mesh, "get_group"):
        return
    from torch.distributed.tensor import DTensor, Shard

    E = owner.shape[0]
    if E % W or not torch.equal(owner, owners(E, W)):
        check.refuse(_OP, "placement", "contiguous blocks of one size with a DeviceMesh", str(owner.tolist()))
    for module in experts.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if not isinstance(p, DTensor):
                whole = DTensor.from_local(p.detach(), mesh, [Shard(0)], run_check=False)
                setattr(module, name, nn.Parameter(whole, requires_grad=p.requires_grad))


def local_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a model that are experts of this rank only: for whoever synchronises all others.

    `fully_shard(model, ignored_params=set(local_parameters(model).values()))`; `ignore_in_ddp` uses it too.
    """
    found: dict[str, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        spread = isinstance(module, MoELayer) and module.parallel is not None
        if spread or (isinstance(module, ExpertParallel) and not module.is_layer):
            start = f"{prefix}.experts." if prefix else "experts."
            found.update({start + name: p for name, p in module.experts.named_parameters()})
    return found


def ignore_in_ddp(model: nn.Module) -> None:
    """To be called before DistributedDataParallel(model): it will leave the experts of this rank alone."""
    names = list(local_parameters(model))
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


__all__ = ["ExpertParallel", "ignore_in_ddp", "local_parameters"]
