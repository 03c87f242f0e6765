# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a `Monitor` has seen: load, its course, collapse, co-activation and specialisation.

Every function draws into axes of matplotlib and returns them; `draw` makes one picture of all, `.png` or `.svg`.
`recorded` is a `Monitor` or what `load` has read from the file that it saved.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import check


@dataclass(frozen=True)
class Recorded:
    """What a file of `Monitor.save` holds."""

    records: list[dict[str, Any]]
    pairs: dict[str, list[list[float]]] = field(default_factory=dict)
    by_class: dict[str, list[list[float]]] = field(default_factory=dict)


def load(path: str | Path) -> Recorded:
    """Errors: FileNotFoundError; ValueError for a file that no Monitor wrote."""
    try:
        data = json.loads(Path(path).read_text())
        return Recorded(data["records"], data["pairs"], data["by_class"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"plots.load: {path} must be a file of Monitor.save, got something else ({error!r})"
        ) from error


def _recorded(source: Any) -> Recorded:
    if isinstance(source, Recorded):
        return source
    if isinstance(source, (str, Path)):
        return load(source)
    pairs, by_class = (
        {k: t.double().tolist() for k, t in store.items()} for store in (source._pairs, source._by_class)
    )
    return Recorded(source.records, pairs, by_class)


def layers(recorded: Any) -> list[str]:
    """The layers with a record, in order."""
    return list(dict.fromkeys(r["layer"] for r in _recorded(recorded).records))


def _of(recorded: Any, layer: str | None, what: str) -> tuple[str, list[int], list[Any]]:
    known = layers(recorded)
    if not known:
        check.refuse("plots", "recorded", "of at least one step", "no records")
    layer = known[0] if layer is None else layer
    check.choice("plots", "layer", layer, known)
    mine = [r for r in _recorded(recorded).records if r["layer"] == layer]
    return layer, [r["step"] for r in mine], [r[what] for r in mine]


def load_map(axes: Any, recorded: Any, *, last: int = 1) -> Any:
    """A heat map, layer by expert: the share of each expert over the mean, of the last records together."""
    rows = []
    for layer in layers(recorded):
        shares = _of(recorded, layer, "share")[2][-last:]
        E = len(shares[0])
        rows.append([sum(s[e] for s in shares) / len(shares) * E for e in range(E)])
    width = max(len(row) for row in rows)
    image = axes.imshow(
        [row + [float("nan")] * (width - len(row)) for row in rows], aspect="auto", vmin=0, cmap="viridis"
    )
    axes.figure.colorbar(image, ax=axes, label="load / mean load")
    axes.set(title="load of the experts", xlabel="expert", ylabel="layer", yticks=range(len(rows)))
    axes.set_yticklabels(layers(recorded), fontsize=7)
    return axes


def load_over_time(axes: Any, recorded: Any, layer: str | None = None) -> Any:
    """Stacked shares of one layer's experts over the steps."""
    layer, steps, shares = _of(recorded, layer, "share")
    axes.stackplot(steps, [list(column) for column in zip(*shares)], linewidth=0)
    axes.set(title=f"share of each expert: {layer}", xlabel="step", ylabel="share", ylim=(0, 1))
    return axes


def collapse(axes: Any, recorded: Any) -> Any:
    """Dead experts of every layer over the steps, and entropy (dashed): 1 is balanced, 0 one expert alone."""
    other = axes.twinx()
    for i, layer in enumerate(layers(recorded)):
        _, steps, dead = _of(recorded, layer, "dead")
        axes.plot(steps, dead, color=f"C{i % 10}", label=layer)
        other.plot(steps, _of(recorded, layer, "entropy")[2], color=f"C{i % 10}", linestyle="--", linewidth=1)
    axes.set(title="collapse", xlabel="step", ylabel="dead experts", ylim=(0, None))
    other.set(ylabel="entropy of the load (dashed)", ylim=(0, 1.02))
    axes.legend(fontsize=6)
    return axes


def co_activation(axes: Any, recorded: Any, layer: str | None = None) -> Any:
    """Of the tokens that use expert i, the share that uses j too."""
    layer, table = _table("co_activation", _recorded(recorded).pairs, layer)
    rows = [[0.0 if i == j else v / max(row[i], 1.0) for j, v in enumerate(row)] for i, row in enumerate(table)]
    axes.figure.colorbar(axes.imshow(rows, vmin=0, cmap="magma"), ax=axes, label="share of expert i's tokens")
    axes.set(title=f"used together: {layer}", xlabel="expert j", ylabel="expert i")
    return axes


def specialisation(axes: Any, recorded: Any, layer: str | None = None, names: list[str] | None = None) -> Any:
    """The share of every token class's slots that goes to each expert. names: of the classes."""
    layer, table = _table("specialisation", _recorded(recorded).by_class, layer)
    rows = [[v / max(sum(row), 1.0) for v in row] for row in table]
    axes.figure.colorbar(axes.imshow(rows, aspect="auto", vmin=0, cmap="viridis"), ax=axes, label="share of the class")
    axes.set(title=f"who takes what: {layer}", xlabel="expert", ylabel="token class", yticks=range(len(rows)))
    axes.set_yticklabels(names or range(len(rows)), fontsize=7)
    return axes


def _table(op: str, tables: dict[str, Any], layer: str | None) -> tuple[str, list[list[float]]]:
    if not tables:
        check.refuse(
            f"plots.{op}", "recorded", f"by a Monitor with {'classes' if op == 'specialisation' else op}", "none"
        )
    layer = next(iter(tables)) if layer is None else layer
    check.choice(f"plots.{op}", "layer", layer, tuple(tables))
    return layer, tables[layer]


def draw(recorded: Any, path: str | Path, *, layer: str | None = None) -> Path:
    """One picture of all that was recorded; layer: of the ones that show a single layer, by default the first.

    Errors: ValueError; ImportError without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots.draw: needs matplotlib: pip install 'moe-kernels-torch[plot]'") from error
    recorded = _recorded(recorded)
    parts: list[Any] = [load_map, lambda a, r: load_over_time(a, r, layer), collapse]
    parts += [lambda a, r: co_activation(a, r, layer)] if recorded.pairs else []
    parts += [lambda a, r: specialisation(a, r, layer)] if recorded.by_class else []
    figure = Figure(figsize=(6.5 * len(parts), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts):
        part(axes, recorded)
    figure.savefig(path, dpi=110)
    return Path(path)


def run(source: str, out: str, layer: str | None = None) -> int:
    """`python -m moe_kernels plot`: returns the exit code."""
    try:
        recorded = load(source)
        print(f"{draw(recorded, out, layer=layer)}: {len(recorded.records)} records of {len(layers(recorded))} layers")
    except (OSError, ValueError, ImportError) as error:
        print(f"moe_kernels plot: {error}")
        return 2
    return 0
