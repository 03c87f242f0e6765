# SPDX-License-Identifier: Apache-2.0
"""Real processes joined by gloo, for tests: they start, save what they found, and never outlive their deadline.

`run("stack_workers:fsdp", folder)` calls `stack_workers.fsdp(rank, folder)` in each of two processes and returns what
the calls returned. The processes meet over a file, so no port has to be free.
"""

from __future__ import annotations

import datetime
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch


def run(worker: str, folder: Path, *, world: int = 2, seconds: float = 300.0) -> list[Any]:
    """What `module:function` returned on every rank. A failed rank fails the test with its output, at once."""
    store = folder / "store"
    store.unlink(missing_ok=True)
    env = {**os.environ, "WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    outputs = [folder / f"rank{rank}.txt" for rank in range(world)]
    children = []
    for rank, output in enumerate(outputs):
        ranked = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, __file__, worker, str(folder), str(seconds)]
        with output.open("w") as file:
            children.append(subprocess.Popen(command, env=ranked, stdout=file, stderr=subprocess.STDOUT))
    deadline = time.monotonic() + seconds
    try:
        while any(child.poll() is None for child in children):
            late = time.monotonic() > deadline
            if late or any(child.poll() for child in children):
                break
            time.sleep(0.05)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
    codes = [child.returncode for child in children]
    said = "\n".join(f"---- rank {rank}:\n{path.read_text()[-8000:]}" for rank, path in enumerate(outputs))
    assert codes == [0] * world, f"{worker}: exit codes {codes} (-9: killed, for its own lateness or another's)\n{said}"
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


def main(worker: str, folder: Path, seconds: float) -> None:
    """One rank."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=seconds),
    )
    module, function = worker.split(":")
    found = getattr(importlib.import_module(module), function)(rank, folder)
    torch.save(found, folder / f"rank{rank}.pt")
    torch.distributed.barrier()  # nobody takes down the store while another still needs it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of gloo and of sharding that still run would abort the interpreter's own end now and then


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
