"""docs/compare.csv -> the table in Markdown and the figure; nothing is asked or loaded.

Of a method, the rows of the recipe that was added last count, all its seeds together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fair import rows, seeds
from fair.methods import BASE, LOWER_ENDS, METHODS, TRIES
from zipr1.core.errors import InputError

TASKS = {"digits": "images", "moving_digits": "videos", "hard_digits": "sums"}
SHARES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4)  # of the tokens, to be kept
# kept, correct, base, difference: in percent and points; low, high: 95 % of the difference, of questions alone. right:
# packed answers (rows.py) to held-out questions.
COLUMNS = (
    "date", "method", "seed", "recipe_sha256", "recipe", "split", "task", "at", "p", "kept", "correct", "base",
    "difference", "low", "high", "n", "questions", "right",
)  # fmt: skip
# Curves of the figure: colour, marker and line, in the order of the legend. The table has one more.
STYLES = {
    "ours": ("C0", "o-"),
    "no-policy-gradient": ("C9", "d:"),
    "no-kl": ("C4", "s:"),
    "nothing-pressed": ("C5", "P:"),
    "cut": ("C2", "D--"),
    "paper": ("C1", "s-"),
    "paper-no-pg": ("C1", "s:"),
    "paper-attention": ("C8", "v-"),
    "top_p": ("0.35", "^--"),
    "top_k": ("0.6", "v--"),
    "random": ("C3", "x:"),
}


@dataclass
class Reading:
    """Of one method, task and point: of each seed what was kept (%) and which questions were answered right."""

    questions: str
    seeds: list[str] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    right: list[np.ndarray] = field(default_factory=list)


Readings = Mapping[tuple[str, str, str], Reading]  # by method, task and point (`at`)


def readings(record: Sequence[rows.Row]) -> dict[tuple[str, str, str], Reading]:
    """The answers to held-out questions."""
    newest = {row["method"]: row["recipe"] for row in record}
    found: dict[tuple[str, str, str], Reading] = {}
    for row in record:
        if row["split"] != "test" or row["recipe"] != newest[row["method"]]:
            continue
        key = (row["method"], row["task"], row["at"])
        one = found.setdefault(key, Reading(row["questions"]))
        if one.questions != row["questions"]:
            raise InputError(
                f"{row['method']}, {row['task']}: seed {row['seed']} was asked other questions than the seeds before "
                "it; ask all seeds of a recipe the same"
            )
        one.seeds.append(row["seed"])
        one.kept.append(float(row["kept"]))
        one.right.append(rows.unpack(row["right"], int(row["n"])))
    return found


def lower_end(record: Sequence[rows.Row]) -> float | None:
    """Of the paper's estimator, the lower end whose first seed is best on validation questions: the highest share of
    right answers, mean over tasks and given ratios; where a ratio is not reached by one of them, it counts for none.
    None until all of them are there."""
    newest = {row["method"]: row["recipe"] for row in record}
    correct: dict[str, dict[tuple[str, str], float]] = {name: {} for name in TRIES}
    for row in record:
        name = row["method"]
        if name in TRIES and row["split"] == "validation" and row["recipe"] == newest[name]:
            correct[name].setdefault((row["task"], row["at"]), float(row["correct"]))
    points = set.intersection(*(set(one) for one in correct.values()))
    if not points:
        return None
    means = [float(np.mean([correct[name][point] for point in points])) for name in TRIES]
    return LOWER_ENDS[int(np.argmax(means))]


def shown(record: Sequence[rows.Row]) -> dict[str, str]:
    """The methods to show and their titles: of the paper's estimator those with the chosen lower end."""
    low = lower_end(record)
    there = {row["method"] for row in record}
    hidden = {n for n in METHODS if n.startswith("paper") and not (low and n.endswith(f"-{low:g}"))}
    return {n: m.title for n, m in METHODS.items() if n in there and n not in hidden}


def against_base(found: Readings, method: str, task: str, at: str) -> seeds.Difference | None:
    """The difference to the untouched base, dense; None where the method was not read there, or asked others."""
    one, base = found.get((method, task, at)), found.get((BASE, task, "dense"))
    if one is None or base is None or one.questions != base.questions:
        return None
    return seeds.difference(
        one.right, base.right[:1], seeds.pictures(len(base.right[0])), base=True
    )


def between(
    found: Readings, method: str, other: str, task: str, at: str
) -> seeds.Difference | None:
    """`method` less `other`, which is trained."""
    one, two = found.get((method, task, at)), found.get((other, task, at))
    if one is None or two is None or one.questions != two.questions:
        return None
    if METHODS[method].rule is not None:  # no seed changes it
        d = seeds.difference(two.right, one.right[:1], seeds.pictures(len(one.right[0])), base=True)
        return seeds.Difference(-d.mean, d.seeds, d.questions, d.degrees, d.runs[::-1])
    return seeds.difference(one.right, two.right, seeds.pictures(len(one.right[0])))


def markdown(record: Sequence[rows.Row]) -> str:
    """All tables."""
    found, names = readings(record), shown(record)
    if (BASE, next(iter(TASKS)), "dense") not in found:
        return "The untouched base was not read yet.\n"
    lines: list[str] = []
    for task, title in TASKS.items():
        base = found[BASE, task, "dense"]
        number, correct = len(base.right[0]), 100 * base.right[0].mean()
        lines += [
            f"**{title[0].upper()}{title[1:]}**, n = {number:,}, base, dense: {correct:.1f} % correct. Points of "
            "difference to it when so many of the tokens are kept, ± standard error of seeds, ± of questions.",
            "",
            *_head("method", [f"{100 * share:g} %" for share in SHARES]),
        ]
        for name, method in names.items():
            cells = [_cell(against_base(found, name, task, f"{share:g}")) for share in SHARES]
            lines.append(_line(method, found, name, cells))
        lines += [
            "",
            f"**{title[0].upper()}{title[1:]}: the others less ours**, in points, with the half of the 95 % interval "
            "(seeds and questions).",
            "",
            *_head("method", [f"{100 * share:g} %" for share in SHARES]),
        ]
        for name, method in names.items():
            if name != "ours":
                cells = [
                    _whole(between(found, name, "ours", task, f"{share:g}")) for share in SHARES
                ]
                lines.append(_line(method, found, name, cells))
        lines.append("")
    lines += [
        "**At the run's own p, and dense**: tokens kept and points of difference to the base, ± half of the 95 % "
        "interval.",
        "",
        *_head("method", [f"{t}, {how}" for t in TASKS.values() for how in ("sparse", "dense")]),
    ]
    for name, method in names.items():
        if METHODS[name].rule is None:
            cells = [_own(found, name, task, at) for task in TASKS for at in ("own", "dense")]
            lines.append(_line(method, found, name, cells))
    lines += ["", farthest(found, names), *_foot(record, names)]
    return "\n".join(lines) + "\n"


def farthest(found: Readings, names: Mapping[str, str]) -> str:
    """How far what was kept of the held-out questions is from the ratio that p was chosen for."""
    far = [
        abs(float(np.mean(one.kept)) - 100 * share)
        for share in SHARES
        for (method, _, at), one in found.items()
        if method in names and at == f"{share:g}"
    ]
    return (
        "p was chosen on validation questions; what is kept of the held-out ones is within "
        f"{max(far, default=0):.1f} points of the ratio given."
    )


def _foot(record: Sequence[rows.Row], names: Mapping[str, str]) -> list[str]:
    last = {row["method"]: row for row in record}
    told = ", ".join(f"{names[n]} {last[n]['recipe'][:8]} ({last[n]['date']})" for n in names)
    return ["", f"Recipes, without their seeds: {told}."]


def _head(first: str, columns: Sequence[str]) -> list[str]:
    return [f"| {first} | seeds | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]


def _line(title: str, found: Readings, name: str, cells: Sequence[str]) -> str:
    runs = "" if METHODS[name].rule else len(found[name, next(iter(TASKS)), "dense"].seeds)
    return f"| {title} | {runs} | {' | '.join(cells)} |"


def _cell(d: seeds.Difference | None) -> str:
    if d is None:
        return ""
    of_seeds = "" if d.seeds is None else f" ± {100 * d.seeds:.2f}"
    return f"{100 * d.mean:+.2f}{of_seeds} ± {100 * d.questions:.2f}"


def _whole(d: seeds.Difference | None) -> str:
    return "" if d is None else f"{100 * d.mean:+.2f} ± {100 * d.half:.2f}"


def _own(found: Readings, name: str, task: str, at: str) -> str:
    text = _whole(against_base(found, name, task, at))
    if not text or at == "dense":
        return text
    return f"{np.mean(found[name, task, at].kept):.1f} %: {text}"


def draw(record: Sequence[rows.Row], out: Path) -> None:
    """A panel for each task: points of difference to the base over the share of tokens kept, one step of the axis for a
    point and below, its logarithm above."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    found, names = readings(record), shown(record)
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.6), layout="constrained", sharey=True)
    for ax, (task, title) in zip(axes, TASKS.items(), strict=True):
        ax.axhline(0, color="k", lw=0.8)
        for style, (colour, line) in STYLES.items():
            name = next((n for n in names if n == style or _paper(n) == style), None)
            if name is None:
                continue
            points = [(f"{s:g}", against_base(found, name, task, f"{s:g}")) for s in SHARES]
            points = [(at, d) for at, d in points if d is not None]
            x = [float(np.mean(found[name, task, at].kept)) for at, _ in points]
            y = [100 * d.mean for _, d in points]
            error = [100 * d.error for _, d in points]
            width, label = 2.4 if name == "ours" else 1.2, names[name].replace("`", "")
            ax.errorbar(
                x, y, error, fmt=line, color=colour, lw=width, ms=4.5, elinewidth=0.8, label=label,
                zorder=3 if name == "ours" else 2,
            )  # fmt: skip
            own = against_base(found, name, task, "own")
            if own is not None and name == "ours":
                kept = float(np.mean(found[name, task, "own"].kept))
                ax.plot(kept, 100 * own.mean, "*", ms=14, color=colour, mec="k", zorder=4)
        ax.set_yscale("symlog", linthresh=1, linscale=0.8)
        ax.set_ylim(-100, 4)
        ticks = [-100, -30, -10, -3, -1, -0.5, 0, 0.5, 1, 3]
        ax.yaxis.set_major_locator(FixedLocator(ticks))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:+g}" if v else "0"))
        ax.set_xlim(5, 45)
        ax.set_title(title, fontsize=11, loc="left")
        ax.set_xlabel("prompt tokens kept (%)")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("right answers, points to the dense base")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=3, frameon=False, fontsize=9)
    figure.suptitle(
        "Held-out questions; bars: one standard error of seeds and questions; stars: at the run's own p",
        fontsize=10, x=0.01, ha="left",
    )  # fmt: skip
    figure.savefig(out, dpi=130)
    plt.close(figure)


def _paper(name: str) -> str:
    """`paper-no-pg-0.3` without its lower end."""
    return name.rpartition("-")[0] if name.startswith("paper") else name
