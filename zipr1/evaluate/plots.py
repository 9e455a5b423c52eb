"""The report's figures: score over kept tokens beside score over time, and kept tokens by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zipr1.core.plots import drawing, plain_axes, save, score_axis
from zipr1.evaluate.answers import UNTRAINED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (4.6, 3.0)  # inches of a panel
TITLES = {"pareto": "Score over tokens kept, and over time", "layers": "Tokens kept, by layer"}


def draw(
    records: Sequence[dict[str, Any]], results: dict[str, Any], root: Path
) -> dict[str, list[str]]:
    """Writes pareto.png and layers.png to `root`; their panels as SVG text, by name.

    A figure that would show single points is left out: scores need two values of p below 1, layers two layers.
    """
    swept = [r for r in records if len(_sparse_rows(r)) > 1]
    deep = [r for r in records if len(next(iter(r["layers"].values()))) > 1 and _sparse_rows(r)]
    panels = {
        "pareto": [(r, over) for r in swept for over in ("tokens", "time")],
        "layers": [(r, "layers") for r in deep],
    }
    drawings = {}
    for name, some in panels.items():
        if not some:
            (root / f"{name}.png").unlink(missing_ok=True)  # of an earlier call with more of p
            continue
        save(_figure(some), root / f"{name}.png")
        drawings[name] = [drawing(_figure([panel])) for panel in some]
    return drawings


def _figure(panels: Sequence[tuple[dict[str, Any], str]]) -> Any:
    """Panels two in a row. panels: a benchmark's record, and what its scores are drawn over, or `layers`."""
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(
        figsize=(SIZE[0] * columns, SIZE[1] * rows), layout="constrained", facecolor="white"
    )
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for ax, (record, over) in zip(axes, panels, strict=False):
        if over == "layers":
            _layers(ax, record)
        else:
            _scores(ax, record, over == "time")
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    return figure


def _sparse_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in record["rows"] if row["p"] < 1 and row["sparse"] is not None]


def _scores(ax: Axes, record: dict[str, Any], time: bool) -> None:
    """Scores over kept tokens, or over the language model's time for a question: dense, then each p, with 95 %
    intervals of the difference; the base as a line, and as it is at the same p without training."""
    from matplotlib.ticker import PercentFormatter

    rows = _sparse_rows(record)
    first, top = rows[0], rows[0]["top"]
    dense, base = first["dense"], first.get("base")
    key = "base_difference_ci" if base is not None else "difference_ci"
    against = base if base is not None else dense
    unit = 1e3 / first["n"]
    x = [row["seconds"] * unit if time else row["token_ratio"] for row in rows]
    y = [row["sparse"] for row in rows]
    seen = list(y)
    if base is not None:
        ax.axhline(base, color="0.25", linewidth=1.2, label=f"base, dense: {base:.1f}")
        seen.append(base)
    if all(row.get(key) for row in rows):
        # No score lies outside 0 to top, whatever the interval of the difference.
        low = [max(0, min(v, against + row[key][0])) for v, row in zip(y, rows, strict=True)]
        high = [min(top, max(v, against + row[key][1])) for v, row in zip(y, rows, strict=True)]
        below = [v - end for v, end in zip(y, low, strict=True)]
        above = [end - v for v, end in zip(y, high, strict=True)]
        ax.errorbar(
            x, y, [below, above], fmt="none", color="C0", alpha=0.45, capsize=2.5, linewidth=1
        )
        seen += low + high
    if dense is not None:
        at = first["dense_seconds"] * unit if time else 1.0
        x, y = [at, *x], [dense, *y]
        seen.append(dense)
    label = "trained" if base is not None else "dense to sparse"
    ax.plot(x, y, "o-", color="C0", markersize=5, linewidth=1.2, label=label)
    names = ["dense", *(f"{row['p']:g}" for row in rows)][-len(x) :]
    for k, name in enumerate(names):
        ax.annotate(name, (x[k], y[k]), fontsize=7, color="0.35", ha="center",
                    textcoords="offset points", xytext=(0, 6 if k % 2 else -12))  # fmt: skip
    before = next((row for row in rows if row.get("untrained") is not None), None)
    if before is not None and not time:
        ax.plot([before["untrained_token_ratio"]], [before["untrained"]], "o", color="C1",
                fillstyle="none", label=f"base at p = {before['p']:g}")  # fmt: skip
        seen.append(before["untrained"])
    score_axis(ax, seen, top)
    plain_axes(ax, record["task"])
    ax.set_ylabel("score", fontsize=8)
    if time:
        ax.set_xlabel("milliseconds a question in the language model", fontsize=8)
        ax.set_xlim(0, 1.1 * max(x))
    else:
        ax.set_xlabel("tokens kept, of all tokens of a prompt", fontsize=8)
        ax.set_xlim(0, 1.08)
        ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if len(ax.get_legend_handles_labels()[0]) > 1:
        ax.legend(frameon=False, fontsize=7, loc="best")


def _layers(ax: Axes, record: dict[str, Any]) -> None:
    """The kept share of all tokens by layer, a line for each p; dashed the untrained base."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    most = 0.0
    for name, ratios in record["layers"].items():
        untrained = name == UNTRAINED
        if untrained or float(name) < 1:
            most = max(most, *ratios)
            ax.plot(
                range(1, len(ratios) + 1), ratios, "o--" if untrained else "o-", markersize=3.5, linewidth=1.3,
                color="0.4" if untrained else None,
                label="base, not trained" if untrained else f"p = {float(name):g}",
            )  # fmt: skip
    plain_axes(ax, record["task"])
    ax.set_xlabel("layer", fontsize=8)
    ax.set_ylabel("of all tokens", fontsize=8)
    ax.set_ylim(0, min(1.02, 1.15 * most))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False, fontsize=7)
