# SPDX-License-Identifier: Apache-2.0
"""`Link`: the private connection of a group of ranks. Headers, payloads, deadlines; it knows nothing of experts.

Two communicators of its own, so that nobody else's traffic can interleave: one for the headers, over host memory, and
one for the rows (carrier.py). Layers of the same group, timeout and lane share a link.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..schemas import acc_dtype
from . import carrier, header
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
_asked: Counter[tuple[Any, ...]] = Counter()


def connect(ranks: Sequence[int], timeout: float, ranks_per_node: int, lane: str, device: torch.device) -> Link:
    """The link of these global ranks; every one of them has to call. One that all still have is used again."""
    key = (tuple(ranks), timeout, ranks_per_node, lane, device.type)
    link = _links.get(key)
    if link is not None and link.broken:
        link = None
    if len(ranks) > 1 and not _all_have(link, key):
        link = None
    if link is None:
        link = _links[key] = Link(list(ranks), timeout, ranks_per_node, lane, device)
    return link


def _all_have(link: Link | None, key: tuple[Any, ...]) -> bool:
    """Whether every rank has the link yet: one may have let go of the layers that held it, and another not."""
    ranks, timeout = list(key[0]), float(key[1])
    _asked[key] += 1
    name = "_".join(map(str, [*key[0], *key[1:], _asked[key]]))
    store = c10d.PrefixStore(f"moe_kernels/ask/{name}", c10d._get_default_store())
    rank = dist.get_rank()
    store.set(f"rank{rank}", "1")
    having = store.add("have", int(link is not None))
    if store.add("came", 1) == len(ranks):  # the last one knows
        store.set("all", str(int(having == len(ranks))))
    deadline = time.monotonic() + max(timeout, PATIENCE)
    while not store.check(["all"]):
        if link is not None and link.heartbeat is not None and link.heartbeat.alarm():
            raise link._blame("connect", "while asking who has it", False)
        if time.monotonic() > deadline:
            absent = next((r for r in ranks if not store.check([f"rank{r}"])), rank)
            raise MoECommError(absent, "process", "connect", "it did not come")
        time.sleep(0.002)
    return bytes(store.get("all")) == b"1"


class Link:
    """One rank's end of a private group.

    ranks: global ranks in order; position: of this one in it. sent: bytes that the rows took, a (phase, class of link);
    header_bytes: what the headers took besides. owes: a header has promised rows that are not posted yet.
    broken: why it is of no more use, or None. unsaid: the same, found while nobody waited, and not raised yet.
    verdicts: how often all ranks have raised.
    """

    def __init__(self, ranks: list[int], timeout: float, ranks_per_node: int, lane: str, device: torch.device) -> None:
        self.ranks, self.timeout, self.ranks_per_node, self.device = ranks, timeout, ranks_per_node, device
        self.size = len(ranks)
        self.position = ranks.index(dist.get_rank()) if self.size > 1 else 0
        self.sequence, self.pid, self.lock = 0, os.getpid(), threading.RLock()
        self.broken: MoECommError | None = None
        self.unsaid: MoECommError | None = None
        self.under_way: deque[tuple[Any, str, float]] = deque()
        self.sent: Counter[tuple[str, str]] = Counter()
        self.header_bytes, self.verdicts, self.owes = 0, 0, False
        self.heartbeat: Heartbeat | None = None
        self._watcher: threading.Thread | None = None
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
            times = (self.timeout, patience)
            self._headers = carrier.over_gloo(c10d.PrefixStore("headers", store), self.position, self.size, times)
            rows_store = c10d.PrefixStore("rows", store)
            self._rows = carrier.carrier(rows_store, self.position, self.size, times, self.device)
            store.set(f"ready{self.position}", "1")
            for at in range(self.size):
                wait(store, f"ready{at}", at, self.ranks, deadline)
        except MoECommError:
            raise
        except RuntimeError as error:
            raise self._blame("connect", str(error), "did not end within" not in str(error)) from error

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

    def fail_alone(self, phase: str, said: str) -> None:
        """Says in the next exchange that this rank failed, for whom nobody can raise: its own error goes on already."""
        with suppress(MoECommError), self.lock:
            self.agree({"status": 1, "phase": phase}, [0] * self.size, phase, said)

    def guard(self, act: Callable[[], None]) -> Callable[[], None]:
        """`act`, unless all ranks have raised meanwhile and know."""
        before = self.verdicts
        return lambda: act() if self.verdicts == before else None

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
        try:
            header.judge(records, self.ranks, phase)
        except MoECommError:
            self.verdicts += 1
            raise
        return records

    def all_to_all(self, data: Tensor, send: Sequence[int], receive: Sequence[int], phase: str) -> Callable[[], Tensor]:
        """Starts sending send[p] rows of data [sum(send), n] to every position p; the call returned ends it."""
        self._count(phase, [rows * data.shape[1] * data.element_size() for rows in send])
        if self.size == 1:
            return data.clone
        return self._started(phase, lambda: self._rows.all_to_all(data, send, receive))

    def all_gather(self, data: Tensor, phase: str) -> Callable[[], Tensor]:
        """Starts bringing data [R, B], of one shape everywhere, to all: [W*R, B]."""
        self._count(phase, [data.nbytes] * self.size)
        if self.size == 1:
            return data.clone
        return self._started(phase, lambda: self._rows.all_gather(data))

    def reduce_scatter(self, data: Tensor, phase: str) -> Callable[[], Tensor]:
        """Starts summing data [W*R, n] over the ranks; each keeps its part [R, n]."""
        R, n = data.shape[0] // self.size, data.shape[1]
        if self.size > 1 and isinstance(self._rows, carrier.Group) and self._rows.sums:
            group = self._rows
            self._count(phase, [R * n * data.element_size()] * self.size)
            return self._started(phase, lambda: group.reduce_scatter(data))
        ended = self.all_to_all(data, [R] * self.size, [R] * self.size, phase)
        acc = acc_dtype(data.dtype)
        return lambda: ended().view(self.size, R, n).sum(0, dtype=acc).to(data.dtype)

    def _started(self, phase: str, start: Callable[[], carrier.Started]) -> Callable[[], Tensor]:
        work, out = self.post(phase, start)
        return lambda: self.finish(work, phase, out)

    def _count(self, phase: str, sizes: Sequence[int]) -> None:
        node = self.position // self.ranks_per_node
        for at, size in enumerate(sizes):
            if at != self.position:
                self.sent[phase, LINKS[at // self.ranks_per_node == node]] += size

    def post(self, phase: str, start: Callable[[], Any]) -> Any:
        """Starts a collective."""
        if self.broken is not None:
            raise self.broken
        self.owes = False
        if self.heartbeat is not None:
            self.heartbeat.entered += 1
        try:
            return start()
        except RuntimeError as error:
            raise self._blame(phase, str(error)) from error

    def finish(self, work: Any, phase: str, out: Tensor) -> Tensor:
        """Waits for a collective that fills out, no longer than the timeout, and not for a rank that is found dead.

        On a GPU the rows' stream is waited for, not the host; `_watch` then looks after the deadline.
        """
        if out.device.type == "cuda":
            work.wait()
            self.watch(work, phase, out)
        else:
            self._until(work, phase, time.monotonic() + self.timeout)
        return out

    def _until(self, work: Any, phase: str, deadline: float) -> None:
        alarmed = False
        while True:
            try:
                work.wait(POLL)
                return
            except RuntimeError as error:
                polled = carrier.NOT_YET in str(error)  # by this wait; the work itself says it otherwise
                if polled and work.is_completed():
                    continue  # a moment after the wait gave up
                if not polled or alarmed or time.monotonic() > deadline:
                    raise self._blame(phase, str(error), not polled) from error
                alarmed = self.heartbeat is not None and self.heartbeat.alarm()  # what is on its way may still come

    def say(self) -> None:
        """Raises what the watch has found since the last call."""
        error, self.unsaid = self.unsaid, None
        if error is not None:
            raise error

    def watch(self, work: Any, phase: str, out: Tensor) -> None:
        """Looks after an exchange of our own communicator that no host waits for: too late, and it is aborted, so that
        the stream goes on and the next call raises."""
        if not isinstance(work, carrier.Passage) or (out.is_cuda and torch.cuda.is_current_stream_capturing()):
            return  # torch's own has its watchdog; what is captured runs later
        self.under_way.append((work, phase, time.monotonic() + self.timeout))
        if self._watcher is None:
            self._watcher = threading.Thread(target=_watch, args=(weakref.ref(self),), daemon=True)
            self._watcher.start()

    def _blame(self, phase: str, detail: str, own: bool = True) -> MoECommError:
        """The error of a lost connection, with the rank that is its cause; the link is of no use after it."""
        assert self.heartbeat is not None
        at, field, why = self.heartbeat.culprit(own)
        self.broken = MoECommError(self.ranks[at], field, phase, f"{why} ({detail[:160]})")
        if (rows := getattr(self, "_rows", None)) is not None:
            threading.Thread(target=rows.abort, daemon=True).start()  # an abort may hang; nobody waits for it
        return self.broken


def _watch(of: weakref.ref[Link]) -> None:
    """The thread behind `Link.watch`; it ends with its link, or when that has failed."""
    while (link := of()) is not None and link.broken is None:
        if link.under_way:
            work, phase, deadline = link.under_way[0]
            try:
                link._until(work, phase, deadline)
                link.under_way.popleft()
            except MoECommError as error:
                link.unsaid = error
        del link
        time.sleep(POLL.total_seconds() / 10)


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
