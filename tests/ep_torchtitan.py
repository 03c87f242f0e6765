# SPDX-License-Identifier: Apache-2.0
"""A MoE block in torchtitan's shape, and what each rank does with it in test_ep_torchtitan.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import closeness
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn import functional as F

import moe_kernels as mk
from moe_kernels.expert_parallel.torchtitan import Dispatched, ExchangedExperts, TokenDispatcher

E, H, I, K = 8, 16, 12, 2


class GroupedExperts(nn.Module):
    """Stacked experts, called with rows sorted by expert and how many each has."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        for name, (n, m) in {"w1": (I, H), "w2": (H, I), "w3": (I, H)}.items():
            setattr(self, name, nn.Parameter(torch.randn(E, n, m, generator=g, dtype=torch.float64) / 4))

    def forward(self, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        w1, w2, w3 = (w.to_local() if isinstance(w, DTensor) else w for w in (self.w1, self.w2, self.w3))
        rows = x.split(num_tokens_per_expert.tolist())
        assert len(rows) == w1.shape[0]
        return torch.cat([(F.silu(r @ a.T) * (r @ c.T)) @ b.T for r, a, b, c in zip(rows, w1, w2, w3)])


class MoE(nn.Module):
    """Router, reorder, experts, scores, sum: the rows of a slot are sorted by expert before the experts are called."""

    def __init__(self, dispatcher: TokenDispatcher | None = None) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.gate.weight.copy_(torch.randn(E, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
        self.experts, self.dispatcher = GroupedExperts(), dispatcher

    def forward(self, x: Tensor) -> Tensor:
        scores, ids = self.gate(x).softmax(-1).topk(K)
        counts = torch.bincount(ids.flatten(), minlength=E)
        if self.dispatcher is not None:
            rows, here, state = self.dispatcher.dispatch(x, scores, ids, counts)
            return self.dispatcher.combine(self.experts(rows, here), state, x, num_local_tokens_after_padding=len(x))
        order = ids.flatten().argsort(stable=True)
        rows = self.experts(x[order // K], counts)
        return torch.zeros_like(x).index_add(0, order // K, rows * scores.flatten()[order, None])


def tokens(rank: int) -> Tensor:
    """Ragged: rank 1 has none."""
    g = torch.Generator().manual_seed(10 + rank)
    return torch.randn(0 if rank == 1 else 9 + rank, H, generator=g, dtype=torch.float64)


def local(experts: GroupedExperts, rank: int, world: int) -> GroupedExperts:
    """This rank's part, for a dispatcher that leaves parameters alone."""
    for name in ("w1", "w2", "w3"):
        part = getattr(experts, name).detach().chunk(world)[rank].clone()
        setattr(experts, name, nn.Parameter(part))
    return experts


def step(model: MoE, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    found: dict[str, Any] = {"y": y.detach(), "x": x.grad}
    return found | {name: p.grad for name, p in model.named_parameters()}


def against_one_process(rank: int, folder: Path) -> int:
    """Both seams, forward and backward; no tokens on a rank; then an error on one."""
    world, whole = dist.get_world_size(), [step(MoE(), tokens(r)) for r in range(dist.get_world_size())]
    total = {name: sum(w[name] for w in whole) for name in whole[0] if name not in ("y", "x")}
    sums = (*closeness.experts(H, I, K), E, 4 * len(tokens(3)))
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    models = {"style": MoE()}
    parallelize_module(models["style"].experts, mesh["ep"], ExchangedExperts())
    assert isinstance(models["style"].experts.w1, DTensor)
    for transport in ("flat", "rank_dedup", "two_level", "allgather"):
        dispatcher = TokenDispatcher(E, K, transport=transport, ranks_per_node=2)
        dispatcher.wire_meshes(ep_mesh=mesh["ep"], tp_mesh=None)
        models[transport] = MoE(dispatcher)
        local(models[transport].experts, rank, world)
    for kind, model in models.items():
        for _ in range(2):
            found = step(model, tokens(rank))
            for name, t in found.items():
                if name.startswith("experts."):
                    mine = t.to_local() if isinstance(t, DTensor) else t
                    closeness.check(mine, total[name].chunk(world)[rank], *sums, what=(kind, name))
                elif name == "gate.weight":
                    dist.all_reduce(t)
                    closeness.check(t, total[name], *sums, what=(kind, name))
                else:
                    closeness.check(t, whole[rank][name], *sums, what=(kind, name))
        wrong = tokens(rank)[:, : H - 1] if rank == 2 else tokens(rank)  # the gate would not take it
        scores, ids = torch.ones(len(wrong), K, dtype=torch.float64), torch.zeros(len(wrong), K, dtype=torch.int64)
        given = (wrong, scores, ids) if model.dispatcher else (wrong, torch.bincount(ids[:, 0], minlength=E))
        call = model.dispatcher.dispatch if model.dispatcher else model.experts
        with pytest.raises(mk.MoECommError, match="rank 2, hidden"):
            call(*given)
    return len(models)


def scores_first(rank: int, folder: Path) -> int:
    """Scores before the experts: what comes is multiplied, what goes home is summed as it is."""
    dispatcher, world = TokenDispatcher(E, K, score_before_experts=True), dist.get_world_size()
    x, ids = tokens(rank), torch.arange(2 * len(tokens(rank))).view(-1, 2) % E
    scores = torch.rand(len(x), K, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    rows, counts, state = dispatcher.dispatch(x, scores, ids)
    assert isinstance(state, Dispatched) and counts.shape == (E // world,) and int(counts.sum()) == len(rows)
    y = dispatcher.combine(rows, state)  # experts that do nothing
    closeness.check(y, x * scores.sum(1, keepdim=True), H, K, what="scores")
    return 1
