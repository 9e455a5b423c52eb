"""The report of an evaluation, from numbers made by hand: the page, the table, report.md and the figures."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from zipr1.evaluate import html, plots, report

NAME = "<b>m|n</b> [red]x[/red]"


def row(p, sparse, ratio, **more):
    return {
        "task": NAME, "p": p, "n": 40, "top": 100.0, "dense": 80.0, "sparse": sparse, "token_ratio": ratio,
        "difference": sparse - 80.0, "difference_ci": [sparse - 82.0, sparse - 78.0], "kv_bytes": 2048 * ratio,
        "dense_kv_bytes": 2048, "seconds": 1.5, "dense_seconds": 2.0, **more,
    }  # fmt: skip


ROWS = [row(1.0, 80.0, 1.0), row(0.975, 79.0, 0.5), row(0.9, 70.0, 0.25)]
RECORD = {
    "task": NAME,
    "kind": "image",
    "rows": ROWS,
    "layers": {"1.0": [1.0, 1.0], "0.975": [0.6, 0.4], "0.9": [0.3, 0.2]},
    "conditions": {"max_new_tokens": 16},
    "prompt_tokens": 100.0,
    "decoding_seconds": 1.0,
    "vision_seconds": 1.0,
    "gallery": [
        {"pictures": ["AA==", "AA=="], "p": 0.975, "token_ratio": 0.5, "question": NAME, "target": NAME,
         "said": {"1": NAME, "0.975": ""}},
    ],
}  # fmt: skip
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


def test_names_on_the_page_are_text():
    page = html.page(RESULTS, [RECORD], {"pareto": "<svg><g/></svg>"})
    assert "<b>m|n" not in page and "<svg><g/></svg>" in page
    # title, heading, command; score; example: heading, question, right answer, answer; conditions, note, error.
    assert page.count("&lt;b&gt;m|n&lt;/b&gt; [red]x[/red]") == 11
    assert "<dd>-</dd>" in page  # an empty answer


def test_numbers_of_the_page():
    page = html.page(RESULTS, [RECORD], {})
    tiles = ["-1.00", "50.0%", "50.0%", "0.75x"]  # of p = 0.975, the highest below 1
    places = [page.index(f"<b>{number}</b>") for number in tiles]
    assert places == sorted(places) and page.count("<b>50.0%</b>") == 2
    for cell in ("79.00", "-1.00 ± 2.00", "-10.00 ± 2.00", "25.0%", "512 B", "0.75x"):
        assert f"<td>{cell}</td>" in page


def test_a_bar_in_a_name_does_not_break_the_table_of_report_md():
    lines = report.markdown(RESULTS, [RECORD], []).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(ROWS)
    assert {line.replace(r"\|", "").count("|") for line in table} == {table[0].count("|")}
    assert table[2].startswith(r"| <b>m\|n</b> [red]x[/red] | 40 |")


def test_the_terminal_shows_names_as_they_are():
    out = io.StringIO()
    Console(file=out, width=140, color_system=None).print(report.table(RESULTS, 140))
    assert f"{NAME}: float32, 2 CPU cores" in out.getvalue()


def test_figures_show_the_numbers():
    """Score over kept tokens and kept tokens by layer: dense is no point of the first and no line of the second."""
    pareto = plots._pareto([RECORD], RESULTS).axes[0]
    dense, sparse = (
        next(line for line in pareto.lines if line.get_label() == name)
        for name in ("dense 80.0", "sparse")
    )
    assert set(dense.get_ydata()) == {80.0}
    assert list(zip(*sparse.get_data(), strict=True)) == [(0.5, 79.0), (0.25, 70.0)]
    low, high = (ends[:, 1] for ends in bars(pareto))
    np.testing.assert_allclose((low, high), ([77, 81], [68, 72]))
    layers = plots._layers([RECORD]).axes[0]
    drawn = {line.get_label(): list(line.get_ydata()) for line in layers.lines}
    assert drawn == {"p = 0.975": [0.6, 0.4], "p = 0.9": [0.3, 0.2]}
    assert pareto.get_title(loc="left") == layers.get_title(loc="left") == NAME


def bars(ax):
    """The ends of each interval that is drawn."""
    (lines,) = [c for c in ax.collections if len(c.get_segments()) == 2]
    return lines.get_segments()


def test_no_interval_leaves_the_range_of_scores():
    record = {**RECORD, "rows": [row(1.0, 99.0, 1.0), row(0.9, 99.0, 0.5)]}
    record["rows"][1]["difference_ci"] = [10.0, 30.0]
    ends = [c.get_segments()[0][:, 1] for c in plots._pareto([record], RESULTS).axes[0].collections]
    assert [list(e) for e in ends] == [[90.0, 100.0]]


@pytest.mark.parametrize("name", ["pareto", "layers"])
def test_the_figures_are_files_and_drawings(tmp_path, name):
    drawings = plots.draw([RECORD], RESULTS, tmp_path)
    assert drawings[name].startswith("<svg") and "#1f77b4" in drawings[name]
    pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).reshape(-1, 3)
    blue = (pixels == (31, 119, 180)).all(
        1
    )  # matplotlib's first colour, #1f77b4, of the first line
    assert blue.sum() > 50 and (pixels == 255).all(1).mean() > 0.5
