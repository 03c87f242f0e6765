# SPDX-License-Identifier: Apache-2.0
"""Experts on several ranks give what one process gives: real processes, any split of tokens, any placement."""

from __future__ import annotations

from pathlib import Path

import ep_workers
import processes
import pytest
import torch

from moe_kernels.planning import exact_traffic


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


def test_rows_and_bytes_are_those_of_the_plan(folder: Path) -> None:
    """Every expert gets exactly its slots; every rank sends exactly the bytes that the planner counts for it."""
    ranks, case = processes.run("ep_workers:arrivals", folder, world=4), ep_workers.integers()
    ids = case.topk_ids.view(4, 6, -1)
    counts = torch.bincount(ids.flatten(), minlength=8).view(4, 2)
    for (transport, dtype), _ in ranks[0].items():
        chosen = ranks[0][transport, dtype]["plan"].transport if transport == "auto" else transport
        expected = exact_traffic(ids, 8, ranks_per_node=2, hidden=6, dispatch_dtype=dtype or torch.float64,
                                 combine_dtype=torch.float64, capacity_factor=8.0)[chosen]  # fmt: skip
        for rank, found in enumerate(ranks):
            one = found[transport, dtype]
            assert set(one["plan"].us) == set(ep_workers.TRANSPORTS), "a plan for every transport by name too"
            if transport == "static":
                assert one["sent"] == one["plan"].static_bytes
            assert torch.equal(one["counts"], counts[rank])
            sent = {kind: sum(n for (phase, _), n in one["phases"].items() if phase.startswith(kind))
                    for kind in ("dispatch", "combine")}  # fmt: skip
            assert sent == {"dispatch": expected.sent(rank), "combine": expected.returned(rank)}, (transport, rank)
            assert sum(one["sent"].values()) == sum(sent.values()) > 0
            for link, rows in expected.link_rows().items():
                bytes_of_link = int(rows[rank].sum()) * expected.row_bytes
                bytes_of_link += int(rows[:, rank].sum()) * expected.combine_row_bytes
                assert one["sent"][link] == bytes_of_link, (transport, link)
