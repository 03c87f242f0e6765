# SPDX-License-Identifier: Apache-2.0
"""`ExpertParallel` over csrc/comm: the bits of gloo, the same order on all ranks, and faults that name a rank.

Real processes over the strict stand-in for NCCL (tests/nccl_standin.cpp)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
from nccl_standin import library as library  # a fixture

FOLDER = Path(__file__).parent
pytest.importorskip("moe_kernels._host", reason="the compiled library is not built")


def run(worker: str, path: str, folder: Path, world: int) -> list[Any]:
    (folder / "library").write_text(path)
    return processes.run(f"ep_nccl:{worker}", folder, world=world)


@pytest.mark.parametrize("world", [2, 4])
def test_the_same_bits_as_gloo(world: int, library: str, tmp_path: Path) -> None:
    found = run("equals_gloo", library, tmp_path, world)
    for of_rank in found:
        assert of_rank["equal"] == [True] * 20
        assert of_rank["carriers"] == {("own", "Own"), ("gloo", "Group")}
        assert of_rank["orders"] == found[0]["orders"], "two ranks would wait for each other"


def test_one_rank_without_the_library(library: str, tmp_path: Path) -> None:
    assert run("alone", library, tmp_path, 3) == ["Group"] * 3


def test_faults_name_a_rank(library: str, tmp_path: Path) -> None:
    """All ranks raise the same, within the timeout of 1 s and 1.5 s more, and again at the next call."""
    found = run("faults", library, tmp_path, 3)
    for f in found:
        assert f["late to connect"] is None and f["well"] is None
        assert f["late"][:3] == (1, "absent", "dispatch"), f["late"]
        assert f["error"][:2] == (1, "transport") and f["aborted"][:2] == (2, "transport")
        for scene in ("stall", "stuck abort", "watched"):
            assert f[scene][:2] == (0, "transport"), (scene, f[scene])
        for scene in ("late", "error", "aborted", "stall", "stuck abort", "watched"):
            assert f[scene][3] < 2.5 + 2 * (scene == "late"), (scene, f[scene])
            assert f[scene + " again"]


def test_ranks_that_die_stop_or_fail(library: str) -> None:
    """The fault drill (tests/ep_drill.py) over csrc/comm: R5 to R10."""
    words = ["kill", "stop", "error", "experts", "backward", "counts", "--nccl", library]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / "ep_drill.py"), *words]
    run = subprocess.run(command, env=env, timeout=300, capture_output=True, text=True, check=False)
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(results) == 6, run.stderr[-3000:]
    assert [(r["job"], r["wrong"]) for r in results if r["wrong"]] == []
