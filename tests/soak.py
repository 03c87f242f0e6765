# SPDX-License-Identifier: Apache-2.0
"""The long campaigns: thousands of trials of what the tests do a few times. `make soak`, or parts of it by name.

    python tests/soak.py                      # all, some hours
    python tests/soak.py kill stop            # 100 killed ranks, 20 stopped ones
    python tests/soak.py --share 0.1 threads  # a tenth

Prints a line a campaign: what was done, how often, what was wrong. Ends with 1 if anything was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ep_drill
import processes

FOLDER = Path(__file__).parent
Campaign = Callable[[float], tuple[int, list[str]]]


def drill(fault: str, trials: int, *words: str) -> Campaign:
    """Trials of one fault, and what was wrong with them."""

    def run(share: float) -> tuple[int, list[str]]:
        count = max(1, round(trials * share))
        command = [sys.executable, str(FOLDER / "ep_drill.py"), fault, "--trials", str(count), *words]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        found = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        results = [json.loads(line) for line in found.stdout.splitlines()]
        times = [known["seconds"] for r in results for known in r["ranks"] if "seconds" in known]
        wrong = [f"{r['job']}: {line}" for r in results for line in r["wrong"]]
        if len(results) != count:
            wrong.append(f"{len(results)} of {count} trials ended: {found.stderr[-500:]}")
        print(f"    slowest answer {max(times, default=0.0):.2f} s", flush=True)
        return count, wrong

    return run


def ranks(worker: str, count: int, world: int) -> Campaign:
    """`count` rounds of a worker of tests/ep_soak.py in one set of processes."""

    def run(share: float) -> tuple[int, list[str]]:
        rounds = max(1, round(count * share))
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "rounds").write_text(str(rounds))
            try:
                found = processes.run(f"ep_soak:{worker}", Path(folder), world=world, seconds=6 * 3600.0)
            except AssertionError as error:
                return rounds, [str(error)[-3000:]]
            for figure in sorted(Path(folder).glob("figure*")):
                print(f"    {figure.read_text()}", flush=True)
        return rounds, [line for said in found for line in said]

    return run


CAMPAIGNS: dict[str, Campaign] = {
    "kill": drill("kill", 100),
    "stop": drill("stop", 20),
    **{fault: drill(fault, 25) for fault in ep_drill.FAULTS},
    "threads": ranks("threads", 2500, 2),
    "delays": ranks("delays", 1000, 4),
    "leak": ranks("leak", 10_000, 2),
    "connections": ranks("connections", 200, 2),
    "imbalance": ranks("imbalance", 8, 4),
    "forks": ranks("forks", 50, 2),
    "determinism": ranks("determinism", 100, 2),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("campaigns", nargs="*", metavar="campaign", help=", ".join(CAMPAIGNS))
    parser.add_argument("--share", type=float, default=1.0, help="of the trials")
    asked = parser.parse_args(argv)
    unknown = [name for name in asked.campaigns if name not in CAMPAIGNS]
    if unknown:
        parser.error(f"no campaign {unknown[0]}; there are {', '.join(CAMPAIGNS)}")
    bad: dict[str, Any] = {}
    for name in asked.campaigns or CAMPAIGNS:
        began = time.monotonic()
        count, wrong = CAMPAIGNS[name](asked.share)
        print(f"{name}: {count} trials, {len(wrong)} wrong, {time.monotonic() - began:.0f} s", flush=True)
        for line in wrong[:5]:
            print(f"    {line}", flush=True)
        if wrong:
            bad[name] = wrong
    return 1 if bad else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
