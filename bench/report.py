# SPDX-License-Identifier: Apache-2.0
"""What the benchmark says: a line a case as it goes, then cpu.json, cpu.md and, with matplotlib, cpu.png."""

from __future__ import annotations

import contextlib
import importlib
import json
import platform
from pathlib import Path
from typing import Any

import torch
from cases import OURS, Bar, Case
from measure import Times

from moe_kernels import _build
from moe_kernels._version import __version__

Row = dict[str, Any]


def verdict(case: Case, bar: Bar, times: Times, limit: float, read: float, wrong: dict[str, float]) -> dict[str, Any]:
    """The figure of one bar, or why there is none."""
    ours = times.median(OURS)
    if bar.against == "limit":
        value = limit / ours
    elif bar.against == "read":
        value = ours / read
    elif bar.against not in times.seconds or bar.against in wrong:
        return {"text": f"{bar.against} is {'wrong' if bar.against in wrong else 'absent'}", "holds": None}
    else:
        value = times.median(bar.against) / ours
    return {"value": value, "text": bar.text(value), "holds": bar.holds(value)}


def _mark(holds: bool | None) -> str:
    return {True: "holds", False: "below", None: "open"}[holds]


def line(row: Row) -> str:
    if "skipped" in row:
        return f"{row['name']}: {row['skipped']}"
    bars = "; ".join(f"{bar['text']}: {_mark(bar['holds'])}" for bar in row["bars"])
    return f"{row['name']}: {row['ms'][OURS]:.2f} ms, limit {row['limit_ms']:.2f} ms ({row['limited_by']}); {bars}"


def stage_line(row: Row) -> str:
    if "skipped" in row:
        return f"{row['name']}: {row['skipped']}"
    value = f"{row['value']:.0%}" if row["unit"].startswith("of") else f"{row['value']:.2f}"
    bar = f"{row['bar']:.0%}" if row["unit"].startswith("of") else f"{row['bar']:.2f}"
    return f"{row['name']}: {value} {row['unit']} (bar {bar}): {_mark(row['value'] >= row['bar'])}"


def machine() -> dict[str, Any]:
    found = {
        "moe_kernels": __version__,
        "torch": torch.__version__,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "isa": _build.info()["isa"],
    }
    for name in ("transformers", "zentorch"):
        with contextlib.suppress(Exception):
            found[name] = importlib.import_module("importlib.metadata").version(name)
    return found


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(text for text in lines if text.startswith("model name")).split(":")[1].strip()
    return platform.processor() or platform.machine()


def _cell(row: Row, side: str) -> str:
    if side not in row["ms"]:
        return "-"
    ms = row["ms"][side]
    return f"{ms:.2f}" + (
        "" if side == OURS else " (wrong)" if side in row["wrong"] else f" ({ms / row['ms'][OURS]:.2f})"
    )


def markdown(rows: list[Row], stages: list[Row]) -> str:
    done = [row for row in rows if "skipped" not in row]
    text = ["# Benchmark on this processor", ""]
    text += [f"{name}: {value}  " for name, value in machine().items()]
    text += [
        "",
        "Medians of interleaved rounds. The limit of a case is the slower of reading the weights of the experts hit",
        "and of multiplying, by a plain read and a loop of multiply-adds on registers between the same rounds.",
        "Outputs and gradients were compared with float64 on rows drawn at random; a wrong side has no ratio.",
        "",
        "| case | ms | limit ms | of the limit | limited by | bars |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "skipped" in row:
            text.append(f"| {row['name']} | {row['skipped']} | | | | |")
            continue
        bars = "; ".join(f"{bar['text']}: **{_mark(bar['holds'])}**" for bar in row["bars"])
        share = f"{row['limit_ms'] / row['ms'][OURS]:.0%}"
        cells = (row["name"], f"{row['ms'][OURS]:.2f}", f"{row['limit_ms']:.2f}", share, row["limited_by"], bars)
        text.append(f"| {' | '.join(cells)} |")
    if stages:
        text += ["", *(f"- {stage_line(row)}" for row in stages)]
    if done:
        sides = list(dict.fromkeys(side for row in done for side in (*row["ms"], *row["absent"])))
        text += ["", "Every side, milliseconds (and how many times ours):", ""]
        text += ["| case | " + " | ".join(sides) + " |", "|" + " --- |" * (len(sides) + 1)]
        text += [f"| {row['name']} | " + " | ".join(_cell(row, side) for side in sides) + " |" for row in done]
        reasons = dict.fromkeys(f"{side}: {why}" for row in done for side, why in row["absent"].items())
        text += ["", "Absent:", "", *(f"- {reason}" for reason in reasons)]
        peak, read = ([row[key] for row in done] for key in ("gflops", "read_gb_per_s"))
        text += [
            "",
            f"Multiply-add {min(peak):.0f} to {max(peak):.0f} GFLOP/s, "
            f"plain read {min(read):.1f} to {max(read):.1f} GB/s.",
        ]
    return "\n".join(text) + "\n"


def write(rows: list[Row], stages: list[Row], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(), "layers": rows, "stages": stages}
    (out / "cpu.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "cpu.md").write_text(markdown(rows, stages))
    with contextlib.suppress(ImportError):
        _picture([row for row in rows if "skipped" not in row], out / "cpu.png")
    print(f"report: {out / 'cpu.md'}")


def _picture(rows: list[Row], path: Path) -> None:
    """Time of every side over ours, one group of bars a case."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    plt = importlib.import_module("matplotlib.pyplot")
    sides = list(dict.fromkeys(side for row in rows for side in row["ms"] if side != OURS))
    figure, axes = plt.subplots(figsize=(10, 1 + 0.55 * len(rows)))
    height = 0.8 / max(1, len(sides))
    for i, side in enumerate(sides):
        at = [y + i * height for y, row in enumerate(rows) if side in row["ms"] and side not in row["wrong"]]
        ratio = [r["ms"][side] / r["ms"][OURS] for r in rows if side in r["ms"] and side not in r["wrong"]]
        axes.barh(at, ratio, height, label=side)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks([y + 0.4 for y in range(len(rows))], [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("time over ours (right of the line: ours is faster)")
    if sides:
        axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
