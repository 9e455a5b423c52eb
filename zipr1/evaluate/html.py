"""report.html: what the template evaluation.html of assets/templates shows, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zipr1.core.page import Column, render
from zipr1.evaluate import report

TITLES = {"pareto": "Score over kept tokens", "layers": "Tokens kept, by layer"}


def page(
    results: dict[str, Any], records: Sequence[dict[str, Any]], drawings: dict[str, str]
) -> str:
    """The whole report. results: results.json. records: its benchmarks' files. drawings: SVG text by name."""
    return render(
        "evaluation.html",
        title=f"{results['model']}: dense beside sparse",
        model=results["model"],
        started=results["machine"]["started"],
        machine=report.machine(results),
        lmms_eval=results["lmms_eval"],
        command=" ".join(results["machine"]["command"]),
        tiles=_tiles(results),
        scores=_scores(results) if results["rows"] else None,
        drawings=[{"title": TITLES[name], "svg": svg} for name, svg in drawings.items()],
        examples=[
            {
                "task": record["task"],
                "wide": record["kind"] == "video",
                "examples": [_example(one) for one in record["gallery"]],
            }
            for record in records
            if record["gallery"]
        ],
        conditions=[(record["task"], report.conditions_text(record)) for record in records],
        settings=_settings(results["conditions"]),
        lists=[
            (title, lines)
            for title, lines in (
                ("Corrections of lmms-eval's scores", results["notes"]),
                ("Without a result", [error["error"] for error in results["errors"]]),
            )
            if lines
        ],
    )


def _tiles(results: dict[str, Any]) -> list[dict[str, str]]:
    """The highest p below 1, in four numbers; none where all is dense."""
    sparse = sorted({row["p"] for row in results["rows"] if row["p"] < 1})
    if not sparse:
        return []
    p = sparse[-1]
    rows = [row for row in results["rows"] if row["p"] == p]
    kept = sum(row["token_ratio"] for row in rows) / len(rows)
    memory = sum(row["kv_bytes"] for row in rows) / sum(row["dense_kv_bytes"] for row in rows)
    dense_seconds = sum(row["dense_seconds"] for row in rows)
    time = sum(row["seconds"] for row in rows) / max(1e-9, dense_seconds)
    against = "base" if results["base"] else "dense"
    key = "base_difference" if results["base"] else "difference"
    gaps = [row[key] / row["top"] * 100 for row in rows if row.get(key) is not None]
    benchmarks = f"{len(rows)} benchmark{'s' if len(rows) > 1 else ''}"
    numbers = {
        f"tokens kept at p = {p:g}, mean over layers and {benchmarks}": f"{kept:.1%}",
        "KV memory saved after the prefill": f"{1 - memory:.1%}",
        "time in the language model, of dense": f"{time:.2f}x",
    }
    if gaps:
        points = f"points, sparse - {against}, mean over benchmarks"
        numbers = {points: f"{sum(gaps) / len(gaps):+.2f}", **numbers}
    return [{"number": number, "meaning": meaning} for meaning, number in numbers.items()]


def _scores(results: dict[str, Any]) -> dict[str, Any]:
    rows = report.cells(results)
    return {
        "columns": [Column(name, False) for name in report.headings(results)],
        "rows": rows,
        "strong": [number for number, row in enumerate(rows) if report.is_mean(row)],
        "caption": f"{report.caption(results)}. Greedy answers; the same pictures and frames in all columns; 95 % "
        "intervals from the paired samples.",
    }


def _example(one: dict[str, Any]) -> dict[str, Any]:
    """A question with its picture, as it is and darkened where tokens were dropped. one: an entry of a gallery."""
    plain, kept = (f"data:image/jpeg;base64,{picture}" for picture in one["pictures"])
    names = {"1": "dense", "base": "base"}
    return {
        "plain": plain,
        "kept": kept,
        "share": f"p = {one['p']:g}: {one['token_ratio']:.1%} of the prompt kept; bright: kept by all layers",
        "question": one["question"],
        "target": one["target"],
        "answers": [
            (names.get(name, f"p = {name}"), answer) for name, answer in one["said"].items()
        ],
    }


def _settings(conditions: dict[str, Any]) -> str:
    sparse, limit = conditions["sparse"], conditions["limit"]
    probes = f"{sparse['probes']['recent']} recent and {sparse['probes']['random']} random probes"
    return (
        f"Selection: {sparse['rule']}, skip: {sparse['skip']}, {probes}, the last {sparse['keep_last']} tokens always "
        f"kept, prompts under {sparse['dense_below']} tokens dense. At most {conditions['max_pixels']:,} pixels a "
        f"picture.{f' First {limit} questions of each benchmark.' if limit else ''}"
    )
