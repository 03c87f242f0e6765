# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the expert MLP for a GPU: its verdict, and a rehearsal of its rows on the emulator."""

import importlib
import os
import re
import subprocess
import sys

import pytest
import simt_ops

BENCH = simt_ops.ROOT / "bench"
pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="the benchmarks stand in the source tree")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("cuda_experts")


def test_verdict(bench):
    """Met only where the target is reached and nobody is faster; it names what was missed."""
    target = bench.TARGETS["forward"][90]
    assert bench.verdict("forward", 90, target, 1.0, {}) == "met"
    assert bench.verdict("forward", 90, target, 1.0, {"a": 1.0, "b": 2.0}) == "met"
    assert bench.verdict("forward", 90, 0.1, 1.0, {}) == f"MISSED: 10% of {target:.0%}"
    assert bench.verdict("forward", 90, target, 1.5, {"a": 1.0, "b": 2.0}) == "MISSED: slower than a"
    assert bench.verdict("forward", 90, 0.0, 3.0, {"a": 2.0, "b": 1.0}).endswith("slower than b")


def test_every_stage_has_targets(bench):
    assert set(bench.TARGETS) == {"grouped_gemm", "forward", "forward and backward", "decode"}
    assert all(0 < share <= 1 for shares in bench.TARGETS.values() for share in shares.values())
    assert all(set(shares) == {80, 90} for shares in bench.TARGETS.values())


def test_peers_compute_the_same(bench):
    """What is measured against is the same layer: every installed peer, with and without gradients."""
    shapes = importlib.import_module("shapes")
    import moe_kernels as mk

    for T, stages in ((16, 1), (96, 3)):
        rows = bench.rows_of(mk, shapes.Shape("small", 64, 32, 4, 2, ""), T, "cpu")
        assert len(rows) == stages
        for row in rows:
            ours = row.run()
            assert "torch grouped_mm" in row.peers
            for name, run in row.peers.items():
                theirs = run()
                if ours is not None:
                    error = (ours.float() - theirs.float()).norm() / ours.float().norm()
                    assert error < 0.02, (row.stage, name)


@pytest.mark.skipif(bool(simt_ops.missing()), reason=simt_ops.missing())
def test_rehearsal():
    command = [sys.executable, "cuda_experts.py", "--simt"]
    done = subprocess.run(command, cwd=BENCH, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr[-2000:]
    rows = re.findall(r"^\| ([a-z_ ]+) \| 64 \| 32 \| 4 \| 2 \| (\d+) \| ([0-9.]+) \|$", done.stdout, re.M)
    assert [(stage, T) for stage, T, _ in rows] == [
        ("decode", "16"), ("grouped_gemm", "96"), ("forward", "96"), ("forward and backward", "96")
    ]  # fmt: skip
    assert all(float(ratio) >= 1 for _, _, ratio in rows), "nothing moves fewer bytes than there are"
