"""The report of an evaluation, from numbers made by hand: the page, the table, report.md and the figures."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from zipr1.core.plots import score_axis
from zipr1.evaluate import html, plots, report

NAME = "<b>m|n</b> [red]x[/red]"


def row(p, sparse, ratio, **more):
    return {
        "task": NAME, "p": p, "n": 40, "top": 100.0, "dense": 80.0, "sparse": sparse, "token_ratio": ratio,
        "difference": sparse - 80.0, "difference_ci": [sparse - 82.0, sparse - 78.0], "kv_bytes": 2048 * ratio,
        "dense_kv_bytes": 2048, "seconds": 1.6, "dense_seconds": 2.0, "speedup": 1.25, "first_token_ms": 30.0,
        "dense_first_token_ms": 24.0, "lost": 3, "won": 1, "compared": 40, "same_answers": 0.75, **more,
    }  # fmt: skip


def shown(before, after, first=False, target=NAME):
    """An entry of a gallery. before, after: how right the dense and the sparse answer is."""
    return {
        "pictures": {"plain": "AA==", "0.975": "BB=="}, "p": 0.975, "token_ratio": {"0.975": 0.5}, "question": NAME,
        "target": target, "said": {"1": NAME, "0.975": "" if before != after else NAME}, "before": "1",
        "after": "0.975", "right": {"1": before, "0.975": after}, "first": first,
    }  # fmt: skip


ROWS = [row(1.0, 80.0, 1.0), row(0.975, 79.0, 0.5), row(0.9, 70.0, 0.25)]
RECORD = {
    "task": NAME,
    "kind": "image",
    "average": 1.0,
    "rows": ROWS,
    "layers": {"1.0": [1.0, 1.0], "0.975": [0.6, 0.4], "0.9": [0.3, 0.2]},
    "conditions": {"max_new_tokens": 16},
    "prompt_tokens": 100.0,
    "decoding_seconds": 1.0,
    "vision_seconds": 1.0,
    "gallery": [shown(1.0, 0.0, first=True)],
}
RESULTS = {
    "model": NAME,
    "base": None,
    "lmms_eval": "0.7.3",
    "rows": ROWS,
    "averages": [],
    "notes": [NAME],
    "errors": [{"task": NAME, "error": NAME}],
    "machine": {
        "started": "2026-11-27",
        "command": ["zipr1", "eval", NAME],
        "hardware": {"device_name": None, "cpus": 2},
    },
    "conditions": {
        "dtype": "float32", "max_pixels": 1000, "limit": 40,
        "sparse": {"rule": "top_p", "skip": "layer", "keep_last": 1, "dense_below": 0,
                   "probes": {"recent": 8, "random": 4}},
    },
}  # fmt: skip


def tiles(page):
    """The statement: of each tile its name, what it was, what it is, and the note."""
    found = re.findall(r'<div class="tile">(.*?)</div>', page)
    clean = [re.sub(r"<[^>]+>", "|", tile).replace("&rarr;", "") for tile in found]
    return [[part.strip() for part in tile.split("|") if part.strip()] for tile in clean]


def test_names_on_the_page_are_text():
    page = html.page(RESULTS, [RECORD], {"pareto": ["<svg><g/></svg>"]})
    assert "<b>m|n" not in page and "<svg><g/></svg>" in page
    # title, model, lead, command; score; each of two examples: question, right answer, answer; count, conditions, note,
    # error.
    assert page.count("&lt;b&gt;m|n&lt;/b&gt; [red]x[/red]") == 15
    assert '&#10007;</span> -<span class="soft">p = 0.975</span>' in page  # an empty answer


def test_numbers_of_the_page():
    """Of p = 0.975, the highest below 1: 24 / 30 and 2.0 / 1.6, for x is how many times faster than dense."""
    page = html.page(RESULTS, [RECORD], {})
    assert "<h1>50.0% of the tokens, -1.00 points</h1>" in page
    assert tiles(page) == [
        ["tokens kept", "100%", "50.0%", "of the prompt, mean over layers"],
        ["score", "80.00", "79.00", "-1.00 ± 2.00 points"],
        ["to the first token, a question", "24 ms", "30 ms", "slower than dense (0.80x), in the language model"],
        ["keys and values", "2.0 KiB", "1.0 KiB", "50.0% saved after a prefill"],
    ]  # fmt: skip
    for cell in ("79.00", "-1.00 ± 2.00", "-10.00 ± 2.00", "25.0%", "512 B", "1.25x"):
        assert f">{cell}</td>" in page
    assert "of 40 questions 3 lost and 1 won against dense" in page


def test_a_trained_model_is_held_against_its_base():
    base = {"base": 90.0, "base_difference": -11.0, "base_difference_ci": [-13.0, -9.0]}
    untrained = {"untrained": 88.0, "untrained_token_ratio": 0.9}
    rows = [row(1.0, 80.0, 1.0, **base), row(0.975, 79.0, 0.5, **untrained, **base)]
    page = html.page({**RESULTS, "base": "origin", "rows": rows}, [{**RECORD, "rows": rows}], {})
    assert "From origin, untouched and dense, to sparse at p = 0.975" in page
    assert tiles(page)[:2] == [
        ["tokens kept", "100%", "50.0%", "before training, at the same p: 90.0%"],
        ["score", "90.00", "79.00", "-11.00 ± 2.00 points"],
    ]


def test_the_statement_is_the_row_of_means():
    """A benchmark counts as much as any other, however long it takes: tokens (0.5 + 0.1) / 2; first token (30 + 60) / 2
    against (24 + 240) / 2 ms; speed-ups 1.25 and 5 have the geometric mean 2.5."""
    other = {"task": "other", "first_token_ms": 60.0, "dense_first_token_ms": 240.0, "speedup": 5.0, "seconds": 100.0,
             "dense_seconds": 500.0, "kv_bytes": 1024, "dense_kv_bytes": 8192}  # fmt: skip
    more = [row(1.0, 80.0, 1.0, **other), row(0.975, 77.0, 0.1, **other)]
    records = [
        {**RECORD, "rows": ROWS[:2]},
        {**RECORD, "task": "other", "rows": more},
    ]
    results = {**RESULTS, "rows": [*ROWS[:2], *more], "averages": report.averages(records)}
    page = html.page(results, records, {})
    assert tiles(page) == [
        ["tokens kept", "100%", "30.0%", "of the prompt, mean over layers"],
        ["score", "80.00", "78.00", "-2.00 points"],
        ["to the first token, a question", "132 ms", "45 ms", "2.93x faster than dense, in the language model"],
        ["keys and values", "5.0 KiB", "1.0 KiB", "80.0% saved after a prefill"],
    ]  # fmt: skip
    means = next(c for c in report.cells(results) if c[0] == "mean, all" and "0.975" in c)
    assert means[:6] == ["mean, all", "2 sets", "80.00", "0.975", "78.00", "-2.00"]
    assert means[6:] == ["30.0%", "1.0 KiB", "2.50x"]


def test_answers_that_differ_are_sorted_and_few():
    """Lost, won, other words; of more than two benchmarks one of each sort; equal answers are no example."""
    gallery = [
        shown(1.0, 1.0, first=True),
        shown(0.0, 1.0),
        *(shown(1.0, 0.0, target=f"lost {n}") for n in range(4)),
    ]
    gallery.append({**shown(0.0, 0.0), "said": {"1": "a", "0.975": "b"}})
    few = html._differing([{**RECORD, "gallery": gallery}], 3)
    assert [(title, len(some)) for title, some in few] == [
        ("Lost", 3), ("Won", 1), ("Other words, no other score", 1),
    ]  # fmt: skip
    assert [one["target"] for one in few[0][1]] == ["lost 0", "lost 1", "lost 2"]
    many = html._differing([{**RECORD, "gallery": gallery}] * 3, 1)
    assert [(title, len(some)) for title, some in many] == [
        ("Lost", 3), ("Won", 3), ("Other words, no other score", 3),
    ]  # fmt: skip
    names = [name for name, _, _ in few[0][1][0]["answers"]]
    assert names == ["dense", "p = 0.975"]


def test_a_bar_in_a_name_does_not_break_the_table_of_report_md():
    lines = report.markdown(RESULTS, [RECORD], []).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(ROWS)
    assert {line.replace(r"\|", "").count("|") for line in table} == {table[0].count("|")}
    assert table[2].startswith(r"| &lt;b&gt;m\|n&lt;/b&gt; \[red\]x\[/red\] | 40 |")


def test_the_terminal_shows_names_as_they_are():
    out = io.StringIO()
    Console(file=out, width=140, color_system=None).print(report.table(RESULTS, 140))
    assert f"{NAME}: float32, 2 CPU cores" in out.getvalue()


def panel(record, over):
    return plots._figure([(record, over)]).axes[0]


def test_figures_show_the_numbers():
    """Scores over tokens and over the milliseconds of a question, 1000 * 2.0 / 40 = 50 dense; tokens by layer."""
    for over, x in (("tokens", [1.0, 0.5, 0.25]), ("time", [50.0, 40.0, 40.0])):
        scores = panel(RECORD, over)
        line = next(one for one in scores.lines if one.get_label() == "dense to sparse")
        assert list(line.get_xdata()) == x and list(line.get_ydata()) == [80.0, 79.0, 70.0]
        low, high = (ends[:, 1] for ends in bars(scores))
        np.testing.assert_allclose((low, high), ([77, 81], [68, 72]))
        assert scores.get_legend() is None  # one curve needs no name
    layers = panel(RECORD, "layers")
    drawn = {line.get_label(): list(line.get_ydata()) for line in layers.lines}
    assert drawn == {"p = 0.975": [0.6, 0.4], "p = 0.9": [0.3, 0.2]}
    assert len({line.get_color() for line in layers.lines}) == 2
    assert scores.get_title(loc="left") == layers.get_title(loc="left") == NAME


def test_the_base_is_a_line_and_a_point_at_the_same_p():
    base = {"base": 90.0, "base_difference_ci": [-12.0, -8.0]}
    untrained = {"untrained": 88.0, "untrained_token_ratio": 0.9}
    rows = [row(0.975, 79.0, 0.5, **base, **untrained), row(0.9, 70.0, 0.25, **base)]
    lines = panel({**RECORD, "rows": rows}, "tokens").lines
    drawn = {line.get_label(): line.get_xydata() for line in lines}
    assert drawn["base at p = 0.975"].tolist() == [[0.9, 88.0]]
    assert {y for _, y in drawn["base, dense: 90.0"]} == {90.0}
    layers = panel({**RECORD, "layers": {**RECORD["layers"], "base, sparse": [0.9, 0.8]}}, "layers")
    dashed = [line for line in layers.lines if line.get_linestyle() == "--"]
    assert [list(line.get_ydata()) for line in dashed] == [[0.9, 0.8]]


def bars(ax):
    """The ends of each interval that is drawn."""
    (lines,) = [c for c in ax.collections if len(c.get_segments()) == 2]
    return lines.get_segments()


def test_no_interval_leaves_the_range_of_scores():
    record = {**RECORD, "rows": [row(1.0, 99.0, 1.0), row(0.9, 99.0, 0.5), row(0.8, 99.0, 0.4)]}
    for one in record["rows"]:
        one["difference_ci"] = [10.0, 30.0]
    ends = [segment[:, 1].tolist() for segment in bars(panel(record, "tokens"))]
    assert ends == [[90.0, 100.0], [90.0, 100.0]]


@pytest.mark.parametrize(
    ("values", "limits"),
    [
        ([99.5, 99.0], (80.0, 100.0)),  # half a point is a fortieth of the height, not all of it
        ([50.0, 50.5], (40.25, 60.25)),
        ([0.0, 0.1], (0.0, 20.0)),
        ([10.0, 90.0], (4.0, 96.0)),
    ],
)
def test_a_small_difference_stays_small(values, limits):
    """The range is a fifth of all scores at least, plus 2 % below and 4 % above for the marks."""
    ax = Figure().subplots()
    score_axis(ax, values, 100.0)
    room = limits[1] - limits[0]
    assert ax.get_ylim() == pytest.approx((limits[0] - 0.02 * room, limits[1] + 0.04 * room))
    assert max(ax.get_yticks()) <= 100 and min(ax.get_yticks()) >= 0


def test_a_single_point_is_not_drawn(tmp_path):
    one = {**RECORD, "rows": ROWS[:2], "layers": {"1.0": [1.0], "0.975": [0.5]}}
    (tmp_path / "pareto.png").write_bytes(b"of an earlier call")
    assert plots.draw([one], RESULTS, tmp_path) == {} and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "panels"), [("pareto", 2), ("layers", 1)])
def test_the_figures_are_files_and_drawings(tmp_path, name, panels):
    drawings = plots.draw([RECORD], RESULTS, tmp_path)
    assert len(drawings[name]) == panels
    assert all(svg.startswith("<svg") and "#1f77b4" in svg for svg in drawings[name])
    pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).reshape(-1, 3)
    blue = (pixels == (31, 119, 180)).all(1)  # matplotlib's first colour, of the first line
    assert blue.sum() > 50 and (pixels == 255).all(1).mean() > 0.5


def test_equal_answers_are_one_line():
    answers = [("dense", "red", True), ("p = 0.9", "blue", False), ("p = 0.8", "red", True)]
    assert html.together(answers) == [
        ("dense; p = 0.8", "red", True),
        ("p = 0.9", "blue", False),
    ]
    assert html.together(answers[::2]) == [("all", "red", True)]
    assert html.together(answers[:1]) == [("dense", "red", True)]
