# SPDX-License-Identifier: Apache-2.0
"""The communicator over NCCL: right bytes and bounded time between real processes, on a stand-in that is stricter than
NCCL; against NCCL itself where its package is installed, as far as that goes without a GPU."""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from nccl_standin import library as library  # a fixture

from moe_kernels.nccl import Nccl

_host = pytest.importorskip("moe_kernels._host", reason="the compiled library is not built")
NcclCommunicator = _host.NcclCommunicator


def run(worker: str, library: str, folder: Path, world: int) -> list[Any]:
    (folder / "library").write_text(library)
    return processes.run(f"nccl_workers:{worker}", folder, world=world)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_bytes_arrive(world: int, library: str, tmp_path: Path) -> None:
    for rank, found in enumerate(run("exchange", library, tmp_path, world)):
        assert found["one by one"] == [True] * 10
        assert found["under way"] == [True] * 6
        assert found["nothing"]
        assert found["chunks"] == [True] * 8, "D, G and C of 1 to 8 chunks"
        few, negative, huge, itself = found["arguments"]
        assert few == f"all_to_all: send_bytes must be one a rank, {world}, got 1" if world > 1 else True
        assert negative == "all_to_all: send_bytes must be 0 or more, and within int64 together, got -1"
        assert ("within int64 together" in huge) or world == 1
        assert itself == "all_to_all: receive_bytes of the rank itself must be what it sends itself"
        assert found["closed"] == "NcclCommunicator: all_to_all after: it was closed", rank


def test_faults_end_in_time_and_say_what(library: str, tmp_path: Path) -> None:
    zero, one, two = found = run("faults", library, tmp_path, 3)
    assert [f["late"] for f in found] == ["", "", ""]
    for rank, f in enumerate(found):
        name = f"NcclCommunicator: rank {rank}: "
        assert f["too late"] == name + "connecting did not end within 1.0 s"
        assert f["again"] == ""
        for scene in ("too late", "absent", "stall", "stuck"):
            assert f[scene + " s"] < 10, scene
        assert f["stall"] == name + "all_to_all did not end within 1.0 s"
        child, abort, parent = f["fork"]
        assert child.startswith("NcclCommunicator: all_to_all in a process forked from the one that connected")
        assert "abort in a process forked" in abort and parent == "True"
    for rank, f in ((0, zero), (1, one)):
        assert "rank 0 sends rank 1 8 bytes, which receives 9" in f["wrong size"]
        assert f["absent"] == f["stuck"] == f"NcclCommunicator: rank {rank}: all_to_all did not end within 1.0 s"
        assert f["after"] == "NcclCommunicator: all_to_all after: all_to_all did not end within 1.0 s"
    assert two["absent"] == two["stuck"] == ""
    assert "remote process exited" in one["error"] and "asked for by the test" in one["error"]
    assert zero["error"] == "NcclCommunicator: rank 0: all_to_all did not end within 1.0 s"
    assert any("sends rank" in f["swapped"] for f in found), "two exchanges in another order were not noticed"


def test_rows_of_tensors(library: str, tmp_path: Path) -> None:
    for rank, found in enumerate(run("tensors", library, tmp_path, 3)):
        for name in ("torch.bfloat16", "torch.float64", "torch.uint8", "torch.float8_e4m3fn", "strided"):
            assert found[name], name
        few, short, negative = found["refused"]
        assert few.startswith("Nccl.all_to_all: send must be counts of the ") and few.endswith("[0, 0, 0], of 0")
        assert short.startswith("Nccl.all_to_all: send must be a count for each of 3 ranks")
        assert negative == "Nccl.all_to_all: a count of receive must be 0 or more, got -1"
        assert found["closed"] == "NcclCommunicator: all_to_all after: it was closed"
        if rank == 2:
            assert found["missing"].startswith("NcclCommunicator: cannot load NCCL: /nowhere/libnccl.so")
        else:
            assert found["missing"] == "Nccl: rank 2 of the group could not load its libraries"


def test_it_needs_a_group() -> None:
    with pytest.raises(RuntimeError, match="Nccl: needs a process group"):
        Nccl()


def test_arguments(library: str) -> None:
    unique = NcclCommunicator.unique_id(library, library)
    assert len(unique) == 128 and unique != NcclCommunicator.unique_id(library, library)
    assert NcclCommunicator.version(library, library) == 23200
    for args, options, error, text in (
        ((0, 0, unique), {}, ValueError, "world_size must be 1 or more, got 0"),
        ((2, 2, unique), {}, ValueError, "rank must be in 0..1, got 2"),
        ((1, 0, b"short"), {}, ValueError, "unique_id must be 128 bytes, got 5"),
        ((1, 0, unique), {"timeout": 0.0}, ValueError, "timeout must be above 0 s"),
        ((1, 0, unique), {"timeout": float("nan")}, ValueError, "timeout must be above 0 s"),
        ((1, 0, unique), {"device": 7}, RuntimeError, "cudaSetDevice: invalid device ordinal"),
    ):
        with pytest.raises(error) as caught:
            NcclCommunicator(*args, nccl=library, cuda=library, **options)
        assert text in str(caught.value)


def test_libraries_that_are_not_there(tmp_path: Path, library: str) -> None:
    with pytest.raises(RuntimeError, match="NcclCommunicator: cannot load NCCL: .*none.so"):
        NcclCommunicator.unique_id(str(tmp_path / "none.so"), library)
    with pytest.raises(RuntimeError, match="the library has no ncclGetVersion"):
        NcclCommunicator.unique_id("libm.so.6", library)


def alone(library: str) -> Any:
    return NcclCommunicator(
        1, 0, NcclCommunicator.unique_id(library, library), nccl=library, cuda=library, timeout=30.0
    )


def test_threads_take_turns(library: str) -> None:
    """Four threads on one communicator: every exchange brings its own bytes."""
    comm, wrong = alone(library), []

    def use(thread: int) -> None:
        for i in range(50):
            send = torch.full((1000,), thread * 50 + i, dtype=torch.int64)
            receive = torch.zeros_like(send)
            comm.all_to_all(send.data_ptr(), [send.nbytes], receive.data_ptr(), [send.nbytes]).wait(30.0)
            if not torch.equal(send, receive):
                wrong.append((thread, i))

    threads = [threading.Thread(target=use, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_outlives_what(library: str) -> None:
    """Work keeps its communicator; communicators that end, in order or not, keep no file open."""
    send, receive = torch.arange(100), torch.zeros(100, dtype=torch.int64)
    comm = alone(library)
    work = comm.all_to_all(send.data_ptr(), [800], receive.data_ptr(), [800])
    del comm
    work.wait(30.0)
    assert torch.equal(send, receive)
    before, shared = len(os.listdir("/proc/self/fd")), set(os.listdir("/dev/shm"))
    for i in range(40):
        comm = alone(library)
        if i % 2:
            comm.close()
    del comm
    assert len(os.listdir("/proc/self/fd")) == before
    assert not [n for n in set(os.listdir("/dev/shm")) - shared if n.startswith("moe_standin_")]


# ---- NCCL itself


@pytest.fixture
def nccl() -> str:
    spec = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.nccl")
    places = [Path(p) / "lib" / "libnccl.so.2" for p in (spec.submodule_search_locations or [])] if spec else []
    found = next((p for p in places if p.is_file()), None)
    if found is None:
        pytest.skip("NCCL's package (nvidia-nccl-cu13 or -cu12) is not installed")
    return str(found)


def test_nccl_takes_our_declarations(nccl: str, library: str) -> None:
    """Its version and ids, and without a GPU an error that is clean and quick: the config is not what it minds."""
    assert NcclCommunicator.version(nccl, library) >= 21800
    unique = NcclCommunicator.unique_id(nccl, library)
    assert len(unique) == 128 and unique != bytes(128)
    if os.path.exists("/dev/nvidiactl"):
        pytest.skip("a GPU is present: connecting would not fail")
    for world in (1, 2):
        began = time.monotonic()
        with pytest.raises(RuntimeError, match=r"NcclCommunicator: rank 0: .*(cuda|CUDA)"):
            NcclCommunicator(world, 0, unique, nccl=nccl, cuda=library, timeout=20.0)
        assert time.monotonic() - began < 40
