"""Figures of a profile: where a layer's time goes, gains over length, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zipr1.core.plots import save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
COLOURS = {
    "projections": "#4C78A8", "attention": "#F58518", "mlp": "#9DB5D3", "norms": "#BAB0AC",
    "scoring": "#E45756", "selection": "#B279A2", "gathers": "#72B7B2", "other": "#D8D2C4",
}  # fmt: skip
LINES = {"attention": "#F58518", "layer": "#4C78A8"}


def draw(result: Mapping[str, Any], layer: Sequence[Row], folder: Path) -> list[tuple[Path, str]]:
    """PNG files and what each shows. layer: the rows whose phases are stacked."""
    out = []
    if layer:
        out.append(_phases(layer, folder / "phases.png"))
        out.append(_gains(result, folder / "speedup.png"))
        out.append(_memory(result, folder / "memory.png"))
    return out


def _phases(layer: Sequence[Row], path: Path) -> tuple[Path, str]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 0.75 * len(layer) + 1.5), layout="constrained")
    ax = figure.subplots()
    names = [
        "dense" if r["skip"] == "none" else f"skip: {r['skip']}, {r['keep']:.0%}" for r in layer
    ]
    left = [0.0] * len(layer)
    for phase, colour in COLOURS.items():
        widths = [float(r["phases"].get(phase, 0.0)) for r in layer]
        if any(widths):
            ax.barh(names, widths, left=left, color=colour, label=phase)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    ax.invert_yaxis()
    ax.set_xlabel("ms")
    ax.set_xlim(0, 1.02 * max(left))
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=8, fontsize=8, frameon=False)
    words = f"Prefill of one decoder layer by phase, {layer[0]['length']:,} tokens, batch {layer[0]['batch']}"
    ax.set_title(words, loc="left", fontsize=10)
    return save(figure, path, dpi=150), words


def _gains(result: Mapping[str, Any], path: Path) -> tuple[Path, str]:
    """Speed-up of a layer and of decoding over length, each with its bound as a dashed line."""
    from matplotlib.figure import Figure

    panels = [("prefill_layer", "Prefill, decoder layer"), ("decode", "Decoding step")]
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    for ax, (phase, title) in zip(figure.subplots(1, 2), panels, strict=True):
        rows = [r for r in result["rows"] if r["phase"] == phase and r.get("skip") in LINES]
        for key, same in _series(rows).items():
            skip, keep, batch = key
            lengths = [r["length"] for r in same]
            colour = LINES[skip]
            label = f"{skip}, {keep:.0%} kept" + (f", batch {batch}" if batch > 1 else "")
            ax.plot(lengths, [r["speedup"] for r in same], "o-", color=colour, label=label, ms=4)
            ax.plot(lengths, [r["bound"] for r in same], "--", color=colour, lw=1)
        ax.axhline(1, color="0.6", lw=0.8)
        if len({r["length"] for r in rows}) > 1:
            ax.set_xscale("log", base=2)
        most = max((max(r["speedup"], r["bound"]) for r in rows), default=1.0)
        _over_length(ax, rows, title, "dense / sparse time", max(1.0, most))
    return save(
        figure, path, dpi=150
    ), "How many times faster than dense, over the prompt's length; dashed: the bound"


def _memory(result: Mapping[str, Any], path: Path) -> tuple[Path, str]:
    """KV cache and peak of the prefill over length."""
    from matplotlib.figure import Figure

    panels = [
        ("kv_cache", "kv_bytes", "KV cache"),
        ("prefill", "peak_bytes", "Peak of the prefill"),
    ]
    figure = Figure(figsize=(8.6, 3.0), layout="constrained")
    for ax, (phase, key, title) in zip(figure.subplots(1, 2), panels, strict=True):
        rows = [r for r in result["rows"] if r["phase"] == phase and key in r]
        batch = min(r["batch"] for r in rows)
        rows = [r for r in rows if r["batch"] == batch]
        # The dashed line last: where both ways to skip hold the same, both are seen.
        for (skip, keep, _), same in sorted(
            _series(rows).items(), key=lambda s: s[0][0] == "attention"
        ):
            name = "dense" if skip == "none" else f"{skip}, {keep:.0%} kept"
            ax.plot(
                [r["length"] for r in same], [r[key] / 2**20 for r in same], marker="o",
                color=LINES.get(skip, "0.3"), label=name, ms=4,
                ls="--" if skip == "attention" else "-",
            )  # fmt: skip
        most = max(r[key] for r in rows) / 2**20
        _over_length(ax, rows, f"{title}, batch {batch}", "MiB", most)
    return save(
        figure, path, dpi=150
    ), "Memory: keys and values after the prefill; all tensors alive at once within it"


def _over_length(ax: Axes, rows: Sequence[Row], title: str, value: str, most: float) -> None:
    """Titles, ticks and legend of a panel over the prompt's length. value: what is drawn, of at most `most`."""
    lengths = sorted({r["length"] for r in rows})
    ax.set_xticks(lengths, [f"{n:,}" for n in lengths])
    ax.minorticks_off()
    ax.set_ylim(0, 1.15 * most)
    ax.set_title(title, loc="left", fontsize=10)
    ax.set_xlabel("prompt tokens")
    ax.set_ylabel(value)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7.5, frameon=False)


def _series(rows: Sequence[Row]) -> dict[tuple[str, float, int], list[Row]]:
    """Rows that belong on one line, by length; realised ratios of a real prompt are rounded."""
    out: dict[tuple[str, float, int], list[Row]] = {}
    for row in sorted(rows, key=lambda r: int(r["length"])):
        out.setdefault((row["skip"], round(row["keep"], 2), row["batch"]), []).append(row)
    return out
