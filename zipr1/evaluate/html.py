"""report.html: what the template evaluation.html of assets/templates shows, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zipr1.core.page import Column, Tile, compared, render
from zipr1.core.text import size
from zipr1.evaluate import report
from zipr1.evaluate.answers import BASE, UNTRAINED
from zipr1.evaluate.plots import TITLES
from zipr1.models.gallery import PLAIN

Answer = tuple[str, str, bool | None]
FEW = 2  # benchmarks whose examples are all shown; of more, one of each sort


def page(
    results: dict[str, Any],
    records: Sequence[dict[str, Any]],
    drawings: Mapping[str, Sequence[str]],
) -> str:
    """The whole report. results: results.json. records: its benchmarks' files. drawings: panels as SVG, by name."""
    lead = report.leading(results)
    galleries = [record for record in records if record["gallery"]]
    each = 3 if len(galleries) <= FEW else 1
    return render(
        "evaluation.html",
        title=f"{results['model']}: dense beside sparse",
        headline=_headline(results, lead),
        lead=_lead(results, lead),
        model=results["model"],
        started=results["machine"]["started"],
        machine=report.machine(results),
        lmms_eval=results["lmms_eval"],
        command=" ".join(results["machine"]["command"]),
        tiles=[] if lead is None else _tiles(results, lead),
        kept=[
            (
                record["task"],
                [_example(record, one) for one in record["gallery"] if one["first"]][:each],
            )
            for record in galleries
        ],
        kept_words="Bright: tokens that all layers keep; dark: tokens that all drop. The first questions of each "
        "benchmark; shares are of all tokens of the prompt, text among them, as in the table.",
        differing=_differing(galleries, each),
        counts=_counts(results),
        scores=_scores(results) if results["rows"] else None,
        drawings=[{"title": TITLES[name], "panels": panels} for name, panels in drawings.items()],
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


def _gap(results: dict[str, Any], row: Mapping[str, Any]) -> float | None:
    """The difference of a row's score to the base, or to dense where there is none, in points of 100."""
    gap = row.get("base_difference" if results["base"] else "difference")
    return None if gap is None else float(gap) / row.get("top", 100) * 100


def _headline(results: dict[str, Any], lead: Mapping[str, Any] | None) -> str:
    if lead is None:
        return f"{Path(results['model']).name}, dense"
    kept = f"{lead['token_ratio']:.1%} of the tokens"
    gap = _gap(results, lead)
    return kept if gap is None else f"{kept}, {gap:+.2f} points"


def _lead(results: dict[str, Any], lead: Mapping[str, Any] | None) -> str:
    """What is compared with what."""
    if lead is None:
        return ""
    before = f"{results['base']}, untouched and dense" if results["base"] else "dense"
    over = f"mean over {lead['benchmarks']} benchmarks" if "group" in lead else lead["task"]
    return f"From {before}, to sparse at p = {lead['p']:g}; {over}."


def _tiles(results: dict[str, Any], lead: Mapping[str, Any]) -> list[Tile]:
    """Tokens, points, time to the first token and memory: the numbers of `lead`, a row of the table."""
    key = "base_difference" if results["base"] else "difference"
    top = lead.get("top", 100)
    before = lead.get("base") if results["base"] else lead.get("dense")
    kept = lead.get("untrained_token_ratio")
    tiles = [
        Tile(
            "tokens kept", "100%", f"{lead['token_ratio']:.1%}",
            f"before training, at the same p: {kept:.1%}" if kept else "of the prompt, mean over layers",
        )
    ]  # fmt: skip
    if lead.get(key) is not None:
        points = report.difference(lead[key], lead.get(f"{key}_ci"), top)
        tiles.append(
            Tile("score", report.score(before, top), report.score(lead.get("sparse"), top), f"{points} points")
        )  # fmt: skip
    first, dense = lead.get("first_token_ms"), lead.get("dense_first_token_ms")
    if first and dense:
        words = f"{compared(dense, first)}, in the language model"
        tiles.append(Tile("to the first token, a question", _ms(dense), _ms(first), words))
    if lead.get("dense_kv_bytes"):
        saved = f"{1 - lead['kv_bytes'] / lead['dense_kv_bytes']:.1%} saved"
        tiles.append(
            Tile("keys and values", size(lead["dense_kv_bytes"]), size(lead["kv_bytes"]), f"{saved} after a prefill")
        )  # fmt: skip
    return tiles


def _ms(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _scores(results: dict[str, Any]) -> dict[str, Any]:
    rows = report.cells(results)
    return {
        "columns": [
            Column(name, number == 0) for number, name in enumerate(report.headings(results))
        ],
        "rows": rows,
        "strong": [number for number, row in enumerate(rows) if report.is_mean(row)],
        "caption": f"{report.caption(results)}. Greedy answers; the same pictures and frames in all columns; 95 % "
        "intervals from the paired samples.",
    }


def _counts(results: dict[str, Any]) -> list[str]:
    """Of each benchmark, at its highest p below 1, how many results are worse and how many better."""
    before = "the base" if results["base"] else "dense"
    lines = []
    for task in dict.fromkeys(row["task"] for row in results["rows"]):
        rows = [r for r in results["rows"] if r["task"] == task and r["p"] < 1 and "lost" in r]
        if rows:
            row = max(rows, key=lambda r: r["p"])
            lines.append(
                f"{task}, p = {row['p']:g}: of {row['compared']:,} questions {row['lost']:,} lost and "
                f"{row['won']:,} won against {before}; {row['same_answers']:.1%} of all answers have the words of dense"
            )
    return lines


def _differing(
    galleries: Sequence[dict[str, Any]], each: int
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Examples by sort, those that were lost first. each: of one sort and benchmark."""
    sorts: dict[str, list[dict[str, Any]]] = {
        "Lost": [],
        "Won": [],
        "Other words, no other score": [],
    }
    for record in galleries:
        count = dict.fromkeys(sorts, 0)
        for one in record["gallery"]:
            before, after = one["said"][one["before"]], one["said"][one["after"]]
            if before == after:
                continue
            old, new = (one["right"].get(name) for name in (one["before"], one["after"]))
            if old is None or new is None or old == new:
                sort = "Other words, no other score"
            else:
                sort = "Lost" if new < old else "Won"
            if count[sort] < each:
                count[sort] += 1
                sorts[sort].append(_example(record, one))
    return [(name, examples) for name, examples in sorts.items() if examples]


def _example(record: dict[str, Any], one: dict[str, Any]) -> dict[str, Any]:
    """A question with its picture, as it is and darkened where tokens were dropped. one: an entry of a gallery."""
    captions = {PLAIN: "as dense sees it"}
    for name, ratio in one["token_ratio"].items():
        words = "before training" if name == UNTRAINED else f"p = {one['p']:g}"
        captions[name] = f"{words}: {ratio:.1%} kept"
    order = [name for name in (PLAIN, UNTRAINED, one["after"]) if name in one["pictures"]]
    called = {"1": "dense", BASE: "base dense", UNTRAINED: f"base at p = {one['p']:g}"}
    said = dict(sorted(one["said"].items(), key=lambda pair: pair[0] not in (BASE, UNTRAINED)))
    return {
        "wide": record["kind"] == "video",
        "pictures": [
            (captions[name], f"data:image/jpeg;base64,{one['pictures'][name]}") for name in order
        ],
        "question": one["question"],
        "target": one["target"],
        "answers": together(
            [
                (called.get(name, f"p = {name}"), text, _is_right(one["right"].get(name)))
                for name, text in said.items()
            ]
        ),
    }


def together(answers: Sequence[Answer]) -> list[Answer]:
    """Equal answers in one line, in the order of the first of them. answers: who says it, the text, is it right."""
    names: dict[tuple[str, bool | None], list[str]] = {}
    for name, text, right in answers:
        names.setdefault((text, right), []).append(name)
    if len(names) == 1 and len(answers) > 1:
        return [("all", *one) for one in names]
    return [("; ".join(who), text, right) for (text, right), who in names.items()]


def _is_right(score: float | None) -> bool | None:
    return None if score is None else score >= 0.5


def _settings(conditions: dict[str, Any]) -> str:
    sparse, limit = conditions["sparse"], conditions["limit"]
    probes = f"{sparse['probes']['recent']} recent and {sparse['probes']['random']} random probes"
    last, short = sparse["keep_last"], sparse["dense_below"]
    always = "the last token" if last == 1 else f"the last {last} tokens"
    return (
        f"Selection: {sparse['rule']}, skip: {sparse['skip']}, {probes}, {always} always kept"
        f"{f', prompts under {short} tokens dense' if short else ''}. At most {conditions['max_pixels']:,} pixels a "
        f"picture.{f' First {limit} questions of each benchmark.' if limit else ''}"
    )
