# SPDX-License-Identifier: Apache-2.0
"""`python -m moe_kernels demo`: real Hugging Face MoE models on our kernels, before and after.

families.py   tiny models of every family: outputs, gradients and generation are the same
training.py   a small Mixtral trained on real text, twice: same loss curve, tokens per second
full_size.py  single layers of published models at full size: time before and after
tolerance.py  what "the same" means     report.py  table, picture, JSON     text.py  the text     progress.py  bars
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import torch

PARTS = ("families", "training", "layers")
MISSING_TRANSFORMERS = """\
The demo needs transformers (5.0 or newer), which is not installed. Install it with one of

    pip install ".[hf]"          in a clone of this project
    pip install "transformers>=5.0" safetensors
"""


def run(*, quick: bool = False, out: str = "demo_out", parts: tuple[str, ...] = PARTS) -> int:
    """Run the demo, print its tables, write demo.json and demo.png. Returns the exit code: 0 if everything is equal."""
    if importlib.util.find_spec("transformers") is None:
        print(MISSING_TRANSFORMERS, file=sys.stderr)
        return 2
    from . import families, full_size, report, training

    started = time.perf_counter()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"quick": quick, "machine": report.machine()}
    print(report.heading(results["machine"]), flush=True)
    importlib.import_module("transformers").logging.set_verbosity_error()  # remarks on the tiny configurations
    with torch.random.fork_rng():
        if "families" in parts:
            print("\n1. Tiny models, random weights: the same answers with our kernels?", flush=True)
            results["families"] = families.compare_all(quick=quick)
            print(report.families_table(results["families"]), flush=True)
        if "training" in parts:
            print("\n2. A small Mixtral learns a text: the same loss curve?", flush=True)
            results["training"] = training.compare(quick=quick)
            print(report.training_table(results["training"]), flush=True)
        if "layers" in parts:
            print("\n3. One layer at full size: how much faster?", flush=True)
            results["layers"] = full_size.compare_all(quick=quick)
            print(report.layers_table(results["layers"]), flush=True)
    results["seconds"] = round(time.perf_counter() - started, 1)
    results["ok"] = report.all_equal(results)
    return report.finish(results, folder)
