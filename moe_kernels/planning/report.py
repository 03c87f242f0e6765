# SPDX-License-Identifier: Apache-2.0
"""`python -m moe_kernels plan`: plans for a row of cluster sizes as a table, as JSON, or as a picture."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import check, presets
from ..placement import balance
from .planner import Links, Plan, plan

DTYPES = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RANKS = "8,16,32,64,128,256,512,1024,2048"
COLORS = {"flat": "C0", "rank_dedup": "C7", "two_level": "C1", "allgather": "C2"}


def add_arguments(word: argparse.ArgumentParser) -> None:
    """The options of the word."""
    word.add_argument("--preset", default="deepseek-v3", help="sizes of a published model (deepseek-v3)")
    for option, what in (("hidden", "hidden size"), ("intermediate", "expert width"), ("experts", "experts"),
                         ("top-k", "experts a token")):  # fmt: skip
        word.add_argument(f"--{option}", type=int, metavar="N", help=f"{what}, instead of the preset's")
    word.add_argument("--tokens", type=int, default=4096, metavar="N", help="of a rank (4096)")
    word.add_argument("--gpus", default=RANKS, metavar="LIST", help=f"cluster sizes ({RANKS})")
    word.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="(8)")
    word.add_argument("--nodes-per-token", type=int, metavar="N", help="nodes that a token's experts are confined to")
    word.add_argument("--dispatch", choices=tuple(DTYPES), default="bf16", help="dtype of the rows that go (bf16)")
    word.add_argument("--combine", choices=tuple(DTYPES), default="bf16", help="of those that come back (bf16)")
    word.add_argument("--capacity-factor", type=float, metavar="F", help="for the share of dropped slots")
    word.add_argument("--load", metavar="FILE", help="counts of the experts, from a file of Monitor.save")
    word.add_argument("--layer", help="of that file (the first)")
    word.add_argument("--slots", type=int, metavar="N", help="balance that load over so many slots, with copies")
    fields = ", ".join(f.name for f in dataclasses.fields(Links))
    word.add_argument("--links", default="", metavar="NAME=X,..", help=f"speeds: {fields}")
    word.add_argument("--json", action="store_true", help="the same as JSON")
    word.add_argument("--out", metavar="FILE", help="a picture, .png or .svg")


def table(plans: Sequence[Plan]) -> str:
    """One line a cluster size: microseconds of each transport, choice, buffers, fullest rank, drops."""
    lines = [
        f"{'GPUs':>5}  {'flat':>8} {'dedup':>8} {'2-level':>8} {'gather':>9}  {'use':<10} {'C':>1} {'bound by':<8} "
        f"{'MB nic':>8} {'nvlink':>8}  {'recv MB':>8} {'p99':>8} {'worst':>8}  {'fullest':>7} {'drops':>6}"
    ]
    for p in plans:
        us = [f"{p.us[name]:.0f}" if name in p.us else "-" for name in COLORS]
        sent = p.bytes[p.transport]
        lines.append(
            f"{p.world_size:>5}  {us[0]:>8} {us[1]:>8} {us[2]:>8} {us[3]:>9}  {p.transport:<10} {p.chunks:>1} "
            f"{p.dominant:<8} {sent['nic'] / 1e6:>8.1f} {sent['nvlink'] / 1e6:>8.1f}  {p.recv_mean / 1e6:>8.1f} "
            f"{p.recv_p99 / 1e6:>8.1f} {p.recv_worst / 1e6:>8.1f}  {p.imbalance:>7.2f} {p.drop_prob:>6.1%}"
        )
    return "\n".join(lines)


def draw(plans: Sequence[Plan], path: str | Path) -> Path:
    """Time of every transport, and bytes between nodes, over the cluster sizes; the choice is ringed.

    Errors: ValueError; ImportError without matplotlib.
    """
    if not plans:
        check.refuse("plan_report.draw", "plans", "at least one Plan", "none")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plan_report.draw: needs matplotlib: pip install 'moe-kernels-torch[plot]'") from error
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    times, sent = figure.subplots(1, 2)
    over_ranks(times, plans, {p.world_size: p.us for p in plans}, "us, dispatch and combine")
    times.scatter([p.world_size for p in plans], [p.us[p.transport] for p in plans], s=110, facecolors="none",
                  edgecolors="k", label="chosen")  # fmt: skip
    megabytes = {p.world_size: {n: links["nic"] / 1e6 for n, links in p.bytes.items()} for p in plans}
    over_ranks(sent, plans, megabytes, "MB between nodes, of one GPU")
    times.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    return Path(path)


def over_ranks(axes: Any, plans: Sequence[Plan], values: dict[int, dict[str, float]], label: str) -> Any:
    """A line a transport."""
    for name, color in COLORS.items():
        known = [(W, row[name]) for W, row in values.items() if row.get(name, 0) > 0]
        if known:
            axes.plot(*zip(*known), color=color, marker=".", label=name)
    axes.set(xlabel="GPUs", ylabel=label, xscale="log", yscale="log" if axes.lines else "linear")
    axes.set_xticks([p.world_size for p in plans], [str(p.world_size) for p in plans], fontsize=7)
    axes.minorticks_off()
    return axes


def plans_of(asked: argparse.Namespace) -> list[Plan]:
    """The plans that the command line asks for. E grows to the ranks where there are more of them, without a load."""
    preset = presets.get(asked.preset)
    H, I = asked.hidden or preset.hidden_size, asked.intermediate or preset.intermediate_size
    E, K = asked.experts or preset.num_experts, asked.top_k or preset.top_k
    load = None if asked.load is None else _load(asked.load, asked.layer)
    if asked.slots is not None and load is None:
        check.refuse("plan", "--slots", "given together with --load", str(asked.slots))
    options = {
        "gpus_per_node": asked.gpus_per_node, "dispatch_dtype": DTYPES[asked.dispatch],
        "combine_dtype": DTYPES[asked.combine], "links": _links(asked.links),
        "nodes_per_token": asked.nodes_per_token, "capacity_factor": asked.capacity_factor,
    }  # fmt: skip
    found = []
    for W in _numbers("--gpus", asked.gpus):
        spread = None if load is None else torch.tensor(load)
        if asked.slots is not None and load is not None:
            spread = balance(load, num_slots=asked.slots, world_size=W).slot_load(load)
        experts = max(E, W) if load is None else E if asked.slots is None else asked.slots
        found.append(plan(asked.tokens, H, I, experts, K, W, load=spread, **options))
    return found


def _numbers(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        check.refuse("plan", option, "numbers such as 8,64", repr(text))
    return [int(part) for part in parts]


def _links(text: str) -> Links:
    named = dict(part.partition("=")[::2] for part in text.split(",") if part)
    known = [f.name for f in dataclasses.fields(Links)]
    values = {}
    for name, value in named.items():
        check.choice("plan", "--links", name, known)
        try:
            values[name] = float(value)
        except ValueError:
            check.refuse("plan", f"--links {name}", "a number", repr(value))
    return dataclasses.replace(Links(), **values)


def _load(path: str, layer: str | None) -> list[float]:
    """Counts of one layer, of all records together."""
    from .. import plots

    recorded = plots.load(path)
    known = plots.layers(recorded)
    check.choice("plan", "--layer", layer or (known or [""])[0], known)
    rows = [r["counts"] for r in recorded.records if r["layer"] == (layer or known[0])]
    return [float(sum(column)) for column in zip(*rows)]


def run(asked: argparse.Namespace) -> int:
    """`python -m moe_kernels plan`: returns the exit code."""
    try:
        plans = plans_of(asked)
        if asked.json:
            hidden = ("phases", "traffic")
            rows = [{k: v for k, v in vars(p).items() if k not in hidden} for p in plans]
            print(json.dumps(rows, indent=2))
        else:
            print(f"us of one layer's dispatch and combine, of {asked.tokens} tokens a GPU, by the model of "
                  "docs/planning.md; C chunks")  # fmt: skip
            print(table(plans))
        if asked.out:
            print(draw(plans, asked.out))
    except (FileNotFoundError, ValueError, TypeError, ImportError) as error:
        print(f"moe_kernels plan: {error}")
        return 2
    return 0
