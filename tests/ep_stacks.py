# SPDX-License-Identifier: Apache-2.0
"""What one rank does in test_ep_stacks.py: the stacks around an `ExpertParallel` layer, against one process."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import closeness
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import load, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import moe_kernels as mk
from moe_kernels import expert_parallel, routers
from moe_kernels.layers import Experts

H, I, E, K, T = 16, 8, 8, 2, 12
SUMS = (*closeness.experts(H, 12, K), E, 4 * T)
"""of a layer with its backward: the experts' and the shared one's products, the router's, a gradient over all tokens"""

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared": {"shared_intermediate_size": 12, "shared_gate": True, "bias": True},
    "sigmoid": {
        "router": routers.Router(scoring_func="sigmoid", correction_bias=True, num_expert_group=2, topk_group=1)
    },
    "capacity": {"capacity": 0.75, "losses": "switch"},
    "sequences": {"capacity": mk.Capacity(0.5, group="sequence")},
    "bpr": {"capacity": mk.Capacity(0.5, drop_policy="bpr")},
    "expert choice": {"router": routers.ExpertChoice()},
    "expert choice, sequences": {"router": routers.ExpertChoice(group="sequence")},
    "base": {"router": routers.Base(), "top_k": 1},
    "sinkhorn": {"router": routers.Sinkhorn(), "top_k": 1},
    "hash": {"router": routers.Modular(), "top_k": 1},
    "identity": {"num_identity_experts": 4},
}


def make(name: str = "plain") -> mk.MoELayer:
    torch.manual_seed(0)
    words = {"top_k": K, "dtype": torch.float64} | LAYERS[name]
    return mk.MoELayer(H, I, E, **words)


def part(rank: int, world: int) -> slice:
    return slice(E // world * rank, E // world * (rank + 1))


def batch(rank: int, length: int = T) -> Tensor:
    return torch.randn(2, length // 2, H, dtype=torch.float64, generator=torch.Generator().manual_seed(50 + rank))


def close(a: Tensor, b: Tensor, what: Any, layers: int = 1) -> None:
    closeness.check(a, b, *SUMS * layers, what=what)


def grads(model: nn.Module) -> dict[str, Tensor]:
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    assert all(g is not None for g in found.values()), found.keys()
    return {name: (g.full_tensor() if hasattr(g, "full_tensor") else g) for name, g in found.items()}  # type: ignore[union-attr]


def one_process(layer: mk.MoELayer, world: int) -> tuple[list[Tensor], list[Any], dict[str, Tensor]]:
    """Outputs and routings of every rank's batch, and the sum of all their gradients."""
    outputs, routings = [], []
    for rank in range(world):
        y = layer(batch(rank))
        (y.square().sum() + layer.aux_loss).backward()
        outputs.append(y.detach())
        routings.append(layer.last_routing)
    return outputs, routings, grads(layer)


def every_router(rank: int) -> int:
    """Ids, counts and drops of a rank are those of one process exactly; outputs and gradients in rounding."""
    world = dist.get_world_size()
    kinds = ("flat", "rank_dedup", "two_level", "allgather")
    for at, name in enumerate(LAYERS):
        outputs, routings, total = one_process(make(name), world)
        ep = mk.ExpertParallel(make(name), transport=kinds[at % 4], ranks_per_node=1)
        y = ep(batch(rank))
        (y.square().sum() + ep.layer.aux_loss).backward()
        close(y, outputs[rank], name)
        mine, theirs = ep.layer.last_routing, routings[rank]
        assert torch.equal(mine.topk_ids, theirs.topk_ids), name
        assert torch.equal(mine.tokens_per_expert, theirs.tokens_per_expert), name
        assert (mine.dropped is None) == (theirs.dropped is None), name
        if theirs.dropped is not None:
            assert torch.equal(mine.dropped, theirs.dropped) and bool(theirs.dropped.any()), name
        for key, g in grads(ep.layer).items():
            if key.startswith("experts."):
                close(g, total[key][part(rank, world)], (name, key))
            else:  # every rank has its own share of the others' gradients
                dist.all_reduce(g)
                close(g, total[key], (name, key))
    return len(LAYERS)


class Model(nn.Module):
    """Two MoE layers between linear ones."""

    def __init__(self, parallel: bool, remat: str = "", **words: Any) -> None:
        super().__init__()
        self.first = nn.Linear(H, H, dtype=torch.float64)
        self.moe = nn.ModuleList([make("shared"), make("capacity")])
        self.last = nn.Linear(H, H, dtype=torch.float64)
        self.remat = remat
        for p in (*self.first.parameters(), *self.last.parameters()):
            with torch.no_grad():
                p.copy_(
                    torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=torch.float64) / 4
                )
        if parallel:
            for layer in self.moe:
                mk.ExpertParallel(layer, **words)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.moe:
            again = self.remat == "reentrant"
            x = x + (checkpoint(layer, x, use_reentrant=again) if self.remat else layer(x))
        return self.last(x)


def averaged(world: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """One process: outputs, and the mean over the ranks of the gradients of their losses."""
    model, outputs = Model(False), []
    for rank in range(world):
        y = model(batch(rank))
        y.square().mean().backward()
        outputs.append(y.detach())
    return outputs, {name: g / world for name, g in grads(model).items()}


def check_model(model: nn.Module, run: Any, rank: int, kind: str, whole_experts: bool = False) -> None:
    world = dist.get_world_size()
    outputs, expected = averaged(world)
    for p in model.parameters():
        p.grad = None
    y = run(batch(rank))
    y.square().mean().backward()
    close(y, outputs[rank], kind, 4)
    for name, g in grads(model).items():
        cut = ".experts." in name and not whole_experts
        close(g, expected[name][part(rank, world)] if cut else expected[name], (kind, name), 4)


def data_parallel(rank: int) -> int:
    """DDP and FSDP2 around the rest, experts spread; checkpointing of both kinds; torch.compile."""
    model = Model(True, average_gradients=True)
    expert_parallel.ignore_in_ddp(model)
    check_model(model, nn.parallel.DistributedDataParallel(model), rank, "ddp")
    for remat in ("reentrant", "saved"):
        model = Model(True, remat, average_gradients=True)
        expert_parallel.ignore_in_ddp(model)
        ddp = nn.parallel.DistributedDataParallel(model)
        check_model(model, ddp, rank, remat)
    model = Model(True, average_gradients=True)
    fully_shard(model, ignored_params=set(expert_parallel.local_parameters(model).values()))
    check_model(model, model, rank, "fsdp")
    model = Model(True, average_gradients=True)
    expert_parallel.ignore_in_ddp(model)
    ddp = nn.parallel.DistributedDataParallel(model)
    check_model(model, torch.compile(ddp, backend="aot_eager"), rank, "compile")
    return 5


def experts_sharded_too(rank: int) -> int:
    """World 4 as 2 x 2: experts over one dimension of the mesh, and FSDP2 of each part over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))
    world, outputs = 4, averaged(4)
    model = Model(True, group=mesh["expert"].get_group(), ranks_per_node=1)
    for layer in model.moe:
        fully_shard(layer.experts, mesh=mesh["data"])
        layer.experts.set_gradient_divide_factor(float(world))
    fully_shard(model, ignored_params={p for layer in model.moe for p in layer.experts.parameters()})
    y = model(batch(rank))
    y.square().mean().backward()
    close(y, outputs[0][rank], "2-D", 4)
    at = mesh["expert"].get_local_rank()
    for name, g in grads(model).items():
        close(g, outputs[1][name][part(at, 2)] if ".experts." in name else outputs[1][name], ("2-D", name), 4)
    return 1


def who_wants_gradients(rank: int) -> int:
    """requires_grad, or the use of y, differs between ranks: nobody waits, and what is wanted is right."""
    x0, weights, ids = batch(0).flatten(0, 1), torch.rand(T, K, dtype=torch.float64), torch.randint(0, E, (T, K))
    torch.manual_seed(0)
    whole = Experts(H, I, E, dtype=torch.float64)
    for transport in ("flat", "two_level", "allgather"):
        for x_wants, experts_want in ((rank == 0, True), (True, rank == 1), (False, rank == 0), (False, False)):
            ep = mk.ExpertParallel(copy.deepcopy(whole), transport=transport, ranks_per_node=1)
            for p in ep.parameters():
                p.requires_grad_(experts_want)
            x, twin = (x0.clone().requires_grad_(x_wants) for _ in range(2))
            y = ep(x, weights, ids)
            if y.requires_grad:  # the same on every rank
                y.sum().backward()
            if x_wants:
                whole(twin, weights, ids).sum().backward()
                close(x.grad, twin.grad, transport)  # type: ignore[arg-type]
            assert all((p.grad is not None) == experts_want for p in ep.parameters())
    with torch.no_grad():
        assert not ep(x, weights, ids).requires_grad
    with pytest.raises(mk.MoECommError, match="grad_mode"), torch.set_grad_enabled(rank == 0):
        ep(x, weights, ids)
    return 1


def exact_gradients(rank: int) -> int:
    """R18: gradcheck in float64 of x and topk_weights, every transport; all ranks evaluate as often."""
    for transport in ("flat", "rank_dedup", "two_level", "allgather"):
        torch.manual_seed(0)
        ep = mk.ExpertParallel(Experts(4, 3, 4, dtype=torch.float64), transport=transport, ranks_per_node=1)
        torch.manual_seed(rank)
        x, w = (torch.randn(3, n, dtype=torch.float64, requires_grad=True) for n in (4, 2))
        ids = torch.rand(3, 4).argsort(1)[:, :2]
        for p in ep.parameters():
            p.data.mul_(20)  # else the slopes are too small to tell
        assert torch.autograd.gradcheck(lambda x, w, ep=ep, ids=ids: ep(x, w, ids), (x, w))
    return 4


def threads(rank: int) -> int:
    """R16: two threads with a lane each, in another rhythm on every rank: no result is another's."""
    wrong: list[Any] = []
    torch.manual_seed(0)
    whole = Experts(H, I, E, dtype=torch.float64)
    layers = {lane: mk.ExpertParallel(copy.deepcopy(whole), transport="flat", lane=lane) for lane in ("a", "b")}

    def work(lane: str) -> None:
        g = torch.Generator().manual_seed(rank + 10 * ord(lane))
        for _ in range(60):
            x = torch.randn(5, H, generator=g, dtype=torch.float64)
            ids = torch.randint(0, E, (5, K), generator=g)
            w = torch.ones(5, K, dtype=torch.float64)
            if not closeness.within(layers[lane](x, w, ids), whole(x, w, ids), *SUMS):
                wrong.append(lane)

    running = [threading.Thread(target=work, args=(lane,)) for lane in layers]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(120)
    assert not wrong and not any(thread.is_alive() for thread in running)
    return len(running)


def everything(rank: int, folder: Path) -> dict[str, int]:
    parts = (every_router, data_parallel, who_wants_gradients, exact_gradients, threads)
    return {function.__name__: function(rank) for function in parts}


def two_dimensions(rank: int, folder: Path) -> int:
    return experts_sharded_too(rank)


def save_from(rank: int, folder: Path) -> None:
    """A distributed checkpoint of a model whose experts are DTensors over all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = Model(True, group=mesh)
    save(model.state_dict(), checkpoint_id=folder / "checkpoint")


def load_into(rank: int, folder: Path) -> int:
    """The same checkpoint, whatever the number of ranks that wrote it."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = Model(True, group=mesh)
    for p in model.parameters():
        p.data.zero_()
    state = model.state_dict()
    load(state, checkpoint_id=folder / "checkpoint")
    model.load_state_dict(state)
    world, outputs = dist.get_world_size(), averaged(dist.get_world_size())[0]
    close(model(batch(rank)), outputs[rank], "loaded", 4)
    for name, p in model.named_parameters():
        assert (".experts." in name) == (getattr(p, "placements", None) is not None), name
    assert model.moe[0].experts.w13.to_local().shape[0] == E // world
    return 1
