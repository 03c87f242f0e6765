# SPDX-License-Identifier: Apache-2.0
"""The campaigns of `make soak` (tests/soak.py) in short, and memory under attack."""

from __future__ import annotations

from pathlib import Path

import ep_soak
import processes


def test_a_little_of_every_campaign(tmp_path: Path) -> None:
    """R16, R17, R19, R20, R21 on two ranks: nothing wrong; but a planted leak is."""
    for found in processes.run("ep_soak:short", tmp_path):
        assert "bytes a step" in found.pop("planted leak")[0]
        assert found == {name: [] for name in ep_soak.SHORT}


def test_imbalance_is_exact(tmp_path: Path) -> None:
    """R11: all tokens to one expert or rank, one source, idle experts."""
    (tmp_path / "rounds").write_text("2")
    assert processes.run("ep_soak:imbalance", tmp_path, world=4) == [[]] * 4


def test_receive_memory_under_attack(tmp_path: Path) -> None:
    """R11: all to one rank: the buffers for rows stay within 1.1 times the planner's worst case, and come close."""
    ranks = processes.run("ep_soak:attack", tmp_path, world=4)
    for name in ranks[0]:
        shares = [found[name]["peak"] / found[name]["worst"] for found in ranks]
        assert max(shares) <= 1.1, (name, shares)
        assert shares[0] > (0.6 if name == "two_level" else 0.9 if " in " not in name else 0.6), (name, shares)
