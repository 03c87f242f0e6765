# SPDX-License-Identifier: Apache-2.0
"""What the demo says: tables on the terminal, demo.json and demo.png."""

from __future__ import annotations

import importlib
import json
import os
import platform
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import _build, hf
from .._version import __version__
from .training import BASELINE


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their longest cell; the first one left, the others right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "   " + "  ".join(cells).rstrip()

    return "\n".join([line(head), "   " + "  ".join("-" * width for width in widths), *map(line, rows)])


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    info = _build.info()
    return {
        "moe_kernels": __version__,
        "torch": torch.__version__,
        "transformers": importlib.import_module("transformers").__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "isa": str(info.get("isa", "unknown")),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else 0.0,
        "compiled_kernels": bool(_build.ops_loaded),
    }


def heading(m: dict[str, Any]) -> str:
    line = (
        f"moe_kernels {m['moe_kernels']}, torch {m['torch']}, transformers {m['transformers']}, "
        f"{m['threads']} threads, instruction set {m['isa']}"
    )
    if not m["compiled_kernels"]:
        line += f"\nNOTE: without the compiled kernels this shows the reference and no speed. {_build.reason}"
    if m["load"] > 0.5 * m["threads"]:
        line += f"\nNOTE: this machine is busy (load {m['load']}): do not trust the times below."
    return line


def _verdict(ok: bool) -> str:
    return "equal" if ok else "DIFFERENT"


def families_table(rows: list[dict[str, Any]]) -> str:
    head = ("model", "MoE layers ours", "logits error", "gradients", "worst / bound", "generation", "verdict")
    cells = [
        (
            r["family"],
            f"{r['layers_on_our_kernels']} of {r['moe_layers']}",
            f"{r['logits_error']:.1e}",
            str(r["gradients"]),
            f"{r['worst_share_of_bound']:.2f}",
            f"{r['new_tokens']} tokens {'same' if r['generation_equal'] else 'DIFFER'}",
            _verdict(r["ok"]),
        )
        for r in rows
    ]
    return table(head, cells)


def training_table(t: dict[str, Any]) -> str:
    size = t["size"]
    rows = [
        (name, f"{losses[0]:.4f}", f"{losses[-1]:.4f}", f"{t['tokens_per_second'][name]:,.0f}")
        for name, losses in t["losses"].items()
    ]
    return "\n".join(
        [
            f"   {t['parameters'] / 1e6:.1f}M parameters, {size['layers']} layers, {size['experts']} experts, "
            f"{t['steps']} of {size['steps']} steps of {size['rows']} x {size['length']} bytes ({t['text']})",
            table(("experts", "first loss", "last loss", "tokens/s"), rows),
            f"   loss curves {_verdict(t['ok'])}: largest difference {max(t['difference']):.1e}, "
            f"{t['worst_share_of_tolerance']:.2f} of its tolerance; training speed x {t['speedup']:.2f}",
        ]
    )


def layers_table(layers: dict[str, Any]) -> str:
    head = ("layer, bfloat16", "tokens", "kind", f"{BASELINE} ms", "ours ms", "faster", "error", "verdict")
    cells = [
        (
            r["layer"],
            str(r["tokens"]),
            r["kind"],
            f"{r['ms'][BASELINE]:.2f}",
            f"{r['ms'][hf.NAME]:.2f}",
            f"x {r['speedup']:.2f}",
            f"{r['error']:.1e}",
            _verdict(r["ok"]),
        )
        for r in layers["rows"]
    ]
    return "\n".join([table(head, cells)] + [f"   skipped: {reason}" for reason in layers["skipped"]])


def all_equal(results: dict[str, Any]) -> bool:
    """Whether every comparison that ran came out equal."""
    return (
        all(row["ok"] for row in results.get("families", []))
        and results.get("training", {"ok": True})["ok"]
        and all(row["ok"] for row in results.get("layers", {"rows": []})["rows"])
    )


def finish(results: dict[str, Any], folder: Path) -> int:
    """Write the files, print where they are and the last word; 0 if everything is equal, else 1."""
    (folder / "demo.json").write_text(json.dumps(results, indent=1) + "\n")
    written = [str(folder / "demo.json")]
    try:
        draw(results, folder / "demo.png")
        written.append(str(folder / "demo.png"))
    except ImportError:
        print("\nNo picture: matplotlib is not installed (pip install matplotlib).")
    last = "Everything is equal." if results["ok"] else "NOT everything is equal: see the verdicts above."
    print(f"\nWritten: {', '.join(written)}\n{last} {results['seconds']:.0f} s.", flush=True)
    return 0 if results["ok"] else 1


def draw(results: dict[str, Any], path: Path) -> None:
    """Speed-up per size, loss curves, their difference, expert load."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    plt = importlib.import_module("matplotlib.pyplot")
    figure, axes = plt.subplots(2, 2, figsize=(12, 8.5), constrained_layout=True)
    (speed, curves), (load, difference) = axes
    if "layers" in results:
        _draw_speed(speed, results["layers"]["rows"])
    if "training" in results:
        _draw_training(curves, difference, results["training"])
        _draw_load(figure, load, results["training"]["expert_load"])
    for axis in axes.flat:
        if not axis.has_data():
            axis.set_axis_off()
    m = results["machine"]
    figure.suptitle(f"moe_kernels {m['moe_kernels']} - torch {m['torch']}, {m['threads']} threads, {m['isa']}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_speed(axis: Any, rows: list[dict[str, Any]]) -> None:
    names = [f"{r['layer']}\nT = {r['tokens']}" for r in rows]
    values = [r["speedup"] for r in rows]
    bars = axis.barh(range(len(rows)), values, color=["#2a7f9e" if v >= 1 else "#b5523b" for v in values])
    axis.bar_label(bars, [f" x {v:.2f}" for v in values])
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set_yticks(range(len(rows)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, max([1.0, *values]) * 1.15)
    axis.set_title(f"One layer, bfloat16: times faster than {BASELINE}")


def _draw_training(curves: Any, difference: Any, t: dict[str, Any]) -> None:
    styles = {BASELINE: {"linewidth": 4, "alpha": 0.4}, hf.NAME: {"linewidth": 1.2}}
    for name, losses in t["losses"].items():
        curves.plot(losses, label=f"{name}, {t['tokens_per_second'][name]:,.0f} tokens/s", **styles[name])
    curves.set(title="A small Mixtral learns a text", xlabel="step", ylabel="loss")
    curves.legend()
    drawn = [max(d, 1e-8) for d in t["difference"]]  # a logarithmic axis has no 0
    difference.semilogy(drawn, ".", label="ours against theirs (0 drawn at the bottom)")
    difference.semilogy(t["tolerance"], label="tolerance: theirs with one rounding a layer and step, x 4")
    difference.set_ylim(5e-9, 30 * max(t["tolerance"]))
    difference.set(title="Difference of the loss curves", xlabel="step")
    difference.legend(loc="upper left", fontsize=8)


def _draw_load(figure: Any, axis: Any, load: list[list[float]]) -> None:
    image = axis.imshow(load, aspect="auto", cmap="viridis", vmin=0)
    axis.set(title="Expert load after training (share of assignments)", xlabel="expert", ylabel="MoE layer")
    axis.set_yticks(range(len(load)))
    figure.colorbar(image, ax=axis)
