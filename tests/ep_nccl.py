# SPDX-License-Identifier: Apache-2.0
"""What one rank does in test_ep_nccl.py: `ExpertParallel` over csrc/comm, with the stand-in for NCCL, beside gloo."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ep_soak import whole_experts
from ep_workers import TRANSPORTS, experts_of, run_share, share

import moe_kernels as mk
from moe_kernels.expert_parallel import carrier, engine, link
from moe_kernels.expert_parallel.rows import Format
from moe_kernels.nccl import Nccl
from moe_kernels.testing import make_case

E, H, K = 8, 16, 2


def use(library: str | None) -> None:
    """From the next connection on, rows travel by our own communicator over this library; None: by gloo."""
    carrier.libraries = lambda device: library and (library, library)  # type: ignore[assignment, return-value]


SETTINGS: list[dict[str, Any]] = [
    *({"transport": t, "chunks": c} for t, c in itertools.product(TRANSPORTS, (None, 3))),
    {"transport": "rank_dedup", "dispatch_dtype": torch.float8_e4m3fn},
    {"capacity_factor": 1.0},
]


def equals_gloo(rank: int, folder: Path) -> dict[str, Any]:
    """Every transport, forward and backward, bit by bit; rank 1 has no tokens, then nobody has any."""
    world, library = dist.get_world_size(), (folder / "library").read_text()
    found: dict[str, Any] = {"equal": [], "carriers": set(), "orders": {}}
    posted: list[str] = []
    count, post = Nccl.all_to_all, link.Link.post

    def counted(self: Any, *given: Any, **words: Any) -> Any:
        posted.append("nccl")
        return count(self, *given, **words)

    def noted(self: Any, phase: str, start: Any) -> Any:
        posted.append(phase)
        return post(self, phase, start)

    Nccl.all_to_all, link.Link.post = counted, noted  # type: ignore[method-assign]
    for at, words in enumerate(SETTINGS):
        for T in (21, 0):
            case = make_case(T, E=E, K=K, dtype=torch.float32, skew="zipf", seed=at)
            even = "capacity_factor" in words
            mine = slice(T // world * rank, T // world * (rank + 1)) if even else share(T, rank, world)
            results = []
            for lane, path in (("own", library), ("gloo", None)):
                use(path)
                ep = mk.ExpertParallel(experts_of(case), ranks_per_node=max(world // 2, 1), lane=lane, **words)
                posted.clear()
                results.append(run_share(ep, case, mine))
                assert ep.engine.link is not None
                kind = type(ep.engine.link._rows).__name__
                found["carriers"].add((lane, kind))
                assert ("nccl" in posted) == (lane == "own"), (words, lane)
                assert even or ep.engine.trace == engine.schedule(words["chunks"] or 1 if "chunks" in words else 1)
                if lane == "own":
                    found["orders"][at, T] = [step for step in posted if step != "nccl"]
            own, gloo = results
            found["equal"].append(all(torch.equal(own[name], gloo[name]) for name in gloo))
    Nccl.all_to_all, link.Link.post = count, post  # type: ignore[method-assign]
    return found


def alone(rank: int, folder: Path) -> str:
    """One rank lacks the library: all take torch.distributed."""
    use("/nowhere/libnccl.so" if rank == 1 else (folder / "library").read_text())
    ep, whole = mk.ExpertParallel(whole_experts(), transport="flat"), whole_experts()
    given = tokens(rank)
    assert torch.equal(ep(*given), whole(*given))
    assert ep.engine.link is not None
    return type(ep.engine.link._rows).__name__


def tokens(rank: int, T: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every token to one expert: a single product, the same bits wherever it is computed."""
    g = torch.Generator().manual_seed(rank)
    x = torch.randn(T, H, generator=g, dtype=torch.float64)
    return x, torch.rand(T, 1, generator=g, dtype=torch.float64), torch.randint(0, E, (T, 1), generator=g)


@contextlib.contextmanager
def replaced(where: Any, name: str, by: Any) -> Iterator[None]:
    old = getattr(where, name)
    setattr(where, name, by(old))
    try:
        yield
    finally:
        setattr(where, name, old)


def faults(rank: int, folder: Path) -> dict[str, Any]:
    """One fault after the other, each with its own communicator; what each rank was told, and after how long."""
    use((folder / "library").read_text())
    found: dict[str, Any] = {}

    def scene(name: str, plan: str, act: Callable[[mk.ExpertParallel], Any], timeout: float = 1.0) -> None:
        os.environ["NCCL_STANDIN"] = plan
        ep = mk.ExpertParallel(whole_experts(), transport="flat", timeout=timeout, lane=name)
        ep.engine._connected(torch.empty(0))
        dist.barrier()
        began = time.monotonic()
        try:
            act(ep)
            found[name] = None
        except mk.MoECommError as error:
            found[name] = (error.rank, error.field, error.phase, round(time.monotonic() - began, 2), str(error))
            try:
                ep.engine.link.agree({}, [0] * 3, "dispatch")  # type: ignore[union-attr]
            except mk.MoECommError as again:
                found[name + " again"] = again.rank == error.rank
        dist.barrier()

    def step(ep: mk.ExpertParallel) -> None:
        x, weights, ids = tokens(rank)
        x.requires_grad_()
        y = ep(x, weights, ids)
        assert torch.equal(y, whole_experts()(x, weights, ids))
        y.sum().backward()

    def slow_pack(old: Any) -> Any:
        def pack(self: Any, *given: Any) -> Any:
            time.sleep(2.5)
            return old(self, *given)

        return pack

    def late(ep: mk.ExpertParallel) -> None:
        step(ep)
        with replaced(Format, "pack", slow_pack) if rank == 1 else contextlib.nullcontext():
            step(ep)

    def aborted(ep: mk.ExpertParallel) -> None:
        step(ep)
        if rank == 2:
            ep.engine.link._rows.abort()  # type: ignore[union-attr]
        step(ep)

    def unwatched(ep: mk.ExpertParallel) -> None:
        """Nobody waits on the host, as on a GPU: the link notices by itself."""
        own: Any = ep.engine.link
        work, out = own.post("dispatch", lambda: own._rows.all_to_all(torch.ones(3, 8), [1] * 3, [1] * 3))
        own.watch(work, "dispatch", out)
        deadline = time.monotonic() + 4
        while own.broken is None and time.monotonic() < deadline:
            time.sleep(0.01)
        step(ep)

    scene("late to connect", "1:late:0.5", step)
    scene("late", "", late)
    scene("error", "1:error:3", step, timeout=20.0)
    scene("stall", "0:stall:2", step)
    scene("aborted", "", aborted, timeout=20.0)
    scene("watched", "2:stall:1", unwatched)
    scene("stuck abort", "0:stall:2 *:stuck:20", step)
    scene("well", "", step)
    return found
