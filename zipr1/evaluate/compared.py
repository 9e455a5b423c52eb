"""What a comparison shows: a table, the figures, the page, and the same as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from zipr1.core import curves
from zipr1.core.files import write_whole, writing
from zipr1.core.jsontext import dumps, plain
from zipr1.core.page import Tile, compared, page_table, render
from zipr1.core.plots import drawing, plain_axes, score_axis
from zipr1.core.text import size, times
from zipr1.evaluate.compare import Line, Pair, Side, leading, mean_gap

WIDE = 100  # columns of a terminal that shows the whole table
MOST = 6  # questions shown that one side alone answers right


def as_json(a: Side, b: Side, pairs: Sequence[Pair]) -> dict[str, Any]:
    """comparison.json. speedup: time to the first token of a over that of b; above 1 b is faster."""

    def line(one: Line) -> dict[str, Any]:
        return {
            "p": one.p, "n": one.n, "score": one.score, "token_ratio": one.token_ratio, "kv_bytes": one.kv_bytes,
            "first_token_ms": one.first_token_ms,
        }  # fmt: skip

    gap, half = mean_gap(leading(pairs))
    rows = [
        {
            "task": pair.task, "top": pair.a.top, "a": line(pair.a), "b": line(pair.b), "difference": pair.gap,
            "difference_ci": pair.interval, "paired": pair.paired, "speedup": _speedup(pair),
            "a_alone": sum(was > now for *_, was, now in pair.differing),
            "b_alone": sum(was < now for *_, was, now in pair.differing),
        }
        for pair in pairs
    ]  # fmt: skip
    out = {"a": a.name, "b": b.name, "rows": rows, "difference": gap, "difference_half": half}
    return dict(plain(out))


def table(a: Side, b: Side, pairs: Sequence[Pair], width: int = WIDE) -> Table:
    """A row for each benchmark and p; A and B stand for the folders, which the caption names. A terminal with less than
    WIDE columns gets fewer."""
    wide = width >= WIDE
    more = "; paired: how many they are; faster: B's time to the first token against A's, above 1 is faster"
    out = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption=f"A: {a.name}; B: {b.name}; B - A: over the questions that both answered, if any; kept: of "
        f"all tokens of a prompt{more if wide else ''}",
        caption_justify="left",
    )
    names = ["benchmark", "p", "A", "B", "B - A (95 %)", "kept A", "kept B"]
    names += ["paired", "faster"] if wide else []
    for number, name in enumerate(names):
        out.add_column(name, justify="right" if number else "left", no_wrap=True)
    for pair in pairs:
        same = pair.a.p == pair.b.p
        cells = [
            pair.task,
            f"{pair.a.p:g}" if same else f"{pair.a.p:g}, {pair.b.p:g}",
            _score(pair.a),
            _score(pair.b),
            _gap(pair.gap, pair.interval),
            f"{pair.a.token_ratio:.1%}",
            f"{pair.b.token_ratio:.1%}",
        ]
        if wide:
            cells.append(
                f"{pair.paired:,}" if pair.paired else f"none of {pair.a.n:,}, {pair.b.n:,}"
            )
            cells.append(times(_speedup(pair)) or "-")
        out.add_row(*cells)
    return out


def write(a: Side, b: Side, pairs: Sequence[Pair], folder: Path) -> Path:
    """comparison.json and report.html into `folder`. Returns the page's path."""
    path = folder / "report.html"
    with writing(path, "run again"):
        write_whole(folder / "comparison.json", dumps(as_json(a, b, pairs), indent=2) + "\n")
        write_whole(path, page(a, b, pairs))
    return path


def page(a: Side, b: Side, pairs: Sequence[Pair]) -> str:
    shown = page_table(table(a, b, pairs))
    gap, _ = mean_gap(leading(pairs))
    kept = [np.mean([getattr(p, s).token_ratio for p in leading(pairs)]) for s in "ab"]
    points = "" if gap is None else f", {gap:+.2f} points"
    return render(
        "comparison.html",
        title=f"{a.name} and {b.name}",
        headline=f"{kept[0]:.1%} → {kept[1]:.1%} of the tokens{points}",
        lead=f"From A, {a.name}, to B, {b.name}.",
        tiles=_tiles(pairs),
        differing=_differing(pairs),
        table=shown,
        figures=_figures(a, b, pairs),
    )


def _tiles(pairs: Sequence[Pair]) -> list[Tile]:
    """The means over benchmarks, at the highest p of each."""
    chosen = leading(pairs)
    over = f"mean over {len(chosen)} benchmarks" if len(chosen) > 1 else chosen[0].task
    gap, half = mean_gap(chosen)

    def mean(key: str) -> list[float] | None:
        values = [[getattr(line, key) for line in (pair.a, pair.b)] for pair in chosen]
        if any(v is None for both in values for v in both):
            return None
        return [float(v) for v in np.mean(values, 0)]

    old, new = mean("token_ratio") or [1.0, 1.0]
    tiles = [Tile("tokens kept", f"{old:.1%}", f"{new:.1%}", over)]
    if gap is not None:
        scores = [
            float(np.mean([(line.score or 0.0) / line.top * 100 for line in lines]))
            for lines in ([p.a for p in chosen], [p.b for p in chosen])
        ]
        note = f"{gap:+.2f}{'' if half is None else f' ± {half:.2f}'} points"
        if half is None:
            note += ", not paired: other questions"
        tiles.append(Tile("score", f"{scores[0]:.2f}", f"{scores[1]:.2f}", note))
    first = mean("first_token_ms")
    if first and min(first) > 0:
        words = compared(first[0], first[1], "A")
        old_ms, new_ms = (f"{value:.3g} ms" for value in first)
        tiles.append(Tile("to the first token, a question", old_ms, new_ms, words))
    held = mean("kv_bytes")
    if held:
        tiles.append(Tile("keys and values", size(held[0]), size(held[1]), "after a prefill"))
    return tiles


def _differing(pairs: Sequence[Pair]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Questions that one side alone answers right, those of A first: B lost them."""
    out = []
    for title, sign in (("Right in A, wrong in B", 1), ("Right in B, wrong in A", -1)):
        found = [
            one for pair in leading(pairs) for one in pair.differing if sign * (one[4] - one[5]) > 0
        ]
        cards = [
            {
                "pictures": [],
                "wide": False,
                "question": question,
                "target": target,
                "answers": [("A", old, was >= 0.5), ("B", new, now >= 0.5)],
            }
            for question, target, old, new, was, now in found[:MOST]
        ]
        if cards:
            out.append((f"{title}: {len(found):,}", cards))
    return out


def _figures(a: Side, b: Side, pairs: Sequence[Pair]) -> list[str]:
    if a.run is not None and b.run is not None:
        return curves.overlay([(f"A: {a.path.name}", *a.run), (f"B: {b.path.name}", *b.run)])
    tasks = [t for t in dict.fromkeys(p.task for p in pairs) if _swept(a, t) or _swept(b, t)]
    return [_scores(task, a.lines[task], b.lines[task]) for task in tasks]


def _swept(side: Side, task: str) -> bool:
    """Whether there are two values of p below 1: fewer are no curve."""
    return sum(p < 1 for p in side.lines[task]) > 1


def _scores(task: str, a: Mapping[float, Line], b: Mapping[float, Line]) -> str:
    """Score over kept tokens of both sides."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(4.6, 3.0), layout="constrained", facecolor="white")
    ax = figure.subplots()
    seen = []
    for name, colour, lines in (("A", "C0", a), ("B", "C1", b)):
        some = [(ls.token_ratio, ls.score) for ls in lines.values() if ls.score is not None]
        if some:
            x, y = zip(*sorted(some), strict=True)
            ax.plot(x, y, "o-", color=colour, markersize=4.5, linewidth=1.2, label=name)
            seen += list(y)
    plain_axes(ax, task)
    score_axis(ax, seen or [0.0], next(iter(a.values())).top)
    ax.set_xlabel("tokens kept, of all tokens of a prompt", fontsize=8)
    ax.set_ylabel("score", fontsize=8)
    ax.set_xlim(0, 1.05)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.legend(frameon=False, fontsize=7)
    return drawing(figure)


def _speedup(pair: Pair) -> float | None:
    old, new = pair.a.first_token_ms, pair.b.first_token_ms
    return old / new if old and new else None


def _score(line: Line) -> str:
    if line.score is None:
        return "-"
    return f"{line.score:.2f}" if line.top <= 100 else f"{line.score:.1f}"


def _gap(gap: float | None, interval: Sequence[float] | None) -> str:
    if gap is None:
        return "-"
    if interval is None:
        return f"{gap:+.2f}"
    return f"{gap:+.2f} ± {max(interval[1] - gap, gap - interval[0]):.2f}"
