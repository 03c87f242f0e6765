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
import warnings
import weakref
from pathlib import Path
from typing import Any

import closeness
import torch
import torch.distributed as dist
from ep_workers import TRANSPORTS, experts_of, integers, run_share
from torch import Tensor
from torch.utils.data import Dataset

import moe_kernels as mk
from moe_kernels.expert_parallel import carrier
from moe_kernels.expert_parallel import link as links
from moe_kernels.expert_parallel.journey import Journey
from moe_kernels.layers import Experts
from moe_kernels.planning import flows, metadata_bytes, row_bytes
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


def alive() -> int:
    """Tensors and journeys that Python knows of."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sum(issubclass(type(o), (Tensor, Journey)) for o in gc.get_objects())


def leak(rank: int, folder: Path, kept: int = 0) -> list[str]:
    """R21: memory that grows with the steps, after a tenth of them: less than 1 KB a step; every transport in turn.

    kept: bytes a step that are not let go of, to show that it would be noticed.
    """
    whole, count, hoard = whole_experts(), rounds(folder), []
    kinds: list[dict[str, Any]] = [{"transport": t, "chunks": c} for t, c in zip(TRANSPORTS, (1, 2, 1, 3))]
    layers = [mk.ExpertParallel(copy.deepcopy(whole), **kind) for kind in (*kinds, {"capacity_factor": 2.0})]
    g = torch.Generator().manual_seed(rank)
    before, objects = 0, 0
    for step in range(count):
        if step == count // 10:
            objects, before = alive(), resident()
        given = tokens(g, 6)
        x, weights, ids = (t[:1].repeat(3, 1) for t in given) if step % 5 == 4 and len(given[0]) else given
        if step % 5 == 4 and len(x) != 3:  # a static capacity: as many tokens on every rank
            x, weights, ids = torch.ones(3, H, dtype=torch.float64), torch.ones(3, K).double(), torch.zeros(3, K).long()
        x.requires_grad_()
        layers[step % 5](x, weights, ids).sum().backward()
        layers[step % 5].zero_grad()
        hoard.append(torch.ones(kept, dtype=torch.uint8)) if kept else None
    del x, weights, ids, given
    more = alive() - objects
    slope = (resident() - before) / max(1, count - count // 10)
    (folder / f"figure{rank}").write_text(f"rank {rank}: {slope:.0f} bytes a step over {count} steps, {more} objects")
    slack = 2**23 / count if count < 2000 else 0.0  # pages that the allocator keeps
    wrong = [f"rank {rank}: {slope:.0f} bytes a step"] if slope > 1024 + slack else []
    return wrong + ([f"rank {rank}: {more} tensors more than before"] if more > 8 else [])


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


class Asking(Dataset[int]):
    """Every item is what a worker of a DataLoader hears that calls the layer: 7, a refusal."""

    def __init__(self, ep: mk.ExpertParallel, given: tuple[Tensor, Tensor, Tensor]) -> None:
        self.ep, self.given = ep, given

    def __len__(self) -> int:
        return 4

    def __getitem__(self, at: int) -> int:
        if at >= len(self):
            raise IndexError
        try:
            self.ep(*self.given)
        except RuntimeError as error:
            return 7 if "forked" in str(error) else 8
        return 9


def forks(rank: int, folder: Path) -> list[str]:
    """R17: children forked between steps, by hand and by a DataLoader: refused, they end, and disturb nobody."""
    whole, wrong, g = whole_experts(), [], torch.Generator().manual_seed(rank)
    ep = mk.ExpertParallel(copy.deepcopy(whole), transport="flat")
    for step in range(rounds(folder)):
        given = tokens(g)
        if not right(ep, whole, given):
            wrong.append(f"rank {rank}, step {step}: a wrong result")
        pid = os.fork()
        if pid == 0:
            os._exit(Asking(ep, given)[0])
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 7:
            wrong.append(f"rank {rank}, step {step}: a child was not refused")
        loader = torch.utils.data.DataLoader(
            Asking(ep, given), num_workers=2, multiprocessing_context="fork", timeout=60
        )
        if [int(v) for v in loader] != [7] * 4:
            wrong.append(f"rank {rank}, step {step}: a worker was not refused")
    return wrong


def determinism(rank: int, folder: Path) -> list[str]:
    """R19: the same bits in every run, forward and backward, with one thread and with two."""
    wrong, case = [], make_case(32, K=3, dtype=torch.float32, skew="zipf")
    mine = slice(16 * rank, 16 * rank + 16)
    for transport in TRANSPORTS:
        ep = mk.ExpertParallel(experts_of(case), transport=transport, ranks_per_node=1)
        first = run_share(ep, case, mine)
        for step in range(rounds(folder)):
            torch.set_num_threads(1 + step % 2)
            again = run_share(ep, case, mine)
            wrong += [f"{transport}, run {step}: {key}" for key in first if not torch.equal(first[key], again[key])]
    return wrong


SHORT = {"threads": 8, "delays": 6, "leak": 150, "connections": 2, "forks": 2, "determinism": 2}


def short(rank: int, folder: Path) -> dict[str, list[str]]:
    """A little of every campaign of two ranks; and the leak that must be noticed."""
    found: dict[str, list[str]] = {}
    for name, count in SHORT.items():
        own = folder / f"{name}{rank}"
        own.mkdir()
        (own / "rounds").write_text(str(count))
        found[name] = globals()[name](rank, own)
        dist.barrier()
    (own / "rounds").write_text("150")
    found["planted leak"] = leak(rank, own, kept=2**16)
    return found


def attack(rank: int, folder: Path) -> dict[str, dict[str, float]]:
    """R11: every token of four ranks to the experts of rank 0. Bytes of the buffers that rows arrive in, alive at one
    time, over the most that the planner says a rank ever receives."""
    W, T, width = 4, 256, 64
    g, found = torch.Generator().manual_seed(rank), {}
    x = torch.randn(T, width, generator=g)
    now = most = 0
    make = carrier.received

    def let_go(size: int) -> None:
        nonlocal now
        now -= size

    def counted(data: Tensor, rows: int) -> Tensor:
        nonlocal now, most
        out = make(data, rows)
        now, most = now + out.nbytes, max(most, now + out.nbytes)
        weakref.finalize(out, let_go, out.nbytes)
        return out

    carrier.received = counted
    settings: dict[str, dict[str, Any]] = {t: {"transport": t} for t in TRANSPORTS}
    settings |= {
        "flat in 3": {"transport": "flat", "chunks": 3},
        "dedup in 3": {"transport": "rank_dedup", "chunks": 3},
    }
    settings |= {"static": {"capacity_factor": 1.5}}
    for name, words in settings.items():
        ep = mk.ExpertParallel(Experts(width, 8, E), ranks_per_node=2, **words)
        ids = torch.tensor([0, 1]).expand(T, 2)
        leaf, most = x.clone().requires_grad_(), 0
        ep(leaf, torch.ones(T, 2), ids).sum().backward()
        shape = flows.Shape(T, E, 2, W, 2)
        if name == "static":
            assert ep.plan is not None and ep.plan.static_recv is not None
            worst = ep.plan.static_recv
        else:
            kind = words["transport"]
            each = row_bytes(width, torch.float32, metadata_bytes(kind, 2))
            worst = flows.flows(shape).received[kind].worst * each
        found[name] = {"peak": most, "worst": worst}
    carrier.received = make
    return found
