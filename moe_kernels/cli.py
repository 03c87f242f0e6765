# SPDX-License-Identifier: Apache-2.0
"""`python -m moe_kernels demo | doctor | bench | inspect | plan | plot`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .planning import report


def parser() -> argparse.ArgumentParser:
    """The command line, all of it."""
    top = argparse.ArgumentParser(prog="python -m moe_kernels", description="Mixture-of-Experts kernels for PyTorch.")
    words = top.add_subparsers(dest="word", required=True, metavar="demo | doctor | bench | inspect | plan | plot")
    demo = words.add_parser("demo", help="real Hugging Face MoE models before and after: equal, and how much faster")
    demo.add_argument("--quick", action="store_true", help="smaller and without the largest layers; within a minute")
    demo.add_argument("--out", default="demo_out", metavar="DIR", help="folder for demo.json and demo.png (demo_out)")
    demo.add_argument(
        "--part",
        action="append",
        choices=("families", "training", "layers"),
        help="only this part; may be given more than once",
    )
    words.add_parser("doctor", help="versions, build, which backend each op uses and why, what to do about the rest")
    words.add_parser("bench", help="ours against every installed peer, with rooflines; from a clone", add_help=False)
    inspect = words.add_parser("inspect", help="the MoE layers of a checkpoint, and the kernels that will serve them")
    inspect.add_argument("source", help="a folder with config.json, a config.json, or the name of a preset")
    inspect.add_argument("--json", action="store_true", help="the same as JSON")
    inspect.add_argument("--dtype", choices=("float64", "float32", "bfloat16", "float16"), help="of the run")
    inspect.add_argument("--device", default="cpu", help="cpu, cuda or an architecture such as sm_90 (cpu)")
    plot = words.add_parser("plot", help="a picture of what a Monitor has recorded")
    plot.add_argument("source", help="a file of Monitor.save")
    plot.add_argument("--out", default="moe.png", metavar="FILE", help="the picture, .png or .svg (moe.png)")
    plot.add_argument("--layer", help="of the parts that show one layer (the first)")
    report.add_arguments(words.add_parser("plan", help="the cost of expert parallelism on a cluster"))
    return top


def bench(arguments: Sequence[str]) -> int:
    """bench/suite.py of the clone that this package was installed from in place, or of the working folder."""
    for root in (Path(__file__).resolve().parents[1], Path.cwd()):
        suite = root / "bench" / "suite.py"
        if suite.is_file() and (root / "csrc" / "moe.h").is_file():
            return subprocess.run([sys.executable, str(suite), *arguments], check=False).returncode
    print(
        "moe_kernels bench: the benchmark is not part of the installed package. Clone the project and run this from "
        "its folder, or `make bench` there.",
        file=sys.stderr,
    )
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one word; returns the exit code (2: something it needs is missing)."""
    asked, rest = parser().parse_known_args(arguments)
    if asked.word == "bench":
        return bench(rest)
    if rest:
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    if asked.word == "doctor":
        from . import doctor

        return doctor.run()
    if asked.word == "inspect":
        from . import inspect

        return inspect.run(asked.source, as_json=asked.json, dtype=asked.dtype, device=asked.device)
    if asked.word == "plan":
        return report.run(asked)
    if asked.word == "plot":
        from . import plots

        return plots.run(asked.source, asked.out, asked.layer)
    from . import demo

    return demo.run(quick=asked.quick, out=asked.out, parts=tuple(asked.part or ("families", "training", "layers")))
