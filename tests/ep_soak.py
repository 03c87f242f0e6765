# SPDX-License-Identifier: Apache-2.0
"""What one rank does in the long campaigns of soak.py. Each returns what was wrong, in words; nothing is right."""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import closeness
import torch
import torch.distributed as dist
from ep_workers import TRANSPORTS, experts_of, integers, run_share
from torch import Tensor

import moe_kernels as mk
from moe_kernels.expert_parallel import link as links
from moe_kernels.layers import Experts
from moe_kernels.testing import make_case

E, H, I, K = 8, 16, 8, 2


def rounds(folder: Path) -> int:
    return int((folder / "rounds").read_text())


def whole_experts() -> Experts:
    torch.manual_seed(0)
    return Experts(H, I, E, dtype=torch.float64)


def tokens(g: torch.Generator, most: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    T = int(torch.randint(0, most, (), generator=g))
    x = torch.randn(T, H, generator=g, dtype=torch.float64)
    return x, torch.rand(T, K, generator=g, dtype=torch.float64), torch.randint(0, E, (T, K), generator=g)


def right(ep: mk.ExpertParallel, whole: Experts, given: tuple[Tensor, Tensor, Tensor]) -> bool:
    return closeness.within(ep(*given), whole(*given), *closeness.experts(H, I, K))


def threads(rank: int, folder: Path) -> list[str]:
    """R16: four threads with a layer and a lane each."""
    whole, wrong = whole_experts(), []
    layers = [mk.ExpertParallel(copy.deepcopy(whole), transport=TRANSPORTS[i], lane=str(i)) for i in range(4)]

    def work(i: int) -> None:
        g = torch.Generator().manual_seed(100 * rank + i)
        for step in range(rounds(folder)):
            if not right(layers[i], whole, tokens(g)):
                wrong.append(f"rank {rank}, thread {i}, step {step}: a wrong result")

    running = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return wrong


def delays(rank: int, folder: Path) -> list[str]:
    """R20: every number of chunks, every rank held up at random between its steps: one order everywhere, no hang."""
    whole, wrong, draw = whole_experts(), [], random.Random(rank)
    layers = [mk.ExpertParallel(copy.deepcopy(whole), transport="rank_dedup", chunks=c) for c in range(1, 9)]
    post, orders = links.Link.post, []

    def slow_post(self: Any, phase: str, start: Any) -> Any:
        orders.append(phase)
        time.sleep(draw.random() * 0.002)
        return post(self, phase, start)

    links.Link.post = slow_post  # type: ignore[method-assign]
    g = torch.Generator().manual_seed(rank)
    for step in range(rounds(folder)):
        orders.clear()
        x, weights, ids = tokens(g, 30)
        x.requires_grad_()
        layer = layers[step % 8]
        y = layer(x, weights, ids)
        y.sum().backward()
        if not closeness.within(y, whole(x, weights, ids), *closeness.experts(H, I, K)):
            wrong.append(f"rank {rank}, step {step}: a wrong result")
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, list(orders))
        if any(order != orders for order in everybody):
            wrong.append(f"rank {rank}, step {step}: another order than others")
    links.Link.post = post  # type: ignore[method-assign]
    return wrong


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def leak(rank: int, folder: Path) -> list[str]:
    """R21: memory that grows with the steps, after a tenth of them: less than 1 KB a step."""
    whole, count = whole_experts(), rounds(folder)
    ep = mk.ExpertParallel(copy.deepcopy(whole), transport="rank_dedup")
    g = torch.Generator().manual_seed(rank)
    before = 0
    for step in range(count):
        if step == count // 10:
            gc.collect()
            before = resident()
        x, weights, ids = tokens(g)
        x.requires_grad_()
        ep(x, weights, ids).sum().backward()
        ep.zero_grad()
    gc.collect()
    slope = (resident() - before) / max(1, count - count // 10)
    slack = 2**21 / max(1, count - count // 10)  # pages that the allocator keeps
    return [f"rank {rank}: {slope:.0f} bytes a step"] if slope > 1024 + slack else []


def connections(rank: int, folder: Path) -> list[str]:
    """R21: groups made and let go leave no file and no thread behind."""
    whole, wrong, g = whole_experts(), [], torch.Generator().manual_seed(rank)

    def one() -> None:
        ep = mk.ExpertParallel(copy.deepcopy(whole), transport="flat")
        if not right(ep, whole, tokens(g)):
            wrong.append("a wrong result")

    one()
    gc.collect()
    dist.barrier()
    files, running = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(rounds(folder)):
        one()
        gc.collect()
    now = len(os.listdir("/proc/self/fd")), threading.active_count()
    if now != (files, running):
        wrong.append(f"rank {rank}: {files} files and {running} threads before, {now} after")
    return wrong


def imbalance(rank: int, folder: Path) -> list[str]:
    """R11: all tokens to one expert, one rank, a rotating one; one source; idle experts: exact with every transport."""
    wrong = []
    loads = {
        "one expert": [5], "one rank": [2, 3], "spread": [0, 2, 4, 6], "idle rank": [0, 1, 4, 5, 6, 7],
        "all": list(range(8)),
    }  # fmt: skip
    for step in range(rounds(folder)):
        sources = [slice(16 * r, 16 * r + 16) for r in range(4)]
        if step % 2 == 0:  # one source
            sources = [slice(0, 64) if r == step // 2 % 4 else slice(0, 0) for r in range(4)]
        for name, chosen in {**loads, "rotating": [step % 8]}.items():
            ids = torch.tensor(chosen)[torch.arange(64) % len(chosen)][:, None].int()
            case = dataclasses.replace(integers(T=64, K=1), topk_ids=ids)
            whole = run_share(mk.ExpertParallel(experts_of(case), [rank]), case, slice(None))
            for transport in TRANSPORTS:
                ep = mk.ExpertParallel(experts_of(case), transport=transport, ranks_per_node=2)
                for key, t in run_share(ep, case, sources[rank]).items():
                    cut = torch.arange(8).chunk(4)[rank] if key in ("grad_w13", "grad_w2") else sources[rank]
                    if not torch.equal(t, whole[key][cut]):
                        wrong.append(f"rank {rank}, {name}, {transport}, step {step}: {key}")
    return wrong


def forks(rank: int, folder: Path) -> list[str]:
    """R17: children forked between steps; they are refused, end, and disturb nobody."""
    whole, wrong, g = whole_experts(), [], torch.Generator().manual_seed(rank)
    ep = mk.ExpertParallel(copy.deepcopy(whole), transport="flat")
    for step in range(rounds(folder)):
        given = tokens(g)
        if not right(ep, whole, given):
            wrong.append(f"rank {rank}, step {step}: a wrong result")
        pid = os.fork()
        if pid == 0:
            try:
                ep(*given)
            except RuntimeError as error:
                os._exit(7 if "forked" in str(error) else 8)
            os._exit(9)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 7:
            wrong.append(f"rank {rank}, step {step}: a child was not refused")
    return wrong


def determinism(rank: int, folder: Path) -> list[str]:
    """R19: the same bits in every run of a fixed configuration, forward and backward."""
    wrong, case = [], make_case(32, K=3, dtype=torch.float32, skew="zipf")
    mine = slice(16 * rank, 16 * rank + 16)
    for transport in TRANSPORTS:
        ep = mk.ExpertParallel(experts_of(case), transport=transport, ranks_per_node=1)
        first = run_share(ep, case, mine)
        for step in range(rounds(folder)):
            again = run_share(ep, case, mine)
            wrong += [f"{transport}, run {step}: {key}" for key in first if not torch.equal(first[key], again[key])]
    return wrong
