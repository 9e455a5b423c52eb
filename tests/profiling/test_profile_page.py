"""The page and the figures of a profile, from numbers made by hand."""

import io
import re

from rich.console import Console

from zipr1.profiling import plots, report


def rows_at(length, batch=1, scale=1.0, keep=0.25):
    """Dense takes 20 ms to the first token; `attention` 25 times scale, `layer` 10 times scale."""
    rows = []
    for skip, ratio, first in (
        ("none", 1.0, 20.0),
        ("attention", keep, 25.0 * scale),
        ("layer", keep, 10.0 * scale),
    ):
        place = {"length": length, "batch": batch, "keep": ratio, "skip": skip}
        timed = {
            **place, "ms": first, "ms_p20": first, "ms_p80": first, "dense_ms": 20.0, "speedup": 20.0 / first,
            "turns": 5, "noisy": True,
        }  # fmt: skip
        bound = 1.0 if skip == "none" else 3.0
        rows += [
            {"phase": "prefill_layer", **timed, "bound": bound, "phases": {"mlp": 1.0, "other": 0.5}, "overhead": 0.1},
            {"phase": "prefill", **timed, "bound": bound, "peak_bytes": 2**20 * ratio, "kv_bytes": 1},
            {"phase": "ttft", **timed, "extrapolated": False},
            {"phase": "decode", **timed, "bound": bound, "tokens_per_s": 1000 / first, "python_ms": 1.0},
            {"phase": "kv_cache", **place, "kv_bytes": 2**20 * ratio, "dense_kv_bytes": 2**20, "bound": bound},
        ]  # fmt: skip
    return rows


def result(*groups):
    return {
        "machine": {
            "hardware": {"device_name": None, "cpu": "a CPU", "threads": 2},
            "versions": {"torch": "2", "transformers": "5"},
        },
        "model": {
            "name": "<b>m</b> [red]x[/red]", "weights": "random", "layers": 2, "all_layers": 2, "dtype": "float32",
            "probes": 8, "p": None, "input": "random tokens", "counted": False,
        },
        "rows": [row for group in groups for row in group],
    }  # fmt: skip


def tiles(text):
    found = re.findall(r'<div class="tile">(.*?)</div>', text)
    clean = [re.sub(r"<[^>]+>", "|", tile).replace("&rarr;", "") for tile in found]
    return [[part.strip() for part in tile.split("|") if part.strip()] for tile in clean]


def test_the_page_begins_with_what_is_gained_at_the_longest_length(tmp_path):
    """The faster way to skip stands for sparse: 20 / 10 is 2.00 times faster, 1000 / 20 = 50 tokens become 100."""
    page = report.page(result(rows_at(64, scale=9.0), rows_at(128)), [])
    assert "<h1>2.00x faster than dense to the first token</h1>" in page
    assert "From dense to sparse with skip: layer; 128 tokens, random tokens." in page
    assert tiles(page) == [
        ["tokens kept", "100%", "25%", "of the prompt, mean over layers"],
        ["to the first token", "20 ms", "10 ms", "2.00x faster than dense"],
        ["decoding, tokens a second", "50", "100", "2.00x faster than dense"],
        ["keys and values", "1.0 MiB", "256 KiB", "75.0% saved"],
    ]
    # Noise is a remark at the end, and names are text.
    assert page.index("Decoding and memory") < page.index("the machine was noisy")
    assert "<b>m</b>" not in page and report.advice(result(rows_at(128))) == ""


def test_where_sparse_is_slower_a_line_says_why_and_what_to_try():
    slow = result(rows_at(128, scale=4.0))
    page = report.page(slow, [])
    assert "<h1>Slower than dense (0.50x) to the first token</h1>" in page
    assert "at 128 tokens, choosing tokens and moving rows costs more" in page
    out = io.StringIO()
    report.show(slow, Console(file=out, width=200))
    assert "zipr1 profile --model qwen2.5-vl-3b --lengths 1024" in out.getvalue()


def test_a_single_length_is_no_line(tmp_path):
    (tmp_path / "speedup.png").write_bytes(b"of an earlier call")
    one = result(rows_at(128), rows_at(128, batch=8))
    figures = plots.draw(one, report.longest(one), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["phases.png"] and len(figures) == 1
    assert plots.draw({"rows": []}, [], tmp_path) == []
    assert "Nothing was measured" in report.page(result(), [])


def test_lines_have_colours_of_their_own_and_hide_none(tmp_path):
    """Two keep ratios: dashed is what is described so; keys and values do not depend on what is skipped."""
    # Of a length dense is measured once: its rows are the first five.
    several = result(
        *(rows_at(n, keep=k)[0 if k == 0.25 else 5 :] for n in (64, 128) for k in (0.25, 0.1))
    )
    figures = plots.draw(several, report.longest(several), tmp_path)
    assert len(figures) == 5 and {p.name for p in tmp_path.iterdir()} == {
        "phases.png", "speedup.png", "memory.png",
    }  # fmt: skip
    gains, memory = (
        plots._figure(several, [plots.OVER_LENGTH[name][0]]).axes[0]
        for name in ("speedup", "memory")
    )
    solid = {line.get_label(): line for line in gains.lines if line.get_marker() == "o"}
    assert set(solid) == {"attention, 25%", "attention, 10%", "layer, 25%", "layer, 10%"}
    assert len({line.get_color() for line in solid.values()}) == 4
    assert list(solid["layer, 25%"].get_xdata()) == [64, 128]
    assert list(solid["layer, 25%"].get_ydata()) == [2.0, 2.0]
    dashed = [line for line in gains.lines if line.get_linestyle() == "--"]
    shown = [text.get_text() for text in gains.get_legend().get_texts()]
    assert len(dashed) == 4 and shown.count("at most, here") == 1
    assert not [line for line in memory.lines if line.get_linestyle() == "--"]
    kept = {line.get_label(): list(line.get_ydata()) for line in memory.lines}
    assert kept == {
        "dense": [1.0, 1.0],
        "attention and layer, 25%": [0.25, 0.25],
        "attention and layer, 10%": [0.1, 0.1],
    }
