# SPDX-License-Identifier: Apache-2.0
"""The fault drill: real ranks are killed, stopped, made to fail or to disagree, over and over; what survivors say.

    python tests/ep_drill.py kill --trials 100 --world 4

A parent that never connects hosts the store, forks the ranks of a trial before any of them has a thread, and does the
killing. It prints one line of JSON a trial: the fault and, for every survivor, the error, how long after the fault it
came, whether the survivors' new group gave the right result, and the exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import closeness
import torch
import torch.distributed as dist

import moe_kernels as mk
from moe_kernels.expert_parallel import carrier, header, hops
from moe_kernels.layers import Experts
from moe_kernels.planning import owners

E, H, I, K, T = 8, 16, 8, 3, 16
TRANSPORTS = ("flat", "rank_dedup", "two_level", "allgather")
Say = Callable[..., None]


def experts() -> Experts:
    torch.manual_seed(0)
    return Experts(H, I, E, dtype=torch.float64)


def inputs(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1000 * step + rank)
    ids = torch.rand(T, E, generator=g).argsort(1)[:, :K].int()
    return torch.randn(T, H, generator=g, dtype=torch.float64), torch.rand(T, K, generator=g, dtype=torch.float64), ids


def step_is_right(ep: mk.ExpertParallel, whole: Experts, rank: int, step: int) -> bool:
    """One forward and backward, compared with a single process on the experts that the placement still has."""
    x, weights, ids = inputs(rank, step)
    twin = x.clone().requires_grad_()
    x.requires_grad_()
    y = ep(x, weights, ids)
    y.square().sum().backward()
    gone = ep.engine.owner[ids.long()] < 0
    expected = whole(twin, weights, torch.where(gone, -1, ids))
    expected.square().sum().backward()
    pairs = ((y, expected), (x.grad, twin.grad))
    return all(closeness.within(a, b, *closeness.experts(H, I, K)) for a, b in pairs)  # type: ignore[arg-type]


def failure(error: mk.MoECommError) -> dict[str, Any]:
    return {"rank": error.rank, "field": error.field, "phase": error.phase, "text": str(error), "at": time.monotonic()}


def rank_main(job: dict[str, Any], rank: int, say: Say) -> None:
    """Steps until something is wrong, then, with the others that live, a new group and a right step."""
    whole, ranks = experts(), list(range(job["world"]))
    if job["nccl"]:
        carrier.libraries = lambda device: (job["nccl"], job["nccl"])
    named = {"transport": job["transport"], "chunks": job["chunks"]}
    kind = {"capacity_factor": 8.0} if job["transport"] == "static" else named
    words: dict[str, Any] = kind | {"timeout": job["timeout"], "ranks_per_node": 2}
    ep = mk.ExpertParallel(experts(), ranks, **words)
    say(ready=step_is_right(ep, whole, rank, 0))
    try:
        for step in range(1, 100_000):
            if job["fault"] in FAULTS and rank == job["victim"] and step == 3:
                with FAULTS[job["fault"]](ep):
                    say(began=time.monotonic())
                    step_is_right(ep, whole, rank, step)
            else:
                step_is_right(ep, whole, rank, step)
    except mk.MoECommError as error:
        say(**failure(error))
    except ValueError as error:  # of its own backward: autograd hands it on as it is
        say(**failure(mk.MoECommError(rank, "error", "dispatch backward", str(error))))
    if job["fault"] in FAULTS and job["fault"] not in BREAKING:  # the same group goes on
        say(again=step_is_right(ep, whole, rank, 1))
        return
    del ep
    if job["fault"] in BREAKING or rank == job["victim"]:
        return
    alive = [r for r in ranks if r != job["victim"]]
    owner = owners(E, len(ranks)).tolist()
    new = [alive.index(r) if r in alive else -1 for r in owner]
    ep = mk.ExpertParallel(experts(), alive, placement=new, **(words | {"ranks_per_node": 1, "timeout": 10.0}))
    say(rebuilt=step_is_right(ep, whole, rank, 2))


class Grumble(torch.autograd.Function):
    """Nothing in the forward, an exception in the backward."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        return y + 0

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> torch.Tensor:
        raise ValueError("planted")


class Replaced:
    """Something of the package replaced for one step."""

    def __init__(self, where: Any, name: str, by: Callable[[Any], Any]) -> None:
        self.where, self.name, self.old = where, name, getattr(where, name)
        self.by = by(self.old)

    def __enter__(self) -> None:
        setattr(self.where, self.name, self.by)

    def __exit__(self, *_: Any) -> None:
        setattr(self.where, self.name, self.old)


def raising(*_: Any, **__: Any) -> Any:
    raise ValueError("planted")


def record_with(**changed: Any) -> Callable[[Any], Any]:
    """A header in which fields differ; `counts` is added to the first count."""
    counts = changed.pop("counts", 0)

    def of(encode: Any) -> Any:
        def changed_encode(fields: dict[str, Any], sent: Any, text: str = "") -> Any:
            return encode(fields | changed, [sent[0] + counts, *sent[1:]], text)

        return changed_encode

    return of


def header_fault(**changed: Any) -> Callable[[mk.ExpertParallel], Replaced]:
    return lambda ep: Replaced(header, "encode", record_with(**changed))


FAULTS: dict[str, Callable[[mk.ExpertParallel], Any]] = {
    "error": lambda ep: Replaced(ep.engine, "_checked", lambda old: raising),
    "experts": lambda ep: Replaced(ep.experts, "forward", lambda old: raising),
    "backward": lambda ep: Replaced(ep.experts, "forward", lambda old: lambda *given: Grumble.apply(old(*given))),
    "hidden": header_fault(hidden=H + 8),
    "dtype": header_fault(dtype="torch.float32"),
    "version": header_fault(version=header.VERSION + 1),
    "top_k": header_fault(top_k=K + 1),
    "experts_count": header_fault(experts=E * 2),
    "counts": header_fault(counts=2**62),
    "negative": header_fault(counts=-(2**40)),
    "rows": header_fault(rows=-1),
    "pack": lambda ep: Replaced(hops.Format, "pack", lambda old: raising),
}
FIELD = {"experts": "error", "backward": "error", "experts_count": "experts", "negative": "counts", "pack": "error"}
BREAKING = ("pack",)


def child(job: dict[str, Any], rank: int, port: int, out: int) -> None:
    """A rank's process, from its fork to its exit."""

    def say(**what: Any) -> None:
        os.write(out, (json.dumps(what) + "\n").encode())

    code = 0
    try:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.set_num_threads(1)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
        store = dist.PrefixStore(job["name"], store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=job["world"])
        rank_main(job, rank, say)
        gc.collect()
        if job["fault"] in FAULTS and job["fault"] not in BREAKING:
            dist.barrier()
    except BaseException:
        say(crash=traceback.format_exc()[-2000:])
        code = 1
    os._exit(code)


def trial(job: dict[str, Any], port: int) -> dict[str, Any]:
    """Forks the ranks, does the deed, gathers what they say. Nobody outlives the deadline."""
    pipes, pids = [], []
    for rank in range(job["world"]):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            child(job, rank, port, write)
        os.close(write)
        os.set_blocking(read, False)
        pipes.append(read)
        pids.append(pid)
    said: list[bytes] = [b""] * job["world"]
    codes: dict[int, int] = {}
    deadline, due, fault_at = time.monotonic() + 60 + 4 * job["timeout"], float("inf"), None
    victim, deed = job["victim"], {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}.get(job["fault"])
    while len(codes) < job["world"] and time.monotonic() < deadline:
        for rank, pipe in enumerate(pipes):
            with contextlib.suppress(BlockingIOError):
                said[rank] += os.read(pipe, 65536)
        if due == float("inf") and all(b'"ready"' in text for text in said):
            due = time.monotonic() + job["delay"]
        if deed is not None and fault_at is None and time.monotonic() >= due:
            os.kill(pids[victim], deed)
            fault_at = time.monotonic()
        for rank, pid in enumerate(pids):
            if rank not in codes and os.waitpid(pid, os.WNOHANG)[0]:
                codes[rank] = 0
        if deed == signal.SIGSTOP and victim not in codes and len(codes) == job["world"] - 1:
            os.kill(pids[victim], signal.SIGKILL)
        time.sleep(0.002)
    return _gathered(job, pipes, pids, said, codes, fault_at)


def _gathered(job: dict[str, Any], pipes: list[int], pids: list[int], said: list[bytes], codes: dict[int, int],
              fault_at: float | None) -> dict[str, Any]:  # fmt: skip
    late = [rank for rank in range(job["world"]) if rank not in codes]
    for rank in late:
        os.kill(pids[rank], signal.SIGKILL)
        os.waitpid(pids[rank], 0)
    facts: list[dict[str, Any]] = []
    for rank, pipe in enumerate(pipes):
        with contextlib.suppress(BlockingIOError):
            said[rank] += os.read(pipe, 65536)
        os.close(pipe)
        known: dict[str, Any] = {}
        for line in said[rank].decode().splitlines():
            known |= json.loads(line)
        facts.append(known)
    began = fault_at or facts[job["victim"]].get("began", 0.0)
    for known in facts:
        if "at" in known:
            known["seconds"] = round(known.pop("at") - began, 4)
    return {"job": job, "late": late, "ranks": facts}


def faults_of(result: dict[str, Any]) -> list[str]:
    """What is wrong with a trial; nothing, if the drill was passed."""
    job, wrong = result["job"], []
    limit = {"kill": 2.0, "stop": job["timeout"] + 1.0}.get(job["fault"], 1.0)
    field = FIELD.get(job["fault"], job["fault"])
    for rank, known in enumerate(result["ranks"]):
        killed = rank == job["victim"] and job["fault"] in ("kill", "stop")
        if killed:
            continue
        if rank in result["late"]:
            wrong.append(f"rank {rank} hung: {known}")
        elif "crash" in known or not known.get("ready"):
            wrong.append(f"rank {rank} crashed: {known.get('crash')}")
        elif known.get("rank") != job["victim"]:
            wrong.append(f"rank {rank} names {known.get('rank')}, not {job['victim']}: {known.get('text')}")
        elif known["seconds"] > limit:
            wrong.append(f"rank {rank} took {known['seconds']} s of {limit}")
        elif job["fault"] in FAULTS and known["field"] != field:
            wrong.append(f"rank {rank} names field {known['field']}, not {field}")
        elif job["fault"] in FAULTS and job["fault"] not in BREAKING and not known.get("again"):
            wrong.append(f"rank {rank}: the group is of no use afterwards")
        elif job["fault"] in ("kill", "stop") and not known.get("rebuilt"):
            wrong.append(f"rank {rank}: no new group, or a wrong result")
    return wrong


def jobs(fault: str, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Trials of one fault: victim, transport and the moment drawn anew each time."""
    world, seed, kinds = asked.world, asked.seed, asked.transports.split(",")
    draw, name = random.Random(f"{seed} {fault}"), f"{os.getpid()} {time.monotonic_ns()}"
    timeout = asked.timeout if fault == "stop" else 20.0
    return [
        {"fault": fault, "world": world, "timeout": timeout, "victim": draw.randrange(world), "name": f"{name} {i}",
         "transport": kinds[(i + seed) % len(kinds)], "chunks": 1 + i % 3, "delay": draw.random() * 0.3,
         "nccl": asked.nccl}
        for i in range(asked.trials)
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("faults", nargs="+", choices=["kill", "stop", *FAULTS])
    parser.add_argument("--trials", type=int, default=1)
    parser.add_argument("--world", type=int, default=4)
    parser.add_argument("--timeout", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nccl", default="", metavar="FILE", help="rows over csrc/comm and this stand-in")
    parser.add_argument("--transports", default=",".join(TRANSPORTS), help='in turn; "static" for a static capacity')
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        port, host = host_store(Path(folder))
        try:
            bad = 0
            for fault in asked.faults:
                for job in jobs(fault, asked):
                    result = trial(job, port)
                    result["wrong"] = faults_of(result)
                    bad += bool(result["wrong"])
                    print(json.dumps(result), flush=True)
        finally:
            os.kill(host, signal.SIGKILL)
            os.waitpid(host, 0)
    return min(bad, 100)


def host_store(folder: Path) -> tuple[int, int]:
    """A process that hosts the store and does nothing else, so that this one stays without threads: (port, pid)."""
    where, pid = folder / "port", os.fork()
    if pid == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        (folder / "port.part").write_text(str(store.port))
        (folder / "port.part").rename(where)
        while os.getppid() != 1:
            time.sleep(1)
        os._exit(0)
    while not where.exists():
        time.sleep(0.01)
    return int(where.read_text()), pid


if __name__ == "__main__":
    sys.exit(main())
