"""One benchmark's result as plain values: the rows of results.json, and what the report shows beside them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from zipr1.evaluate.answers import Answerer, Conditions
from zipr1.evaluate.harness import Scored, lmms_eval_version
from zipr1.evaluate.scores import paired, suite_score, suite_units
from zipr1.evaluate.suites import Suite


def record(
    suite: Suite,
    scored: Sequence[Scored],
    answerer: Answerer,
    conditions: Conditions,
    asked: Sequence[float],
    seconds: float,
) -> dict[str, Any]:
    """benchmarks/<name>.json. asked: the budgets that get a row; dense is in every row."""
    notes = [note for one in scored for note in one.notes]
    answered = [a for one in scored for a in one.answered]
    with contextlib.redirect_stdout(io.StringIO()):  # MMBench's scorer prints
        units = [suite_units(suite, scored, turn) for turn in range(answerer.turns)]
    scores = [
        suite_score(suite, scored, turn, units[turn], notes) for turn in range(answerer.turns)
    ]
    said = [[a.said[turn] for a in answered] for turn in range(answerer.turns)]
    dense = answerer.budgets.index(1.0)
    base = len(answerer.budgets) if answerer.base is not None else None

    def part(turn: int) -> dict[str, Any]:
        some = said[turn]
        return {
            "score": scores[turn],
            "token_ratio": float(np.mean([s.token_ratio for s in some])),
            "kv_bytes": float(np.mean([s.kv_bytes for s in some])),
            "seconds": float(sum(s.seconds for s in some)),
            "layers": np.mean([s.layer_ratios for s in some], 0).tolist(),
            "tokens": float(np.mean([s.token_ratio * s.length for s in some])),
        }

    parts = [part(turn) for turn in range(answerer.turns)]
    metric = suite.metric if suite.tasks[0].metric else "+".join(scored[0].task.metric)
    rows = []
    for p in asked:
        turn = answerer.budgets.index(p)
        here = parts[turn]
        row: dict[str, Any] = {
            "task": suite.name,
            "metric": metric,
            "dense": scores[dense],
            "sparse": here["score"],
            **_difference(
                "difference", units[turn], units[dense], suite.top, scores[turn], scores[dense]
            ),
            "token_ratio": here["token_ratio"],
            "kv_bytes": here["kv_bytes"],
            "seconds": here["seconds"],
            "p": p,
            "n": len(answered),
            "top": suite.top,
            "dense_kv_bytes": parts[dense]["kv_bytes"],
            "dense_seconds": parts[dense]["seconds"],
            "same_answers": float(
                np.mean([a.text == b.text for a, b in zip(said[turn], said[dense], strict=True)])
            ),
        }
        if base is not None:
            row["base"] = scores[base]
            row |= _difference(
                "base_difference", units[turn], units[base], suite.top, scores[turn], scores[base]
            )
        rows.append(row)
    return {
        "task": suite.name,
        "kind": suite.kind,
        "average": suite.average,
        "rows": rows,
        "notes": notes,
        "conditions": conditions._asdict(),
        "prompt_tokens": float(np.mean([a.said[0].length for a in answered])),
        "decoding_seconds": float(sum(a.decoding for a in answered)),
        "vision_seconds": float(sum(a.vision for a in answered)),
        "wall_seconds": seconds,
        "layers": {str(p): parts[k]["layers"] for k, p in enumerate(answerer.budgets)},
        "lmms_eval": lmms_eval_version(),
        "gallery": _gallery(scored, answerer, base),
        "samples": _samples(scored, answerer, base),
    }


def _difference(
    name: str, a: Any, b: Any, top: float, score: float | None, other: float | None
) -> dict[str, Any]:
    """The difference with its interval; without one where samples hold no numbers."""
    found = paired(a, b, top)
    if found is not None:
        return {name: found[0], f"{name}_ci": found[1]}
    gap = None if score is None or other is None else score - other
    return {name: gap, f"{name}_ci": None}


def _names(answerer: Answerer, base: int | None) -> list[str]:
    return [*(f"{p:g}" for p in answerer.budgets), *(["base"] if base is not None else [])]


def _samples(
    scored: Sequence[Scored], answerer: Answerer, base: int | None
) -> list[dict[str, Any]]:
    """Every question's answers and token ratios, by budget."""
    names = _names(answerer, base)
    rows = []
    for one in scored:
        for sample, answered in zip(one.samples[0], one.answered, strict=True):
            rows.append(
                {
                    "task": one.task.name,
                    "doc_id": sample["doc_id"],
                    "target": str(sample["target"]),
                    "said": dict(zip(names, (s.text for s in answered.said), strict=True)),
                    "token_ratio": dict(
                        zip(names, (s.token_ratio for s in answered.said), strict=True)
                    ),
                }
            )
    return rows


def _gallery(
    scored: Sequence[Scored], answerer: Answerer, base: int | None
) -> list[dict[str, Any]]:
    """Questions with pictures of what was kept: at the highest budget below 1."""
    names = _names(answerer, base)
    found = []
    for one in scored[:1]:
        for sample, answered in zip(one.samples[0], one.answered, strict=True):
            if answered.pictures:
                turn = next(k for k, p in enumerate(answerer.budgets) if p < 1)
                found.append(
                    {
                        "question": str(sample["arguments"][0]),
                        "target": str(sample["target"]),
                        "said": dict(zip(names, (s.text for s in answered.said), strict=True)),
                        "p": answerer.budgets[turn],
                        "token_ratio": answered.said[turn].token_ratio,
                        "pictures": answered.pictures,
                    }
                )
    return found[: answerer.shown]  # several processes draw as many each
