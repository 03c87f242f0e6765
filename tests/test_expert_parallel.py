# SPDX-License-Identifier: Apache-2.0
"""Experts on several ranks give what one process gives: real processes, any split of tokens, any placement."""

from __future__ import annotations

from pathlib import Path

import ep_workers
import processes
import pytest
import torch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside a folder for the ranks: the truths that all of them compare with."""
    root = tmp_path_factory.mktemp("ep")
    torch.save([ep_workers.truth_of(case) for case in ep_workers.the_cases()], root / "truths.pt")
    for world in (1, 4):
        kept = [ep_workers.static_case(*words, world)[1] for words in ep_workers.STATIC]
        torch.save([ep_workers.truth_of(case) for case in kept], root / f"static{world}.pt")
    (root / "ranks").mkdir()
    return root / "ranks"


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_against_one_process(world: int, folder: Path) -> None:
    """R13 too: no tokens on rank 1 or anywhere, L = 1 (world 8), W = 1, K = E, H = 1, empty experts."""
    cases = processes.run("ep_workers:against_one_process", folder, world=world)
    assert cases == [7 * 4 + 3 * 4] * world


def test_integers_are_exact(folder: Path) -> None:
    """Two-level sums like flat, bit by bit, and so does every placement."""
    assert processes.run("ep_workers:exact", folder, world=4) == [16] * 4


@pytest.mark.parametrize("world", [1, 4])
def test_static_capacity(world: int, folder: Path) -> None:
    assert processes.run("ep_workers:static_capacity", folder, world=world) == [3] * world


@pytest.mark.parametrize("world", [2])
def test_float8_rows(world: int, folder: Path) -> None:
    assert processes.run("ep_workers:float8", folder, world=world) == [2, 2]
