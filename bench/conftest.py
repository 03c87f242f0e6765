# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: ours and a peer in turn, round by round, and one table at the end.

pytest bench/                                every stage; `make bench` is the table against all peers (suite.py)
pytest bench/bench_route.py                  one stage
pytest bench/ --report bench/results/x.md    the table as Markdown too
pytest bench/ --bars                         a row that is slower than its peer fails
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

ROWS = pytest.StashKey[list[tuple[str, ...]]]()
HEAD = ("benchmark", "ours ms", "peer ms", "faster", "of torch's limit", "peer")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("moe_kernels")
    group.addoption("--report", metavar="FILE", help="write the table as Markdown")
    group.addoption("--bars", action="store_true", help="fail where ours is slower than its peer")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.option.benchmark_quiet = True  # our own table says the same beside the peer


def pytest_collect_file(parent: pytest.Collector, file_path: Path) -> pytest.Module | None:
    """bench_*.py files hold tests although python_files may name test_*.py only."""
    named = parent.config.getini("python_files")
    if parent.session.isinitpath(file_path):  # pytest collects what is named anyhow
        return None
    if file_path.match("bench_*.py") and not any(file_path.match(pattern) for pattern in named):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


@pytest.fixture
def against(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., float]:
    """against(ours, peer, peer_name): runs them in turn, records medians and their ratio, returns the ratio.

    `prepare(round)` gives the arguments of both for one round (other routing every round, so that no cache helps).
    `bound_ms` is what the roofline of this run allows.
    """

    def measure(
        ours: Callable[..., Any],
        peer: Callable[..., Any],
        peer_name: str,
        *,
        prepare: Callable[[int], tuple[Any, ...]] = lambda _round: (),
        rounds: int = 15,
        bound_ms: float | None = None,
    ) -> float:
        peer_seconds: list[float] = []
        count = 0

        def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
            nonlocal count
            count += 1
            arguments = prepare(count)
            started = time.perf_counter()
            peer(*arguments)
            peer_seconds.append(time.perf_counter() - started)
            return arguments, {}

        benchmark.pedantic(ours, setup=setup, rounds=rounds, iterations=1, warmup_rounds=2)
        ours_s = float(benchmark.stats.stats.median)
        peer_s = statistics.median(peer_seconds[2:])
        ratio = peer_s / ours_s
        of_bound = "" if bound_ms is None else f"{bound_ms / (1e3 * ours_s):.0%}"
        benchmark.extra_info.update(peer=peer_name, peer_ms=1e3 * peer_s, ratio=ratio, bound_ms=bound_ms)
        name = request.node.nodeid.split("::")[-1].removeprefix("test_")
        row = (name, f"{1e3 * ours_s:.3f}", f"{1e3 * peer_s:.3f}", f"x {ratio:.2f}", of_bound, peer_name)
        request.config.stash[ROWS].append(row)
        if request.config.getoption("--bars"):
            assert ratio >= 1.0, f"{name}: {1e3 * ours_s:.3f} ms, {peer_name} {1e3 * peer_s:.3f} ms"
        return ratio

    return measure


@pytest.fixture
def remember(request: pytest.FixtureRequest) -> Callable[..., None]:
    """remember(name, value, limit, unit): a figure that is no time, for the same table."""

    def add(name: str, value: float, limit: float, unit: str) -> None:
        share = f"{value / limit:.0%} of bar"
        request.config.stash[ROWS].append((name, f"{value:.1f} {unit}", f"{limit:.1f} {unit}", "", share, "the bar"))

    return add


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    from moe_kernels.demo.report import table

    terminalreporter.section("ours against peers: medians of interleaved rounds")
    terminalreporter.write_line(table(HEAD, rows))
    report = config.getoption("--report")
    if report:
        lines = [f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}", ""]
        lines += ["| " + " | ".join(row) + " |" for row in (HEAD, ("---",) * len(HEAD), *rows)]
        Path(report).parent.mkdir(parents=True, exist_ok=True)
        Path(report).write_text("\n".join(lines) + "\n")
