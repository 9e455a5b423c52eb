"""The report's two figures: score over kept tokens, and kept tokens by layer."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zipr1.core.plots import plain_axes, save


def draw(records: Sequence[dict[str, Any]], results: dict[str, Any], root: Path) -> dict[str, str]:
    """Writes pareto.png and layers.png to `root`; the same as SVG text, by name."""
    from matplotlib import rc_context

    figures = {"pareto": _pareto(records, results), "layers": _layers(records)}
    drawings = {}
    for name, figure in figures.items():
        save(figure, root / f"{name}.png")
        text = io.StringIO()
        with rc_context(
            {"svg.hashsalt": "zipr1"}
        ):  # the same names in every drawing of the same numbers
            figure.savefig(text, format="svg", metadata={"Date": None})
        drawings[name] = text.getvalue()[text.getvalue().index("<svg") :]
    return drawings


def _grid(count: int, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    columns = min(3, count)
    rows = -(-count // columns)
    figure = Figure(
        figsize=((5.6, 10, 11)[columns - 1], height * rows), layout="constrained", facecolor="white"
    )
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for ax in axes[count:]:
        ax.set_axis_off()
    return figure, axes


def _pareto(records: Sequence[dict[str, Any]], results: dict[str, Any]) -> Any:
    """A panel a benchmark: score over kept tokens with 95 % intervals of the difference; dense and base as lines."""
    from matplotlib.ticker import PercentFormatter

    figure, axes = _grid(len(records), 2.9)
    for ax, record in zip(axes, records, strict=False):
        rows = [row for row in record["rows"] if row["p"] < 1 and row["sparse"] is not None]
        dense = record["rows"][0]["dense"]
        base = record["rows"][0].get("base")
        key = "base_difference_ci" if base is not None else "difference_ci"
        against = base if base is not None else dense
        if base is not None:
            ax.axhline(base, color="0.25", linewidth=1.3, label=f"base, dense {base:.1f}")
        if dense is not None:
            ax.axhline(
                dense, color="0.55", linewidth=1.2, linestyle="--", label=f"dense {dense:.1f}"
            )
        x = [row["token_ratio"] for row in rows]
        y = [row["sparse"] for row in rows]
        top = record["rows"][0]["top"]
        if rows and all(row.get(key) for row in rows):
            # No score lies outside 0 to top, whatever the interval of the difference.
            low = [
                v - max(0, min(v, against + row[key][0])) for v, row in zip(y, rows, strict=True)
            ]
            high = [
                min(top, max(v, against + row[key][1])) - v for v, row in zip(y, rows, strict=True)
            ]
            ax.errorbar(
                x, y, [low, high], fmt="none", color="C0", alpha=0.45, capsize=2.5, linewidth=1
            )
        ax.plot(x, y, "o-", color="C0", markersize=5, linewidth=1.2, label="sparse")
        for k, row in enumerate(rows):
            ax.annotate(f"{row['p']:g}", (row["token_ratio"], row["sparse"]), fontsize=7, color="0.35",
                        textcoords="offset points", xytext=(5, 6 if k % 2 else -11))  # fmt: skip
        bottom, above = ax.get_ylim()
        if above > top:
            ax.set_ylim(bottom, top + 0.04 * (top - bottom))
            ax.set_yticks([tick for tick in ax.get_yticks() if bottom <= tick <= top])
        plain_axes(ax, record["task"])
        ax.set_xlabel("tokens kept", fontsize=8)
        ax.set_xlim(0, min(max([*x, 0.3]) * 1.25, 1.05))
        ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.legend(frameon=False, fontsize=7, loc="best")
    return figure


def _layers(records: Sequence[dict[str, Any]]) -> Any:
    """A panel a benchmark: the kept share of tokens by layer, a line for each p."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, axes = _grid(len(records), 2.4)
    for ax, record in zip(axes, records, strict=False):
        for p, ratios in record["layers"].items():
            if float(p) < 1:
                ax.plot(
                    range(1, len(ratios) + 1),
                    ratios,
                    "o-",
                    markersize=3.5,
                    linewidth=1.3,
                    label=f"p = {float(p):g}",
                )
        plain_axes(ax, record["task"])
        ax.set_xlabel("layer", fontsize=8)
        ax.set_ylim(0, None)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=7)
    return figure
