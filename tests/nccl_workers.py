# SPDX-License-Identifier: Apache-2.0
"""What the processes of test_nccl.py do, with the stand-in of tests/nccl_standin.cpp for NCCL and CUDA."""

from __future__ import annotations

import ctypes
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from moe_kernels._host import NcclCommunicator

from moe_kernels.nccl import Nccl


def connect(library: str, timeout: float = 60.0) -> Any:
    """A communicator of all ranks, with rank 0's id."""
    W, rank = dist.get_world_size(), dist.get_rank()
    made = NcclCommunicator.unique_id(library, library) if rank == 0 else bytes(128)
    unique = torch.tensor(list(made), dtype=torch.uint8)
    dist.broadcast(unique, 0)
    return NcclCommunicator(W, rank, bytes(unique.tolist()), timeout=timeout, nccl=library, cuda=library)


def table(W: int, seed: int) -> list[list[int]]:
    """Bytes from every rank to every other, many of them 0, some larger than a piece of the stand-in."""
    rng = random.Random(seed)
    return [[rng.choice([0, 0, 1, 7, 100, 20_000, 70_000]) for _ in range(W)] for _ in range(W)]


def payload(source: int, to: int, size: int, seed: int) -> torch.Tensor:
    return ((torch.arange(size) * 31 + source * 7 + to * 13 + seed) % 251).to(torch.uint8)


def post(comm: Any, sizes: list[list[int]], seed: int, stream: int = 0) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Starts one exchange; (work, received, wanted), both buffers live as long as the process."""
    rank, W = comm.rank, comm.world_size
    send = torch.cat([payload(rank, p, sizes[rank][p], seed) for p in range(W)])
    want = torch.cat([payload(p, rank, sizes[p][rank], seed) for p in range(W)])
    receive = torch.full_like(want, 255)
    _alive.extend((send, receive))
    work = comm.all_to_all(send.data_ptr(), sizes[rank], receive.data_ptr(), [row[rank] for row in sizes])
    return work, receive, want


_alive: list[torch.Tensor] = []


def exchange(rank: int, folder: Path) -> dict[str, Any]:
    """Right bytes: one by one, several under way, and the chunked order on two streams."""
    library = (folder / "library").read_text()
    comm = connect(library)
    W, found = comm.world_size, {}
    right = []
    for seed in range(10):
        work, receive, want = post(comm, table(W, seed), seed)
        work.wait(60)
        right.append(torch.equal(receive, want))
    found["one by one"] = right
    under_way = [post(comm, table(W, seed), seed) for seed in range(20, 26)]
    for work, _, _ in reversed(under_way):
        work.wait(60)
    found["under way"] = [torch.equal(receive, want) for _, receive, want in under_way]
    work, receive, want = post(comm, [[0] * W for _ in range(W)], 0)
    work.wait(60)
    found["nothing"] = receive.numel() == 0 and work.done()
    found["chunks"] = [chunked(comm, library, chunks) for chunks in range(1, 9)]
    found["arguments"] = [
        said(lambda: comm.all_to_all(0, [0], 0, [0] * W)),
        said(lambda: comm.all_to_all(0, [-1] + [0] * (W - 1), 0, [0] * W)),
        said(lambda: comm.all_to_all(0, [2**62] * W, 0, [0] * W)),
        said(lambda: comm.all_to_all(0, [r == rank for r in range(W)], 0, [0] * W)),
    ]
    comm.close()
    found["closed"] = said(lambda: post(comm, table(W, 0), 0))
    return found


def order(chunks: int) -> list[tuple[str, int]]:
    """D0 D1 G0 C0 D2 G1 C1 ...: of dispatch, product and combine, a function of the number of chunks alone."""
    steps = [("D", 0)]
    for i in range(chunks):
        steps += [("D", i + 1)] * (i + 1 < chunks) + [("G", i), ("C", i)]
    return steps


def chunked(comm: Any, library: str, chunks: int) -> bool:
    """Each chunk goes to the next rank, which adds 1 on its own stream after a random while, and comes back."""
    add = ctypes.CDLL(library).standin_add
    add.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int64, ctypes.c_void_p]
    W, rank = comm.world_size, comm.rank
    rows = [torch.arange(50.0 * (1 + i), dtype=torch.float64) + 1000 * rank for i in range(chunks)]
    there, back = [torch.zeros_like(r) for r in rows], [torch.zeros_like(r) for r in rows]
    rng, works = random.Random(chunks * 100 + rank), {}
    forth = [row.numel() * 8 for row in rows]
    for step, i in order(chunks):
        to = lambda peer: [forth[i] if p == peer % W else 0 for p in range(W)]  # noqa: E731, B023
        if step == "D":
            works[step, i] = comm.all_to_all(rows[i].data_ptr(), to(rank + 1), there[i].data_ptr(), to(rank - 1))
        elif step == "G":
            works["D", i].join(0)  # the compute stream; no host waits
            add(there[i].data_ptr(), there[i].numel(), 1.0, rng.randrange(3000), None)
        else:
            works[step, i] = comm.all_to_all(there[i].data_ptr(), to(rank - 1), back[i].data_ptr(), to(rank + 1))
    for i in range(chunks):
        works["C", i].wait(60)
    return all(torch.equal(b, r + 1) for b, r in zip(back, rows))


def said(call: Callable[[], Any]) -> str:
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def faults(rank: int, folder: Path) -> dict[str, Any]:
    """One fault after the other, each with its own communicator; what each rank was told."""
    library = (folder / "library").read_text()
    found: dict[str, Any] = {}
    W = dist.get_world_size()
    even = [[8] * W for _ in range(W)]

    def scene(name: str, plan: str, call: Callable[[], Any]) -> None:
        os.environ["NCCL_STANDIN"] = plan
        dist.barrier()
        began = time.monotonic()
        found[name] = said(call)
        found[name + " s"] = time.monotonic() - began
        dist.barrier()

    def exchanges(*tables: list[list[int]], timeout: float = 60.0, connecting: float = 60.0) -> Any:
        comm = connect(library, connecting)
        for seed, sizes in enumerate(tables):
            work, receive, want = post(comm, sizes, seed)
            work.wait(timeout)
            assert torch.equal(receive, want)
        return comm

    def wrong_size() -> None:
        comm = connect(library, 60.0)
        sizes = [list(row) for row in even]
        sizes[0][1] += rank == 1  # rank 1 alone believes that it gets a byte more
        post(comm, sizes, 0)[0].wait(5.0)

    def absent() -> None:
        comm = connect(library, 1.0)
        if rank != 2:
            kept.append(comm)
            post(comm, even, 0)[0].wait(1.0)

    def swapped() -> None:
        comm = connect(library, 60.0)
        one, two = even, [[16] * W for _ in range(W)]
        works = [post(comm, sizes, 0)[0] for sizes in ((two, one) if rank == 1 else (one, two))]
        for work in works:
            work.wait(5.0)

    kept: list[Any] = []
    scene("late", "1:late:0.5", lambda: exchanges(even))
    scene("too late", "2:late:1000", lambda: exchanges(connecting=1.0))
    scene("wrong size", "", wrong_size)
    scene("absent", "", absent)
    found["after"] = said(lambda: post(kept[0], even, 0)) if kept else ""
    scene("error", "1:error:2", lambda: exchanges(even, even, timeout=1.0))
    scene("stall", "0:stall:1", lambda: exchanges(even, timeout=1.0))
    scene("stuck", "*:stuck:20", absent)
    scene("swapped", "", swapped)
    scene("again", "", lambda: exchanges(even, even))
    os.environ["NCCL_STANDIN"] = ""
    found["fork"] = forked(exchanges(even))
    dist.barrier()
    return found


def forked(comm: Any) -> list[str]:
    """What a child hears that uses, and lets go of, its parent's communicator; then the parent uses it."""
    even = [[8] * comm.world_size for _ in range(comm.world_size)]
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        text = said(lambda: comm.all_to_all(0, [0] * comm.world_size, 0, [0] * comm.world_size))
        os.write(write, (text + "|" + said(comm.abort)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    text = os.read(read, 4096).decode()
    work, receive, want = post(comm, even, 3)
    work.wait(60)
    return [*text.split("|"), str(torch.equal(receive, want))]


def tensors(rank: int, folder: Path) -> dict[str, Any]:
    """`Nccl`: rows of several dtypes, refusals, and a rank without the library."""
    library = (folder / "library").read_text()
    nccl, found = Nccl(timeout=60.0, nccl=library, cuda=library), {}
    W = nccl.world_size
    counts = [[(source * 3 + to) % 4 for to in range(W)] for source in range(W)]
    send, receive = counts[rank], [row[rank] for row in counts]

    def rows_of(source: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """What a rank sends to each."""
        make = lambda to: torch.arange(counts[source][to] * 6).view(-1, 2, 3) + 100 * source + 10 * to  # noqa: E731
        return [make(to).to(dtype) for to in range(W)]

    for dtype in (torch.bfloat16, torch.float64, torch.uint8, torch.float8_e4m3fn):
        moving = nccl.all_to_all(torch.cat(rows_of(rank, dtype)), send, receive)
        came = moving.wait(60.0)
        want = torch.cat([rows_of(source, dtype)[rank] for source in range(W)])
        found[str(dtype)] = torch.equal(came.view(torch.uint8), want.view(torch.uint8)) and moving.done()
    strided = torch.cat(rows_of(rank, torch.float64)).transpose(1, 2).contiguous().transpose(1, 2)
    came = nccl.all_to_all(strided, send, receive).wait(60.0)
    found["strided"] = torch.equal(came, torch.cat([rows_of(source, torch.float64)[rank] for source in range(W)]))
    x = torch.zeros(sum(send), 2)
    found["refused"] = [
        said(lambda: nccl.all_to_all(x, [0] * W, receive)),
        said(lambda: nccl.all_to_all(x, send[1:], receive)),
        said(lambda: nccl.all_to_all(x, send, [-1] * W)),
    ]
    nccl.close()
    found["closed"] = said(lambda: nccl.all_to_all(x, send, receive))
    missing = "/nowhere/libnccl.so" if rank == W - 1 else library
    found["missing"] = said(lambda: Nccl(timeout=5.0, nccl=missing, cuda=library))
    return found
