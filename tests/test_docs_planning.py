# SPDX-License-Identifier: Apache-2.0
"""docs/planning.md: its snippets run, its command lines parse, its figures are the planner's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

import moe_kernels as mk
from moe_kernels import cli
from moe_kernels.planning.traffic import TRANSPORTS

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "planning.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))
def test_a_snippet_runs(code: str) -> None:
    exec(compile(code, "planning.md", "exec"), {})


def test_command_lines_parse() -> None:
    lines = re.findall(r"^python -m moe_kernels (plan .*)$", TEXT, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        assert cli.parser().parse_args(shlex.split(line)).word == "plan"


def test_every_transport_has_a_row() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)) == set(TRANSPORTS)


def test_figures_are_the_planners() -> None:
    said = [int(n) for n in re.search(r"(\d+) us flat, (\d+) us in two levels, (\d+) us when", TEXT).groups()]  # type: ignore[union-attr]
    found = []
    for M, name in ((None, "flat"), (None, "two_level"), (4, "two_level")):
        p = mk.plan(4096, 7168, 2048, 256, 8, 64, dispatch_dtype=torch.float8_e4m3fn, nodes_per_token=M,
                    metadata={"flat": 0, "two_level": 0})  # fmt: skip
        found.append(round(p.phases[name][0].total_us(8)))
    assert said == found
