# SPDX-License-Identifier: Apache-2.0
"""`Nccl`: an all-to-all of rows over a NCCL communicator of our own, with deadlines (csrc/comm).

    nccl = Nccl(group)                                      # on every rank
    moving = nccl.all_to_all(rows, send, receive)           # starts; the host goes on
    ...                                                     # kernels of the current stream run beside it
    came = moving.rows()                                    # the current stream waits for it, the host does not

Its calls cannot interleave with those of torch.distributed, and a peer that is late or gone ends in an error within the
timeout. The sizes have to be agreed upon before: rows that were not announced are an error at best.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import check

c10d: Any = dist.distributed_c10d
_made: Counter[tuple[int, ...]] = Counter()


class Exchange:
    """One all-to-all under way. Keeps both buffers until the rows have come, or the current stream waits for them."""

    def __init__(self, work: Any, sent: Tensor, came: Tensor) -> None:
        self._work, self._sent, self._came, self._settled = work, sent, came, False
        _abandoned[:] = [left for left in _abandoned if not _over(left[0])]

    def done(self) -> bool:
        """Whether the rows have come. RuntimeError if the communicator failed."""
        self._settled = self._settled or bool(self._work.done())
        return self._settled

    def wait(self, timeout: float) -> Tensor:
        """The rows, after waiting for them on the host. RuntimeError after so many seconds."""
        self._work.wait(timeout)
        self._settled = True
        return self._came

    def rows(self) -> Tensor:
        """The rows, for work on the current stream, which waits for them."""
        self._work.join(_stream(self._came))
        self._settled = True
        return self._came

    def __del__(self) -> None:
        if not self._settled and not _over(self._work):
            _abandoned.append((self._work, self._sent, self._came))


_abandoned: list[tuple[Any, Tensor, Tensor]] = []
"""exchanges that nobody waits for and that have not come to an end: their memory is nobody else's yet"""


def _over(work: Any) -> bool:
    try:
        return bool(work.done())
    except RuntimeError:  # it failed, or this is a forked child: what is left of it may still write
        return False


class NcclMissingError(RuntimeError):
    """A rank has no NCCL, no CUDA runtime or no compiled library: raised by all of them."""


class Nccl:
    """Joins the ranks of a process group in a communicator of our own. Every one of them has to make it.

    Args:
        group: None: all ranks. Of any backend: only its store is used, for the communicator's id.
        timeout: seconds for connecting, and for posting an exchange.
        nccl, cuda: paths of libnccl and libcudart; "" for those that torch has loaded.

    Errors: RuntimeError on every rank, naming the rank at which a library is missing, or the time that ran out.
    """

    def __init__(self, group: Any = None, *, timeout: float = 30.0, nccl: str = "", cuda: str = "") -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("Nccl: needs a process group: call torch.distributed.init_process_group first")
        ranks = tuple(dist.get_process_group_ranks(group))
        _made[ranks] += 1  # a key of the store is never used twice
        name = "_".join(map(str, (*ranks, _made[ranks])))
        store = c10d.PrefixStore(f"moe_kernels/nccl/{name}", c10d._get_default_store())
        self._join(store, dist.get_rank(group), len(ranks), timeout, (nccl, cuda))

    @classmethod
    def over(cls, store: Any, rank: int, world_size: int, *, timeout: float, nccl: str = "", cuda: str = "") -> Nccl:
        """The same for ranks that share a store of torch.distributed, with keys that nobody has used."""
        made = cls.__new__(cls)
        made._join(store, rank, world_size, timeout, (nccl, cuda))
        return made

    def _join(self, store: Any, rank: int, W: int, timeout: float, paths: tuple[str, str]) -> None:
        self._host_memory = bool(paths[1])  # a stand-in; CUDA's own runtime comes with torch
        unique, problem = b"", ""
        try:
            NcclCommunicator = importlib.import_module("moe_kernels._host").NcclCommunicator  # compiled
            NcclCommunicator.version(*paths)  # loads them
            unique = NcclCommunicator.unique_id(*paths) if rank == 0 else b"no"
        except (ImportError, RuntimeError) as error:
            problem = str(error) or "no compiled library"
        store.set(f"id{rank}", unique.hex() or "missing")
        keys = [f"id{at}" for at in range(W)]
        try:
            store.wait(keys, timedelta(seconds=timeout))
        except RuntimeError as error:
            absent = next((at for at, key in enumerate(keys) if not store.check([key])), rank)
            raise RuntimeError(f"Nccl: rank {absent} did not come within {timeout:g} s") from error
        ids = [bytes(store.get(key)).decode() for key in keys]
        if "missing" in ids:
            raise NcclMissingError(
                problem or f"Nccl: rank {ids.index('missing')} of the group could not load its libraries"
            )
        device = torch.cuda.current_device() if torch.cuda.is_available() else 0
        self.communicator = NcclCommunicator(W, rank, bytes.fromhex(ids[0]), device=device, timeout=timeout,
                                             nccl=paths[0], cuda=paths[1])  # fmt: skip
        self.rank, self.world_size = rank, W

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int], out: Tensor | None = None,
                   ) -> Exchange:  # fmt: skip
        """Starts sending send[p] rows to every rank p and receiving receive[p] rows from it.

        rows [sum(send), ...] of any dtype on the GPU, rank by rank; what comes is [sum(receive), ...] likewise, in
        `out`, contiguous, if it is given.

        Errors: TypeError, ValueError for the arguments; RuntimeError if the communicator failed.
        """
        op = "Nccl.all_to_all"
        if not isinstance(rows, Tensor) or rows.dim() == 0:
            check.refuse(op, "rows", "a tensor [R, ...]", check.got(rows), TypeError)
        if not rows.is_cuda and not self._host_memory:
            check.refuse(op, "rows", "on the GPU", str(rows.device))
        for name, counts in (("send", send), ("receive", receive)):
            if len(counts) != self.world_size:
                check.refuse(op, name, f"a count for each of {self.world_size} ranks", str(list(counts)))
            for n in counts:
                check.count(op, f"a count of {name}", n, 0)
        if sum(send) != rows.shape[0]:
            check.refuse(op, "send", f"counts of the {rows.shape[0]} rows", f"{list(send)}, of {sum(send)}")
        rows = rows.contiguous()
        shape = (sum(receive), *rows.shape[1:])
        if out is not None and (out.shape != shape or out.dtype != rows.dtype or not out.is_contiguous()):
            check.refuse(op, "out", f"{rows.dtype} {list(shape)}, contiguous", check.got(out))
        came = rows.new_empty(shape) if out is None else out  # of the current stream, before the exchange leaves it
        width = rows[0].nbytes if len(rows) else came[0].nbytes if len(came) else 0
        sizes = [[n * width for n in counts] for counts in (send, receive)]
        work = self.communicator.all_to_all(rows.data_ptr(), sizes[0], came.data_ptr(), sizes[1], _stream(rows))
        return Exchange(work, rows, came)

    def abort(self) -> None:
        """Ends everything in flight, on this rank."""
        self.communicator.abort()

    def close(self) -> None:
        """Ends in order; every rank has to call it."""
        self.communicator.close()


def _stream(t: Tensor) -> int:
    return int(torch.cuda.current_stream(t.device).cuda_stream) if t.is_cuda else 0
