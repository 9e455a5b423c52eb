"""results.json, the table of the terminal, and report.md, as values and text: the same numbers three times.

Nothing is written here: session.py does that, and html.py makes the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from zipr1.core import markdown as md
from zipr1.core.jsontext import plain
from zipr1.core.text import size, times
from zipr1.evaluate.folder import Folder
from zipr1.evaluate.suites import SUITES, Suite

WIDE = 100  # columns of a terminal that shows the whole table
# Of a row, what a mean over benchmarks has beside the scores.
MEANS = (
    "token_ratio", "kv_bytes", "dense_kv_bytes", "first_token_ms", "dense_first_token_ms",
    "untrained_token_ratio",
)  # fmt: skip


def collect(
    folder: Folder,
    suites: Sequence[Suite],
    meta: dict[str, Any],
    info: dict[str, Any],
    version: str,
) -> dict[str, Any]:
    """results.json: what lies in `folder`, in the order of the suites.

    version: of lmms-eval, as installed. Benchmarks that an earlier call measured name theirs themselves.
    """
    there = {p.stem for p in (folder.root / "benchmarks").glob("*.json")}
    order = [*SUITES, *sorted(there - set(SUITES))]
    records = [r for r in (folder.read(name) for name in order if name in there) if r is not None]
    asked = {suite.name for suite in suites}
    good = [r for r in records if "error" not in r]
    return dict(
        plain(
            {
                "rows": [row for r in good for row in r["rows"]],
                "averages": averages(good),
                "errors": [r for r in records if "error" in r and r["task"] in asked],
                "notes": list(dict.fromkeys(note for r in good for note in r["notes"])),
                "model": meta["model"],
                "base": meta["base"],
                "conditions": meta,
                "machine": info,
                "lmms_eval": ", ".join(dict.fromkeys(r.get("lmms_eval", version) for r in good))
                or version,
            }
        )
    )


def averages(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over benchmarks for each p: of images, of videos, of all; MME counts / 28 and OCRBench / 10.

    A benchmark counts as much as any other, however many questions it has: so do its tokens, bytes and milliseconds.
    speedup is the geometric mean, which is the same whichever of the two is called the faster.
    """
    rows = []
    groups = {"image": ("image",), "video": ("video",), "all": ("image", "video")}
    for name, kinds in groups.items():
        some = [r for r in records if r["kind"] in kinds]
        if len(some) < 2:
            continue
        for p in dict.fromkeys(row["p"] for r in some for row in r["rows"]):
            at_p = [(r["average"], row) for r in some for row in r["rows"] if row["p"] == p]
            row: dict[str, Any] = {"group": name, "p": p, "benchmarks": len(at_p)}
            for key in ("dense", "sparse", "difference", "base", "base_difference"):
                values = [one.get(key) for _, one in at_p]
                if all(v is not None for v in values):
                    row[key] = float(
                        np.mean([v / scale for v, (scale, _) in zip(values, at_p, strict=True)])
                    )
            for key in MEANS:
                if all(one.get(key) is not None for _, one in at_p):
                    row[key] = float(np.mean([one[key] for _, one in at_p]))
            speedups = [s for s in (speedup(one) for _, one in at_p) if s]
            if len(speedups) == len(at_p):
                row["speedup"] = float(np.exp(np.mean(np.log(speedups))))
            rows.append(row)
    return rows


def speedup(row: dict[str, Any]) -> float | None:
    """How many times faster than dense all of the language model's work is; above 1 is faster."""
    if row.get("speedup") or not row.get("seconds"):
        return row.get("speedup")
    return float(row["dense_seconds"] / row["seconds"])


def leading(results: dict[str, Any]) -> dict[str, Any] | None:
    """The row that stands for everything: of the highest p below 1, over all benchmarks. None where all is dense."""
    sparse = [row["p"] for row in results["rows"] if row["p"] < 1]
    if not sparse:
        return None
    means = [row for row in results["averages"] if row["group"] == "all"]
    return next(row for row in means or results["rows"] if row["p"] == max(sparse))


def is_mean(row: Sequence[str]) -> bool:
    """Whether a row of `cells` is one of averages."""
    return row[0].startswith("mean, ")


def headings(results: dict[str, Any]) -> list[str]:
    against = "base" if results["base"] else "dense"
    base = ["base"] if results["base"] else []
    return [
        "benchmark",
        "n",
        *base,
        "dense",
        "p",
        "sparse",
        f"- {against} (95 %)",
        "kept",
        "KV",
        "faster",
    ]


def cells(results: dict[str, Any]) -> list[list[str]]:
    """The table as text, a list a row; averages last."""
    rows = []
    has_base = bool(results["base"])
    key = "base_difference" if has_base else "difference"
    last = ""
    for row in results["rows"]:
        first = row["task"] != last
        last = row["task"]
        top = row["top"]
        rows.append(
            [
                row["task"] if first else "",
                f"{row['n']:,}" if first else "",
                *([score(row.get("base"), top) if first else ""] if has_base else []),
                score(row["dense"], top) if first else "",
                f"{row['p']:g}",
                score(row["sparse"], top),
                difference(row.get(key), row.get(f"{key}_ci"), top),
                f"{row['token_ratio']:.1%}",
                size(row["kv_bytes"]),
                times(speedup(row)) or "-",
            ]
        )
    for row in results["averages"]:
        rows.append(
            [
                f"mean, {row['group']}",
                f"{row['benchmarks']} sets",
                *([score(row.get("base"), 100)] if has_base else []),
                score(row.get("dense"), 100),
                f"{row['p']:g}",
                score(row.get("sparse"), 100),
                difference(row.get(key), None, 100),
                f"{row['token_ratio']:.1%}",
                size(row["kv_bytes"]) if "kv_bytes" in row else "",
                times(row.get("speedup")),
            ]
        )
    return rows


def table(results: dict[str, Any], width: int = 120) -> Table:
    """For a terminal of `width` columns; a narrow one gets fewer."""
    shown = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=Text(f"{results['model']}: {machine(results)}", style="bold"),
        title_justify="left",
        caption=Text(caption(results, width), style="table.caption"),
        caption_justify="left",
    )
    names = headings(results)
    left_out = () if width >= WIDE else ("KV", "faster")
    there = [k for k, name in enumerate(names) if name not in left_out]
    for k in there:
        shown.add_column(names[k], justify="right" if k else "left", no_wrap=True)
    for row in cells(results):
        style = "bold" if is_mean(row) else ""
        shown.add_row(*(Text(row[k], style=style) for k in there))
    return shown


def machine(results: dict[str, Any]) -> str:
    hardware = results["machine"]["hardware"]
    name = hardware["device_name"] or f"{hardware['cpus']} CPU cores"
    return f"{results['conditions']['dtype']}, {name}"


def caption(results: dict[str, Any], width: int = 120) -> str:
    """What the columns are that are shown at this width."""
    text = "dense: these weights with p = 1"
    if results["base"]:
        text = f"base: {results['base']}, untouched, dense; {text}"
    text += "; kept: of all tokens of a prompt, mean over layers"
    if width < WIDE:
        return text
    text += "; KV: bytes after a prefill; faster: dense time / this time in the language model"
    return text + (", in means the geometric one" if results["averages"] else "")


def score(value: float | None, top: float) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if top <= 100 else f"{value:.1f}"


def difference(value: float | None, interval: Sequence[float] | None, top: float) -> str:
    if value is None:
        return "-"
    digits = 2 if top <= 100 else 1
    text = f"{value:+.{digits}f}"
    if interval is None:
        return text
    half = max(interval[1] - value, value - interval[0])
    return f"{text} ± {half:.{digits}f}"


def conditions_text(record: dict[str, Any]) -> str:
    """How one benchmark was asked, in words."""
    c = record["conditions"]
    words = [
        f"{record['prompt_tokens']:,.0f} prompt tokens on average",
        f"answers of at most {c['max_new_tokens']} tokens"
        if c["max_new_tokens"]
        else "answers as long as the task allows",
    ]
    if record["kind"] == "video":
        rate = f"{c['fps']:g} frames a second" if c["fps"] else "all frames"
        words.append(f"{rate}, at most {c['frames']}, of at most {c['frame_pixels']:,} pixels")
    words.append(
        f"decoding {record['decoding_seconds']:.1f} s, vision {record['vision_seconds']:.1f} s, once for all p"
    )
    return ", ".join(words)


def markdown(
    results: dict[str, Any], records: Sequence[dict[str, Any]], drawings: Sequence[str]
) -> str:
    """report.md."""
    names = headings(results)
    lines = [
        f"# {md.text(results['model'])}",
        "",
        md.text(
            f"{machine(results)}; lmms-eval {results['lmms_eval']}; {results['machine']['started']}"
        ),
        "",
        md.code(" ".join(results["machine"]["command"])),
        "",
        _markdown_row(names),
        "|" + "---|" * len(names),
        *(_markdown_row(row) for row in cells(results)),
        "",
        f"*{md.text(caption(results))}. Greedy answers; the same pictures and frames for all columns.*",
        "",
        *(f"![{name}]({name}.png)\n" for name in drawings),
        *(f"* **{md.text(r['task'])}**: {md.text(conditions_text(r))}" for r in records),
    ]
    if results["notes"]:
        lines += [
            "",
            "## Corrections of lmms-eval's scores",
            "",
            *(f"* {md.text(n)}" for n in results["notes"]),
        ]
    if results["errors"]:
        lines += [
            "",
            "## Without a result",
            "",
            *(f"* {md.text(e['error'])}" for e in results["errors"]),
        ]
    return "\n".join(lines) + "\n"


def _markdown_row(row: Sequence[str]) -> str:
    return f"| {' | '.join(map(md.text, row))} |"
