"""report.html: one file that needs nothing else, no script and no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from zipr1.core.page import document
from zipr1.evaluate import report

STYLE = """
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; margin: 24px 0; }
.tile b { display: block; font-size: 26px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.shots { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 16px; }
.shots .wide { grid-column: 1 / -1; }
.pair { display: flex; gap: 8px; }
.wide .pair { flex-direction: column; }
.pair figure { margin: 0; flex: 1; min-width: 0; }
.pair img { width: 100%; border-radius: 6px; margin: 0; }
.wide .pair img { max-width: 780px; }
figcaption { color: var(--soft); font-size: 12px; margin-top: 3px; }
.question { font-weight: 600; margin: 12px 0 6px; white-space: pre-wrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 12px; margin: 0; font-size: 14px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""


def page(
    results: dict[str, Any], records: Sequence[dict[str, Any]], drawings: dict[str, str]
) -> str:
    """The whole report. drawings: SVG text by name."""
    body = [
        f"<h1>{escape(results['model'])}</h1>",
        f'<p class="soft">zipr1 eval, {escape(results["machine"]["started"])}, {escape(report.machine(results))}, '
        f"lmms-eval {results['lmms_eval']}<br><code>{escape(' '.join(results['machine']['command']))}</code></p>",
        _tiles(results, records),
    ]
    if results["rows"]:
        body += ["<h2>Scores</h2>", f'<div class="card">{_table(results)}</div>',
                 f'<p class="soft">{escape(report.caption(results))}. Greedy answers; the same pictures and frames in '
                 "all columns; 95 % intervals from the paired samples.</p>"]  # fmt: skip
    titles = {"pareto": "Score over kept tokens", "layers": "Tokens kept, by layer"}
    for name, drawing in drawings.items():
        body += [f"<h2>{titles[name]}</h2>", f'<div class="card">{drawing}</div>']
    for record in records:
        if record["gallery"]:
            body.append(f"<h2>What stays: {escape(record['task'])}</h2>")
            body.append(
                f'<div class="shots">{"".join(_shot(one, record["kind"]) for one in record["gallery"])}</div>'
            )
    if records:
        items = "".join(
            f"<li><b>{escape(r['task'])}</b>: {escape(report.conditions_text(r))}</li>"
            for r in records
        )
        body += ["<h2>Conditions</h2>", f"<ul>{items}</ul>", _settings(results)]
    for title, texts in (
        ("Corrections of lmms-eval's scores", results["notes"]),
        ("Without a result", [error["error"] for error in results["errors"]]),
    ):
        if texts:
            body += [
                f"<h2>{title}</h2>",
                "<ul>" + "".join(f"<li>{escape(t)}</li>" for t in texts) + "</ul>",
            ]
    return document(f"{results['model']}: dense beside sparse", "".join(body), STYLE)


def _tiles(results: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    """The highest budget below 1, in four numbers."""
    budgets = sorted({row["p"] for row in results["rows"] if row["p"] < 1})
    if not budgets:
        return ""
    p = budgets[-1]
    rows = [row for row in results["rows"] if row["p"] == p]
    kept = sum(row["token_ratio"] for row in rows) / len(rows)
    memory = sum(row["kv_bytes"] for row in rows) / sum(row["dense_kv_bytes"] for row in rows)
    against = "base" if results["base"] else "dense"
    key = "base_difference" if results["base"] else "difference"
    gaps = [row[key] / row["top"] * 100 for row in rows if row.get(key) is not None]
    spent = sum(row["seconds"] for row in rows) / max(
        1e-9, sum(row["dense_seconds"] for row in rows)
    )
    tiles = [
        (
            f"{kept:.1%}",
            f"tokens kept at p = {p:g}, mean over layers and {len(rows)} benchmark{'s'[: len(rows) > 1]}",
        ),
        (f"{1 - memory:.1%}", "KV memory saved after the prefill"),
        (f"{spent:.2f}x", "time in the language model, of dense"),
    ]
    if gaps:
        tiles.insert(
            0,
            (f"{sum(gaps) / len(gaps):+.2f}", f"points, sparse - {against}, mean over benchmarks"),
        )
    inner = "".join(
        f'<div class="tile"><b>{escape(n)}</b><span class="soft">{escape(t)}</span></div>'
        for n, t in tiles
    )
    return f'<div class="tiles">{inner}</div>'


def _table(results: dict[str, Any]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in report.headings(results))
    rows = []
    for row in report.cells(results):
        mean = ' class="mean"' if row[0].startswith("mean, ") else ""
        rows.append(f"<tr{mean}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _shot(one: dict[str, Any], kind: str) -> str:
    plain, lit = (f"data:image/jpeg;base64,{p}" for p in one["pictures"])
    answers = "".join(
        f"<dt>{ {'1': 'dense', 'base': 'base'}.get(name, f'p = {name}') }</dt><dd>{escape(text) or '-'}</dd>"
        for name, text in one["said"].items()
    )
    share = (
        f"p = {one['p']:g}: {one['token_ratio']:.1%} of the prompt kept; bright: kept by all layers"
    )
    return (
        f'<div class="card{" wide" if kind == "video" else ""}"><div class="pair">'
        f'<figure><img alt="as it is" src="{plain}"><figcaption>as the dense model sees it</figcaption></figure>'
        f'<figure><img alt="kept tokens" src="{lit}"><figcaption>{escape(share)}</figcaption></figure></div>'
        f'<div class="question">{escape(one["question"])}</div>'
        f"<dl><dt>right</dt><dd>{escape(one['target'])}</dd>{answers}</dl></div>"
    )


def _settings(results: dict[str, Any]) -> str:
    c = results["conditions"]
    sparse = c["sparse"]
    probes = f"{sparse['probes']['recent']} recent and {sparse['probes']['random']} random probes"
    text = (
        f"Selection: {sparse['rule']}, skip: {sparse['skip']}, {probes}, the last {sparse['keep_last']} tokens always "
        f"kept, prompts under {sparse['dense_below']} tokens dense. At most {c['max_pixels']:,} pixels a picture. "
        f"{'First ' + str(c['limit']) + ' questions of each benchmark.' if c['limit'] else ''}"
    )
    return f'<p class="soft">{escape(text)}</p>'
