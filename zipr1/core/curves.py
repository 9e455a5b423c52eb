"""A run's curves: every step, with what the recipe wants of it and what held-out questions say before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zipr1.core.plots import drawing, plain_axes, save, score_axis
from zipr1.core.recipe import Recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
SIZE = (4.6, 3.0)  # inches of a panel
MOST_DRAWN = 1e100  # above, matplotlib's arithmetic overflows


@dataclass
class Panel:
    """What one panel shows. lines: a value of each step, `(n,)`, NaN where there is none, with label and colour.

    guides: dashed lines `(x, y, label)` of what is wanted. marks: held-out questions, `(steps done, value, label)`.
    """

    title: str
    lines: list[tuple[np.ndarray, str, str]]
    share: bool = False
    guides: list[tuple[np.ndarray, np.ndarray, str]] = field(default_factory=list)
    marks: list[tuple[int, float, str]] = field(default_factory=list)


def panels(rows: Rows, recipe: Recipe, heldout: Mapping[str, Mapping[str, float]]) -> list[Panel]:
    """Those that have something to show, none of a single step.

    rows: lines of metrics.jsonl. heldout: accuracy and token ratio by `dense`, `before` and `after`, as far as they are
    known.
    """
    if len(rows) < 2:
        return []
    steps = recipe.train.steps
    tokens = Panel(
        "Tokens kept",
        [
            (_values(rows, "token_ratio"), "sampled answers", "C0"),
            (greedy_ratios(rows), f"greedy, p = {recipe.sparse.p:g}", "C9"),
        ],
        share=True,
        guides=_targets(rows, recipe),
    )
    sparse = "sparse_accuracy" if _known(rows, "sparse_accuracy") else "accuracy"
    name = "sparse, greedy" if sparse == "sparse_accuracy" else "sparse"
    dense = _values(rows, "dense_accuracy")
    right = Panel(
        "Right answers",
        [(_values(rows, sparse), name, "C2"), (dense, "dense", "0.45")],
        share=True,
    )
    allowed = recipe.efficiency.max_accuracy_drop
    if allowed is not None and recipe.train.stage == "rl" and np.isfinite(dense).any():
        floor = smooth(dense, _window(len(rows))) - allowed
        right.guides = [(_steps(rows), floor, f"dense less the {100 * allowed:g} points allowed")]
    for panel, key in ((tokens, "token_ratio"), (right, "accuracy")):
        panel.marks = [
            (at, heldout[name][key], "held-out")
            for name, at in (("before", 0), ("after", steps))
            if heldout.get(name, {}).get(key) is not None
        ]
    others = [
        Panel("KL to the dense model", [(_values(rows, "kl"), "KL", "C3")]),
        Panel(
            "Efficiency controller",
            [(_values(rows, "efficiency_weight"), "efficiency weight", "C4")],
        ),
        Panel("Loss", [(_values(rows, "loss"), "loss", "C5")]),
        Panel("Reward", [(_values(rows, "reward"), "reward", "C6")]),
        *_inside(rows),
    ]
    every = [tokens, right, *others]
    for panel in every:
        panel.lines = [line for line in panel.lines if np.isfinite(line[0]).any()]
    return [panel for panel in every if panel.lines]


def curves(
    rows: Rows, recipe: Recipe, heldout: Mapping[str, Mapping[str, float]], out: Path
) -> Path | None:
    """All panels as a PNG, two in a row, a last one that is alone as wide as both; None where there is none."""
    shown = panels(rows, recipe, heldout)
    if not shown:
        return None
    return save(_figure(shown, _steps(rows)), out)


def drawings(rows: Rows, recipe: Recipe, heldout: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The panels as SVG text, one by one."""
    steps = _steps(rows)
    return [drawing(_figure([panel], steps)) for panel in panels(rows, recipe, heldout)]


def overlay(runs: Sequence[tuple[str, Rows, Recipe]]) -> list[str]:
    """Tokens kept and right answers of several runs, running means, as SVG text. runs: name, metrics.jsonl, recipe."""
    from matplotlib.figure import Figure

    out = []
    for title in ("Tokens kept", "Right answers"):
        figure = Figure(figsize=SIZE, layout="constrained", facecolor="white")
        ax = figure.subplots()
        for number, (name, rows, recipe) in enumerate(runs):
            found = next((p for p in panels(rows, recipe, {}) if p.title == title), None)
            if found is not None:
                # Greedy answers at p where they were given; else those that were sampled.
                greedy = [line for line in found.lines if "greedy" in line[1]]
                values = (greedy or found.lines)[0][0]
                ax.plot(
                    _steps(rows), smooth(values, _window(len(rows))), color=f"C{number}", label=name
                )
        if ax.lines:
            seen = [
                float(v)
                for line in ax.lines
                for v in np.asarray(line.get_ydata())
                if np.isfinite(v)
            ]
            _finish(ax, title, seen)
            out.append(drawing(figure))
    return out


def layers(before: Sequence[float] | None, now: Sequence[float] | None, label: str) -> str | None:
    """Tokens kept by layer as SVG text; None where there are not two layers to compare. label: of `now`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    known = [(r, name) for r, name in ((before, "before training"), (now, label)) if r]
    if not known or len(known[0][0]) < 2:
        return None
    figure = Figure(figsize=SIZE, layout="constrained", facecolor="white")
    ax = figure.subplots()
    for ratios, name in known:
        first = name == "before training"
        ax.plot(range(1, len(ratios) + 1), ratios, "o--" if first else "o-", markersize=3.5,
                color="0.4" if first else "C0", label=name)  # fmt: skip
    plain_axes(ax, "Tokens kept, by layer")
    ax.set_xlabel("layer", fontsize=8)
    ax.set_ylim(0, 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False, fontsize=7.5)
    return drawing(figure)


def set_point_gaps(looked: Mapping[str, Any]) -> np.ndarray:
    """Of a look inside: by layer, kept share less set point, mean over the tasks that have both; empty without any."""
    both = [
        np.array(one["kept"]) - np.array(one["set_point"])
        for one in (looked.get("by_layer") or {}).values()
        if one.get("kept") and one.get("set_point")
    ]
    return np.mean(both, axis=0) if both else np.array([])


def _inside(rows: Rows) -> list[Panel]:
    """What guard questions and looks inside say, a line for each task, loss or measure."""
    tasks = sorted({task for row in rows for task in row.get("guard") or {}})
    looks = [row.get("diagnosis") or {} for row in rows]
    losses = sorted({name for one in looks for name in one.get("gradients") or {}})
    gaps = [set_point_gaps(one) for one in looks]
    lost = Panel(
        "Points lost on guard questions",
        [(100 * _deep(rows, "guard", t, "lost"), t, f"C{n}") for n, t in enumerate(tasks)],
    )
    if _known(rows, "allowed") and tasks:
        lost.guides = [(_steps(rows), 100 * _values(rows, "allowed"), "allowed")]
    return [
        lost,
        Panel(
            "Points lost with all tokens (p = 1)",
            [(100 * _deep(rows, "guard", t, "drift"), t, f"C{n}") for n, t in enumerate(tasks)],
        ),
        Panel(
            "Layers off their set point, in points",
            [
                (_filled([100 * g.max() if g.size else None for g in gaps]), "most above", "C0"),
                (_filled([100 * g.min() if g.size else None for g in gaps]), "most below", "C1"),
            ],
        ),
        Panel(
            "Gradient of each loss alone, norm",
            [(_deep(looks, "gradients", name), name, f"C{n}") for n, name in enumerate(losses)],
        ),
        Panel(
            "Where the scores lie",
            [
                (_deep(looks, "window"), "tokens in the window", "C0"),
                (_deep(looks, "first_token"), "mass of the first token", "C1"),
                (_deep(looks, "top_token"), "mass of one token", "C3"),
                (_values(rows, "heldout_mass"), "held-out mass", "C2"),
            ],
            share=True,
        ),
        Panel(
            "Groups and answers",
            [
                (_values(rows, "informative"), "informative groups", "C0"),
                (_values(rows, "truncated"), "truncated answers", "C3"),
                (_values(rows, "grad_clipped"), "gradient clipped", "C4"),
            ],
            share=True,
        ),
        Panel("Answer tokens", [(_values(rows, "answer_tokens"), "tokens", "C0")]),
        Panel(
            "Sampler and trainer apart, nats a token",
            [(_values(rows, "sampler_mismatch"), "difference", "C0")],
        ),
    ]


def _deep(rows: Rows, *keys: str) -> np.ndarray:
    """A value of each row by its keys, section by section; between rows that have it, a straight line."""
    found: list[Any] = []
    for row in rows:
        value: Any = row
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        found.append(value)
    return _filled(found)


def _filled(values: Sequence[Any]) -> np.ndarray:
    """Values with a straight line over the gaps between them; NaN before the first and after the last."""
    out = np.array([v if _is_number(v) else np.nan for v in values], dtype=float)
    known = np.flatnonzero(np.isfinite(out))
    if len(known):
        between = slice(known[0], known[-1] + 1)
        out[between] = np.interp(np.arange(len(out))[between], known, out[known])
    return out


def greedy_ratios(rows: Rows) -> np.ndarray:
    """Tokens that greedy answers at the inference p kept in each step, mean over tasks; NaN where none were given."""
    found = []
    for row in rows:
        tasks = row.get("inference") or {}
        ratios = [task["token_ratio"] for task in tasks.values()]
        found.append(float(np.mean(ratios)) if ratios else np.nan)
    return np.array(found, dtype=float)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean; near the ends over what is there. NaN counts as missing."""
    kernel = np.ones(window)
    there = np.isfinite(values)
    sums = np.convolve(np.where(there, values, 0.0), kernel, mode="same")
    counts = np.convolve(there.astype(float), kernel, mode="same")
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _targets(rows: Rows, recipe: Recipe) -> list[tuple[np.ndarray, np.ndarray, str]]:
    """The schedule of the token ratio: a geometric fall from the first step's to the target, as the controller has it
    for each task and layer."""
    target, ratios = recipe.efficiency.target, greedy_ratios(rows)
    if (
        target is None
        or recipe.train.stage != "rl"
        or not len(ratios)
        or not np.isfinite(ratios[0])
    ):
        return []
    x = np.unique(np.linspace(1, recipe.train.steps, min(recipe.train.steps, 500)).round())
    done = np.minimum(1.0, (x - 1) / recipe.train.steps / recipe.efficiency.target_at)
    y = ratios[0] * min(1.0, target / ratios[0]) ** done
    return [(x, y, f"target {target:.0%}")]


def _figure(shown: Sequence[Panel], steps: np.ndarray) -> Figure:
    from matplotlib.figure import Figure

    width = min(2, len(shown))
    height = -(-len(shown) // width)
    figure = Figure(
        figsize=(SIZE[0] * width, SIZE[1] * height), layout="constrained", facecolor="white"
    )
    grid = figure.add_gridspec(height, width)
    for number, panel in enumerate(shown):
        row, column = divmod(number, width)
        alone = number == len(shown) - 1 and column == 0
        _draw(figure.add_subplot(grid[row, :] if alone else grid[row, column]), panel, steps)
    return figure


def _draw(ax: Axes, panel: Panel, steps: np.ndarray) -> None:
    """Each step pale, a running mean over a twentieth of the run strong; what is wanted dashed."""
    for values, label, colour in panel.lines:
        ax.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        ax.plot(
            steps, smooth(values, _window(len(steps))), color=colour, linewidth=1.8, label=label
        )
    for x, y, label in panel.guides:
        ax.plot(x, y, color="0.25", linewidth=1.0, linestyle="--", label=label)
    for number, (step, value, label) in enumerate(panel.marks):
        ax.plot([step], [value], "D", color="black", markersize=4.5, clip_on=False, zorder=5,
                label="_" if number else label)  # fmt: skip
    shown = [float(v) for line in ax.lines for v in np.asarray(line.get_ydata()) if np.isfinite(v)]
    _finish(ax, panel.title, shown if panel.share else None)


def _finish(ax: Axes, title: str, shares: Sequence[float] | None) -> None:
    """Title, axes and legend. shares: what is drawn where it is shares, which are written in per cent."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    plain_axes(ax, title)
    ax.set_xlabel("step", fontsize=8)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if shares is None:
        ax.set_ylim(min(0, ax.get_ylim()[0]), None)
    else:
        if title == "Tokens kept":
            ax.set_ylim(0, min(1.02, 1.1 * max(shares)))
        else:
            score_axis(ax, shares)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    if len(ax.get_legend_handles_labels()[0]) > 1:
        ax.legend(frameon=False, fontsize=7)


def _steps(rows: Rows) -> np.ndarray:
    """Steps done after each row: the first is 1, as on the terminal."""
    numbers = [row["step"] if _is_number(row.get("step")) else i for i, row in enumerate(rows)]
    return np.array(numbers, dtype=float) + 1


def _window(count: int) -> int:
    return min(count, max(1, count // 20) // 2 * 2 + 1)


def _values(rows: Rows, key: str) -> np.ndarray:
    return np.array([r[key] if _is_number(r.get(key)) else np.nan for r in rows], dtype=float)


def _known(rows: Rows, key: str) -> bool:
    return any(_is_number(row.get(key)) for row in rows)


def _is_number(value: Any) -> bool:
    """Whether it can be drawn: an edited file may hold any number of digits."""
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MOST_DRAWN
    )
