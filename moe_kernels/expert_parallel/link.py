# SPDX-License-Identifier: Apache-2.0
"""`Link`: the private connection of a group of ranks. Headers, payloads, deadlines; it knows nothing of experts.

Two communicators of its own, so that nobody else's traffic can interleave: one for the headers, over host memory, and
one for the rows. Layers of the same group, timeout and lane share a link.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..schemas import acc_dtype
from . import header
from .faults import LOCAL_ERRORS, MoECommError
from .heartbeat import FAILED, Heartbeat, wait

c10d: Any = dist.distributed_c10d

POLL = timedelta(milliseconds=100)
PATIENCE = 60.0
"""seconds that ranks may come apart when they connect, where the timeout is less"""
LINKS = ("nic", "nvlink")
"""between nodes, inside a node: the classes that bytes are counted by"""

_links: weakref.WeakValueDictionary[tuple[Any, ...], Link] = weakref.WeakValueDictionary()
_made: Counter[tuple[int, ...]] = Counter()


def connect(ranks: Sequence[int], timeout: float, ranks_per_node: int, lane: str, device: torch.device) -> Link:
    """The link of these global ranks, made at the first call; every one of them has to call."""
    key = (tuple(ranks), timeout, ranks_per_node, lane, device.type)
    link = _links.get(key)
    if link is None or link.broken:
        link = _links[key] = Link(list(ranks), timeout, ranks_per_node, lane, device)
    return link


class Link:
    """One rank's end of a private group.

    ranks: global ranks in order; position: of this one in it. sent: bytes that the rows took, a (phase, class of link);
    header_bytes: what the headers took besides. owes: a header has promised rows that are not posted yet.
    broken: why it is of no more use, or None.
    """

    def __init__(self, ranks: list[int], timeout: float, ranks_per_node: int, lane: str, device: torch.device) -> None:
        self.ranks, self.timeout, self.ranks_per_node, self.device = ranks, timeout, ranks_per_node, device
        self.size = len(ranks)
        self.position = ranks.index(dist.get_rank()) if self.size > 1 else 0
        self.sequence, self.pid, self.lock = 0, os.getpid(), threading.RLock()
        self.broken: MoECommError | None = None
        self.sent: Counter[tuple[str, str]] = Counter()
        self.header_bytes, self.owes = 0, False
        self.heartbeat: Heartbeat | None = None
        if self.size > 1:
            self._connect(lane)

    def _connect(self, lane: str) -> None:
        _made[tuple(self.ranks)] += 1  # a key of the store is never used twice
        name = "_".join(map(str, [*self.ranks, lane, _made[tuple(self.ranks)]]))
        root = c10d._get_default_store()
        store = c10d.PrefixStore(f"moe_kernels/{name}", root)
        patience = max(self.timeout, PATIENCE)
        deadline = time.monotonic() + patience
        self.heartbeat = Heartbeat(store, self.position, self.ranks, (self.timeout, patience), _own_address(root))
        weakref.finalize(self, self.heartbeat.close)
        _heartbeats.add(self.heartbeat)
        try:
            self._headers = self._gloo(c10d.PrefixStore("headers", store), patience)
            rows_store = c10d.PrefixStore("rows", store)
            if self.device.type == "cuda":
                options = c10d.ProcessGroupNCCL.Options()
                options._timeout = timedelta(seconds=self.timeout)
                self._rows: Any = c10d.ProcessGroupNCCL(rows_store, self.position, self.size, options)
            else:
                self._rows = self._gloo(rows_store, patience)
            store.set(f"ready{self.position}", "1")
            for at in range(self.size):
                wait(store, f"ready{at}", at, self.ranks, deadline)
        except MoECommError:
            raise
        except RuntimeError as error:
            raise self._blame("connect", str(error)) from error

    def _gloo(self, store: Any, patience: float) -> Any:
        """A communicator that may take longer to connect than any exchange may take."""
        found = c10d.ProcessGroupGloo(store, self.position, self.size, timedelta(seconds=patience))
        found.set_timeout(timedelta(seconds=self.timeout))
        return found

    @contextmanager
    def turn(self, phase: str, report: Callable[[Exception], None] | None = None) -> Iterator[None]:
        """One thread's use of the link. An error inside is told to all ranks at the next header, and all raise."""
        if os.getpid() != self.pid:
            raise RuntimeError("ExpertParallel: this process was forked from the one that connected; "
                               "make the layer in the process that uses it")  # fmt: skip
        with self.lock:
            if self.broken is not None:
                raise self.broken
            try:
                yield
            except MoECommError:
                raise
            except LOCAL_ERRORS as error:
                if self.size > 1:
                    (report or (lambda e: self.report(e, phase)))(error)
                raise MoECommError(self.ranks[self.position], "error", phase, _said(error)) from error

    def report(self, error: Exception, phase: str) -> None:
        """Takes part in the next exchange only to say that this rank cannot; raises what all raise.

        Where the others wait for rows already, the heartbeat tells them, and the link is of no more use.
        """
        if self.owes and self.heartbeat is not None:
            self.heartbeat.tell(FAILED, self.position, "error")
            self.broken = MoECommError(self.ranks[self.position], "error", phase, _said(error))
            raise self.broken from error
        try:
            self.agree({"status": 1, "phase": phase}, [0] * self.size, phase, _said(error))
        except MoECommError as verdict:
            raise verdict from error

    def agree(
        self, fields: dict[str, header.Value], counts: Sequence[int], phase: str, text: str = ""
    ) -> list[list[int]]:
        """Exchanges records and judges them. Returns every rank's record; raises MoECommError on all ranks or none."""
        self.sequence += 1
        record = header.encode({"sequence": self.sequence, "phase": phase, **fields}, counts, text)
        if self.size == 1:
            records = [record]
        else:
            found = torch.empty(self.size * len(record), dtype=torch.int64)
            mine = torch.tensor(record, dtype=torch.int64)
            self.finish(self.post(phase, lambda: self._headers._allgather_base(found, mine)), phase, found)
            self.header_bytes += mine.nbytes * (self.size - 1)
            records = found.view(self.size, -1).tolist()
        header.judge(records, self.ranks, phase)
        return records

    def all_to_all(self, data: Tensor, send: Sequence[int], receive: Sequence[int], phase: str) -> Callable[[], Tensor]:
        """Starts sending send[p] rows of data [sum(send), n] to every position p; the call returned ends it."""
        out = data.new_empty(sum(receive), data.shape[1])
        self._count(phase, [rows * data.shape[1] * data.element_size() for rows in send])
        if self.size == 1:
            return lambda: out.copy_(data)
        work = self.post(phase, lambda: self._rows.alltoall_base(out, data, list(receive), list(send)))
        return lambda: self.finish(work, phase, out)

    def all_gather(self, data: Tensor, phase: str) -> Callable[[], Tensor]:
        """Starts bringing data [R, B], of one shape everywhere, to all: [W*R, B]."""
        out = data.new_empty(self.size * data.shape[0], *data.shape[1:])
        self._count(phase, [data.nbytes] * self.size)
        if self.size == 1:
            return lambda: out.copy_(data)
        work = self.post(phase, lambda: self._rows._allgather_base(out, data))
        return lambda: self.finish(work, phase, out)

    def reduce_scatter(self, data: Tensor, phase: str) -> Callable[[], Tensor]:
        """Starts summing data [W*R, n] over the ranks; each keeps its part [R, n].

        gloo's own sends more than that, and its wait knows no deadline: there the parts are exchanged and summed here.
        """
        R, n = data.shape[0] // self.size, data.shape[1]
        if self.size > 1 and data.device.type == "cuda":
            out = data.new_empty(R, n)
            self._count(phase, [out.nbytes] * self.size)
            work = self.post(phase, lambda: self._rows._reduce_scatter_base(out, data))
            return lambda: self.finish(work, phase, out)
        ended = self.all_to_all(data, [R] * self.size, [R] * self.size, phase)
        acc = acc_dtype(data.dtype)
        return lambda: ended().view(self.size, R, n).sum(0, dtype=acc).to(data.dtype)

    def _count(self, phase: str, sizes: Sequence[int]) -> None:
        node = self.position // self.ranks_per_node
        for at, size in enumerate(sizes):
            if at != self.position:
                self.sent[phase, LINKS[at // self.ranks_per_node == node]] += size

    def post(self, phase: str, start: Callable[[], Any]) -> Any:
        """Starts a collective."""
        self.owes = False
        if self.heartbeat is not None:
            self.heartbeat.entered += 1
        try:
            return start()
        except RuntimeError as error:
            raise self._blame(phase, str(error)) from error

    def finish(self, work: Any, phase: str, out: Tensor) -> Tensor:
        """Waits for a collective that fills out, no longer than the timeout, and not for a rank that is found dead.

        On a GPU the rows' stream is waited for, not the host; work that never ends is then found by NCCL's watchdog.
        """
        if out.device.type == "cuda":
            work.wait()
            return out
        deadline, alarmed = time.monotonic() + self.timeout, False
        while True:
            try:
                work.wait(POLL)
                return out
            except RuntimeError as error:
                polled = "Operation timed out!" in str(error)  # by this wait; the work itself says it otherwise
                if polled and work.is_completed():
                    continue  # a moment after the wait gave up
                if not polled or alarmed or time.monotonic() > deadline:
                    raise self._blame(phase, str(error)) from error
                alarmed = self.heartbeat is not None and self.heartbeat.alarm()  # what is on its way may still come

    def _blame(self, phase: str, detail: str) -> MoECommError:
        """The error of a lost connection, with the rank that is its cause; the link is of no use after it."""
        assert self.heartbeat is not None
        at, field, why = self.heartbeat.culprit()
        self.broken = MoECommError(self.ranks[at], field, phase, f"{why} ({detail[:160]})")
        return self.broken


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _own_address(store: Any) -> str:
    """The address of this machine that leads to the store's; the loopback device for a store that is a file."""
    while isinstance(store, c10d.PrefixStore):
        store = store.underlying_store
    host = getattr(store, "host", None)
    if host is None:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((socket.gethostbyname(host), 9))
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostbyname(socket.gethostname())


_heartbeats: weakref.WeakSet[Heartbeat] = weakref.WeakSet()


def _after_fork() -> None:
    """A child lets go of the sockets, or its parent's death would go unseen until its own."""
    for heartbeat in _heartbeats:
        heartbeat.close(farewell=False)


os.register_at_fork(after_in_child=_after_fork)
