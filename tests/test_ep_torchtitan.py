# SPDX-License-Identifier: Apache-2.0
"""torchtitan's two seams over our exchange: a block in its shape on four ranks gives what it gives on one."""

from __future__ import annotations

from pathlib import Path

import processes
import pytest
import torch

from moe_kernels.expert_parallel.torchtitan import TokenDispatcher


def test_a_block_on_four_ranks(tmp_path: Path) -> None:
    assert processes.run("ep_torchtitan:against_one_process", tmp_path, world=4) == [5] * 4


def test_scores_before_the_experts(tmp_path: Path) -> None:
    assert processes.run("ep_torchtitan:scores_first", tmp_path) == [1, 1]


def test_settings_refused() -> None:
    for words, name in (((0, 1), "num_experts"), ((4, 5), "top_k"), ((4, 2, None), "transport")):
        with pytest.raises(ValueError, match=f"TokenDispatcher: {name}"):
            TokenDispatcher(*words, transport="pigeon" if name == "transport" else "flat")
    with pytest.raises(ValueError, match="dispatch_dtype"):
        TokenDispatcher(4, 2, dispatch_dtype=torch.int8)
    with pytest.raises(RuntimeError, match="of a dispatch before"):
        TokenDispatcher(4, 2).combine(torch.ones(1, 1), None)  # type: ignore[arg-type]
