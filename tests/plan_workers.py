# SPDX-License-Identifier: Apache-2.0
"""What the processes of test_calibrate.py and test_placement.py do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import moe_kernels as mk
from moe_kernels.placement import Placement, apply_placement, balance
from moe_kernels.planning import Links
from moe_kernels.planning.calibrate import calibrate


def measure(rank: int, folder: Path) -> list[Any]:
    """All ranks on one node; one rank a node; two nodes of half the ranks."""
    base = Links(tflops=7.0, nic_us=123.0)
    W = dist.get_world_size()
    return [calibrate(gpus_per_node=g, sizes=(1 << 10, 1 << 20), repeats=3, base=base) for g in (W, 1, W // 2)]


def delayed(rank: int, folder: Path) -> Any:
    """An all-to-all that takes 2 ms and a nanosecond a byte, on a clock of its own."""
    import time

    real, now = dist.all_to_all_single, [0.0]

    def slow(out: Any, send: Any, *splits: Any, group: Any = None) -> None:
        real(out, send, *splits, group=group)
        now[0] += 2e-3 + 1e-9 * send.numel()

    dist.all_to_all_single, clock = slow, time.perf_counter
    time.perf_counter = lambda: now[0]
    try:
        return calibrate(gpus_per_node=1, repeats=2)
    finally:
        dist.all_to_all_single, time.perf_counter = real, clock


# ---- placement

E, H, I, K, T = 8, 4, 3, 2, 16


def whole() -> dict[str, torch.Tensor]:
    """Weights of all experts, small integers so that sums are exact in any order."""
    g = torch.Generator().manual_seed(3)
    make = lambda *shape: torch.randint(-2, 3, shape, generator=g).double()  # noqa: E731
    return {"w13": make(E, I, H), "w2": make(E, H, I), "b": make(E, H)}


def forward(mine: dict[str, torch.Tensor], placement: Placement, rank: int) -> torch.Tensor:
    """y of the same tokens on every rank: this rank's slots, then the sum over ranks."""
    g = torch.Generator().manual_seed(4)
    x = torch.randint(-2, 3, (T, H), generator=g).double()
    ids = torch.rand(T, E, generator=g).topk(K).indices.int()
    ids[0, 1] = -1
    weights = torch.randint(1, 4, (T, K), generator=g).double()
    n = placement.slots_a_rank
    slots = placement.slots_of(ids, source=5) - rank * n
    local = slots.where((slots >= 0) & (slots < n), -1)
    y = mk.fused_experts(x, mine["w13"], mine["w2"], weights, local, activation="relu", w2_bias=mine["b"])
    dist.all_reduce(y)
    return y


def moved(rank: int, folder: Path) -> Any:
    """A layer, its gradients and Adam's state through a chain of placements, beside one process that holds all."""
    W = dist.get_world_size()
    hot = torch.tensor([9.0, 1, 1, 1, 5, 1, 1, 3])
    chain = [
        Placement(torch.arange(E).repeat_interleave(2), W),
        balance(hot, num_slots=2 * E, world_size=W),
        balance(hot, num_slots=2 * E, world_size=W, num_nodes=2, num_groups=4),
        balance(hot.flip(0), num_slots=2 * E, world_size=W),
    ]
    every = whole()
    truth = {name: torch.nn.Parameter(t.clone()) for name, t in every.items()}
    mine = {name: torch.nn.Parameter(t[chain[0].of_rank(rank)].clone()) for name, t in every.items()}
    steps = [torch.optim.Adam(p.values(), lr=0.5) for p in (truth, mine)]
    outputs, equal, sent = [], [], 0
    for old, new in zip([chain[0], *chain], chain):
        with torch.no_grad():
            before = forward(mine, old, rank)
            identity = [p.data_ptr() for p in mine.values()]
            sent += apply_placement(mine.values(), old, new, optimizer=steps[1])
            outputs.append(torch.equal(before, forward(mine, new, rank)))
        held = new.of_rank(rank)
        equal.append(identity == [p.data_ptr() for p in mine.values()])
        for p, q in zip(truth.values(), mine.values()):
            equal += [torch.equal(q, p[held]), q.grad is None or torch.equal(q.grad, p.grad[held])]
            for name, state in steps[1].state.get(q, {}).items():
                want = steps[0].state[p][name]
                equal.append(torch.equal(state, want[held] if want.dim() else want))
        for p, q in zip(truth.values(), mine.values()):  # gradients that tell experts apart; integers again
            p.grad = torch.arange(p.numel()).view(p.shape).double()
            q.grad = p.grad[held].clone()
        for step in steps:
            step.step()
        with torch.no_grad():
            for p in (*truth.values(), *mine.values()):
                p.round_()
    return {"outputs": outputs, "equal": equal, "sent": sent}


def kinds(rank: int, folder: Path) -> list[bool]:
    """Dtypes, strides and empty rows."""
    W = dist.get_world_size()
    old, new = Placement(torch.arange(8), W), Placement(torch.arange(8).flip(0), W)
    n, found = 8 // W, []
    every = torch.arange(8 * 6).view(8, 2, 3)
    for dtype in (torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn, torch.uint8):
        t = every.to(dtype)[old.of_rank(rank)]
        apply_placement([t], old, new)
        found.append(torch.equal(t.view(torch.uint8), every.to(dtype)[new.of_rank(rank)].view(torch.uint8)))
    strided = torch.full((n, 3, 4), -1.0)[:, :, 1:3].transpose(1, 2)
    strided.copy_(every[old.of_rank(rank)])
    apply_placement([strided, torch.empty(n, 0)], old, new)
    return [*found, torch.equal(strided, every[new.of_rank(rank)].float())]


def disagree(rank: int, folder: Path) -> list[str]:
    """One rank is wrong in each case; then all is well again."""
    W = dist.get_world_size()
    a, b = Placement(torch.arange(8), W), Placement(torch.arange(8).flip(0), W)
    t, n = torch.zeros(8 // W, 2), 8 // W
    last = rank == W - 1
    cases: list[tuple[Any, ...]] = [
        ([t], a, a if last else b),
        ([t.half() if last else t], a, b),
        ([torch.zeros(n + 1) if last else t], a, b),
        ([t], "old" if last else a, b),
        ([t], a, Placement(torch.arange(8 * W) % 8, W) if last else b),
        ([t], a, b),
    ]
    said = []
    for case in cases:
        try:
            said.append(f"sent {apply_placement(*case)}")
        except (TypeError, ValueError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said
