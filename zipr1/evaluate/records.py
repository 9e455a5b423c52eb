"""One benchmark's result as plain values: the rows of results.json, and what the report shows beside them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from zipr1.evaluate.answers import BASE, Answer, Answered, Answerer, Conditions
from zipr1.evaluate.harness import Scored, lmms_eval_version
from zipr1.evaluate.scores import paired, suite_score, suite_units
from zipr1.evaluate.suites import Suite


def record(
    suite: Suite,
    scored: Sequence[Scored],
    answerer: Answerer,
    conditions: Conditions,
    reported: Sequence[float],
    seconds: float,
) -> dict[str, Any]:
    """benchmarks/<name>.json. reported: the values of p that get a row; dense is in every row."""
    variants = range(len(answerer.variants))
    notes = [note for one in scored for note in one.notes]
    answered = [a for one in scored for a in one.answered]
    with contextlib.redirect_stdout(io.StringIO()):  # MMBench's scorer prints
        units = [suite_units(suite, scored, v) for v in variants]
    scores = [suite_score(suite, scored, v, units[v], notes) for v in variants]
    answers = [[a.answers[v] for a in answered] for v in variants]
    means = [_means(some) for some in answers]
    number = {v.p: i for i, v in enumerate(answerer.variants) if v.name != BASE}
    dense = number[1.0]
    base = next((i for i, v in enumerate(answerer.variants) if v.name == BASE), None)

    def against(name: str, ours: int, other: int) -> dict[str, Any]:
        """The difference of two variants' scores, with its interval where samples hold numbers."""
        difference = paired(units[ours], units[other], suite.top)
        if difference is not None:
            return {name: difference[0], f"{name}_ci": difference[1]}
        a, b = scores[ours], scores[other]
        return {name: None if a is None or b is None else a - b, f"{name}_ci": None}

    rows = []
    for p in reported:
        sparse = number[p]
        row: dict[str, Any] = {
            "task": suite.name,
            "metric": suite.metric if suite.tasks[0].metric else "+".join(scored[0].task.metric),
            "dense": scores[dense],
            "sparse": scores[sparse],
            **against("difference", sparse, dense),
            "token_ratio": means[sparse]["token_ratio"],
            "kv_bytes": means[sparse]["kv_bytes"],
            "seconds": means[sparse]["seconds"],
            "p": p,
            "n": len(answered),
            "top": suite.top,
            "dense_kv_bytes": means[dense]["kv_bytes"],
            "dense_seconds": means[dense]["seconds"],
            "same_answers": float(
                np.mean(
                    [a.text == b.text for a, b in zip(answers[sparse], answers[dense], strict=True)]
                )
            ),
        }
        if base is not None:
            row |= {"base": scores[base], **against("base_difference", sparse, base)}
        rows.append(row)
    return {
        "task": suite.name,
        "kind": suite.kind,
        "average": suite.average,
        "rows": rows,
        "notes": notes,
        "conditions": conditions._asdict(),
        "prompt_tokens": float(np.mean([a.answers[0].prompt_tokens for a in answered])),
        "decoding_seconds": float(sum(a.decoding_seconds for a in answered)),
        "vision_seconds": float(sum(a.vision_seconds for a in answered)),
        "wall_seconds": seconds,
        "layers": {str(p): means[v]["layers"] for p, v in number.items()},
        "lmms_eval": lmms_eval_version(),
        "gallery": _gallery(scored, answerer),
        "samples": _samples(scored, answerer),
    }


def _means(answers: Sequence[Answer]) -> dict[str, Any]:
    """Of one variant, over questions; seconds are the sum."""
    return {
        "token_ratio": float(np.mean([a.token_ratio for a in answers])),
        "kv_bytes": float(np.mean([a.kv_bytes for a in answers])),
        "seconds": float(sum(a.seconds for a in answers)),
        "layers": np.mean([a.layer_ratios for a in answers], 0).tolist(),
    }


def _texts(answerer: Answerer, answered: Answered) -> dict[str, str]:
    """A question's answers by the names of the variants."""
    return {v.name: a.text for v, a in zip(answerer.variants, answered.answers, strict=True)}


def _samples(scored: Sequence[Scored], answerer: Answerer) -> list[dict[str, Any]]:
    """Every question's answers and token ratios, by variant."""
    return [
        {
            "task": one.task.name,
            "doc_id": sample["doc_id"],
            "target": str(sample["target"]),
            "said": _texts(answerer, answered),
            "token_ratio": {
                v.name: a.token_ratio
                for v, a in zip(answerer.variants, answered.answers, strict=True)
            },
        }
        for one in scored
        for sample, answered in zip(one.samples[0], one.answered, strict=True)
    ]


def _gallery(scored: Sequence[Scored], answerer: Answerer) -> list[dict[str, Any]]:
    """Questions with pictures of what was kept: in the first sparse variant, the one with the highest p below 1."""
    examples = []
    for sample, answered in zip(scored[0].samples[0], scored[0].answered, strict=True):
        if answered.pictures:
            sparse = next(i for i, v in enumerate(answerer.variants) if v.p < 1)
            examples.append(
                {
                    "question": str(sample["arguments"][0]),
                    "target": str(sample["target"]),
                    "said": _texts(answerer, answered),
                    "p": answerer.variants[sparse].p,
                    "token_ratio": answered.answers[sparse].token_ratio,
                    "pictures": answered.pictures,
                }
            )
    return examples[: answerer.shown]  # several processes draw as many each
