# SPDX-License-Identifier: Apache-2.0
"""What carries the rows of a link: our own communicator over NCCL (csrc/comm), else a process group of torch.

Both start an exchange and return (work, out): out is complete once `work` is waited for, a little at a time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..nccl import Exchange, Nccl, NcclMissingError

c10d: Any = dist.distributed_c10d

NOT_YET = "Operation timed out!"
"""in the text of a wait that gave up before the work ended; gloo's own words"""

Started = tuple[Any, Tensor]


def libraries(device: torch.device) -> tuple[str, str] | None:
    """Paths of NCCL and of CUDA's runtime, "" for those that torch has loaded; None: rows of this device do without."""
    return ("", "") if device.type == "cuda" else None


def carrier(store: Any, position: int, size: int, timeouts: tuple[float, float], device: torch.device) -> Own | Group:
    """Every rank calls it, and all get the same kind: one rank without NCCL's library, and none has it.

    timeouts: of an exchange, and of connecting. store: of this link, with keys never used before.
    """
    timeout, patience = timeouts
    if (paths := libraries(device)) is not None:
        try:
            own = Nccl.over(c10d.PrefixStore("own", store), position, size, timeout=patience, nccl=paths[0],
                            cuda=paths[1])  # fmt: skip
            own.communicator.set_timeout(timeout)
            return Own(own)
        except NcclMissingError:
            pass
    if device.type == "cuda":
        options = c10d.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=timeout)
        return Group(c10d.ProcessGroupNCCL(store, position, size, options), size, True)
    return Group(over_gloo(store, position, size, timeouts), size, False)


def over_gloo(store: Any, position: int, size: int, timeouts: tuple[float, float]) -> Any:
    """A process group that may take longer to connect than any exchange may take."""
    found = c10d.ProcessGroupGloo(store, position, size, timedelta(seconds=timeouts[1]))
    found.set_timeout(timedelta(seconds=timeouts[0]))
    return found


def received(data: Tensor, rows: int) -> Tensor:
    """The buffer that rows arrive in, on the current stream. The one place where one is made."""
    return data.new_empty(rows, *data.shape[1:])


class Group:
    """A process group of torch. sums: it has a reduce-scatter worth its name; gloo's sends more than the all-to-all of
    the parts, and its wait knows no deadline."""

    def __init__(self, group: Any, size: int, sums: bool) -> None:
        self.group, self.size, self.sums = group, size, sums

    def all_to_all(self, data: Tensor, send: Sequence[int], receive: Sequence[int]) -> Started:
        out = received(data, sum(receive))
        return self.group.alltoall_base(out, data, list(receive), list(send)), out

    def all_gather(self, data: Tensor) -> Started:
        out = received(data, self.size * data.shape[0])
        return self.group._allgather_base(out, data), out

    def reduce_scatter(self, data: Tensor) -> Started:
        out = received(data, data.shape[0] // self.size)
        return self.group._reduce_scatter_base(out, data), out

    def abort(self) -> None:
        """The group has its own watchdog."""


class Own:
    """Our communicator over NCCL, on its own stream."""

    def __init__(self, nccl: Nccl) -> None:
        self.nccl, self.size = nccl, nccl.world_size

    def all_to_all(self, data: Tensor, send: Sequence[int], receive: Sequence[int]) -> Started:
        out = received(data, sum(receive))
        return Passage(self.nccl.all_to_all(data, send, receive, out=out)), out

    def all_gather(self, data: Tensor) -> Started:
        return self.all_to_all(data.repeat(self.size, 1), *[[data.shape[0]] * self.size] * 2)

    def abort(self) -> None:
        self.nccl.abort()


class Passage:
    """An exchange of `Own` under the calls of torch's works."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange

    def is_completed(self) -> bool:
        try:
            return self.exchange.done()
        except RuntimeError:  # the next wait says it
            return False

    def wait(self, longest: timedelta | None = None) -> None:
        """On the host for no longer than this; without a time the current stream waits, and the host does not."""
        if longest is None:
            self.exchange.rows()
            return
        until = time.monotonic() + longest.total_seconds()
        while not self.exchange.done():
            if time.monotonic() > until:
                raise RuntimeError(NOT_YET)
            time.sleep(5e-5)
