"""Figures of a profile: where a layer's time goes; gains and memory over length, where there are lengths to compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zipr1.core.plots import drawing, plain_axes, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
COLOURS = {
    "projections": "#4C78A8", "attention": "#F58518", "mlp": "#9DB5D3", "norms": "#BAB0AC",
    "scoring": "#E45756", "selection": "#B279A2", "gathers": "#72B7B2", "other": "#D8D2C4",
}  # fmt: skip
# Of each way to skip, the lines of a figure: more keep ratios or batches take the next shade.
LINES = {
    "attention": ("#F58518", "#FFBF79", "#A85A00", "#FFD8AD"),
    "layer": ("#4C78A8", "#9ECAE9", "#1F4E79", "#C6DBEF"),
    "none": ("#4D4D4D", "#8C8C8C", "#262626", "#BFBFBF"),
}
SIZE = (4.6, 3.0)  # inches of a panel
# By file: what its panels show, as (phase, key of a row, title, unit, factor).
OVER_LENGTH = {
    "speedup": (
        ("prefill_layer", "speedup", "Prefill of a layer: times faster than dense", "x", 1.0),
        ("decode", "speedup", "Decoding step: times faster than dense", "x", 1.0),
    ),
    "memory": (
        ("kv_cache", "kv_bytes", "Keys and values after the prefill", "MiB", 2**-20),
        ("prefill", "peak_bytes", "Peak of tensors within the prefill", "MiB", 2**-20),
    ),
}


def draw(result: Mapping[str, Any], layer: Sequence[Row], folder: Path) -> list[str]:
    """Writes phases.png, and with several lengths speedup.png and memory.png; their panels as SVG text.

    layer: the rows whose phases are stacked. A single length makes no line: its numbers are in the tables.
    """
    if not layer:
        return []
    save(_phases(layer), folder / "phases.png", dpi=150)
    out = [drawing(_phases(layer))]
    for name, panels in OVER_LENGTH.items():
        there = [panel for panel in panels if _lines(result, panel[0], panel[1])]
        if there:
            save(_figure(result, there), folder / f"{name}.png", dpi=150)
            out += [drawing(_figure(result, [panel])) for panel in there]
        else:
            (folder / f"{name}.png").unlink(missing_ok=True)  # of an earlier call with more lengths
    return out


def _phases(layer: Sequence[Row]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(SIZE[0], 0.55 * len(layer) + 1.5), layout="constrained", facecolor="white"
    )
    ax = figure.subplots()
    names = [
        "dense" if r["skip"] == "none" else f"skip: {r['skip']}\n{r['keep']:.0%} kept"
        for r in layer
    ]
    left = [0.0] * len(layer)
    for phase, colour in COLOURS.items():
        widths = [float(r["phases"].get(phase, 0.0)) for r in layer]
        if any(widths):
            ax.barh(names, widths, left=left, color=colour, label=phase)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    ax.invert_yaxis()
    plain_axes(ax, f"A layer's prefill, {_place(layer[0])}")
    ax.grid(visible=False)
    ax.set_xlabel("ms", fontsize=8)
    ax.set_xlim(0, 1.02 * max(left))
    figure.legend(loc="outside lower center", ncols=4, fontsize=7.5, frameon=False)
    return figure


def _figure(result: Mapping[str, Any], panels: Sequence[tuple[str, str, str, str, float]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(SIZE[0] * len(panels), SIZE[1]), layout="constrained", facecolor="white"
    )
    axes = figure.subplots(1, len(panels), squeeze=False).ravel()
    for ax, (phase, key, title, unit, factor) in zip(axes, panels, strict=True):
        _over_length(ax, _lines(result, phase, key), key, title, unit, factor)
    return figure


def _over_length(
    ax: Axes, lines: Mapping[str, tuple[str, list[Row]]], key: str, title: str, unit: str, factor: float,
) -> None:  # fmt: skip
    """Lines over the prompt's length; of speed-ups the bound is dashed, and dense is a line at 1."""
    most, lengths, dashed = 0.0, set(), False
    for label, (colour, rows) in lines.items():
        x = [row["length"] for row in rows]
        y = [row[key] * factor for row in rows]
        lengths.update(x)
        most = max(most, *y)
        ax.plot(x, y, "o-", color=colour, label=label, ms=4, lw=1.4)
        if key == "speedup":
            bound = [row["bound"] for row in rows]
            most = max(most, *bound)
            ax.plot(x, bound, "--", color=colour, lw=1, label="_" if dashed else "at most, here")
            dashed = True
    plain_axes(ax, title)
    if key == "speedup":
        ax.axhline(1, color="0.6", lw=0.8)
        most = max(most, 1.0)
    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted(lengths), [f"{n:,}" for n in sorted(lengths)])
    ax.minorticks_off()
    ax.set_ylim(0, 1.15 * most)
    ax.set_xlabel("prompt tokens", fontsize=8)
    ax.set_ylabel(unit, fontsize=8)
    ax.legend(fontsize=7, frameon=False)


def _lines(result: Mapping[str, Any], phase: str, key: str) -> dict[str, tuple[str, list[Row]]]:
    """By label the colour and the rows of each line that has two lengths at least. Lines of the same numbers are one,
    with both names: one would hide the other."""
    series: dict[tuple[str, float, int], list[Row]] = {}
    rows = [r for r in result["rows"] if r["phase"] == phase and key in r]
    for row in sorted(rows, key=lambda r: int(r["length"])):
        if key != "speedup" or row["skip"] != "none":
            # Realised ratios of a real prompt are rounded.
            series.setdefault((row["skip"], round(row["keep"], 2), row["batch"]), []).append(row)
    several = len({batch for _, _, batch in series}) > 1
    merged: dict[tuple[Any, ...], list[tuple[str, float, int]]] = {}
    for place, same in series.items():
        if len(same) > 1:
            numbers = (*place[1:], *(float(row[key]) for row in same))
            merged.setdefault(numbers, []).append(place)
    used = dict.fromkeys(LINES, 0)
    out = {}
    for places in merged.values():
        skip, keep, batch = places[0]
        name = "dense" if skip == "none" else f"{' and '.join(p[0] for p in places)}, {keep:.0%}"
        label = name + (f", batch {batch}" if several else "")
        shades = LINES[skip]
        out[label] = (shades[used[skip] % len(shades)], series[places[0]])
        used[skip] += 1
    return out


def _place(row: Row) -> str:
    batch = f", batch {row['batch']}" if row["batch"] > 1 else ""
    return f"{row['length']:,} tokens{batch}"
