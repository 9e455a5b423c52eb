"""One benchmark's result as plain values: the rows of results.json, and what the report shows beside them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from zipr1.core.text import one_line
from zipr1.evaluate.answers import BASE, UNTRAINED, Answer, Answered, Answerer, Conditions
from zipr1.evaluate.harness import Scored, lmms_eval_version
from zipr1.evaluate.scores import name_of, right, suite_score, suite_units
from zipr1.evaluate.suites import Suite
from zipr1.evaluate.units import Units, paired

LONGEST = 400  # characters of a question that are kept beside its answers


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
    place = {v.name: i for i, v in enumerate(answerer.variants)}
    number = {v.p: i for i, v in enumerate(answerer.variants) if v.name not in (BASE, UNTRAINED)}
    dense = number[1.0]
    base, untrained = place.get(BASE), place.get(UNTRAINED)

    def against(name: str, ours: int, other: int) -> dict[str, Any]:
        """The difference of two variants' scores, with its interval where samples hold numbers. Of one and itself it is
        nothing, for certain."""
        if ours == other and scores[ours] is not None:
            return {name: 0.0, f"{name}_ci": [0.0, 0.0]}
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
            "speedup": means[dense]["seconds"] / max(1e-9, means[sparse]["seconds"]),
            "first_token_ms": means[sparse]["first_token_ms"],
            "p": p,
            "n": len(answered),
            "top": suite.top,
            "dense_kv_bytes": means[dense]["kv_bytes"],
            "dense_seconds": means[dense]["seconds"],
            "dense_first_token_ms": means[dense]["first_token_ms"],
            "same_answers": float(
                np.mean(
                    [a.text == b.text for a, b in zip(answers[sparse], answers[dense], strict=True)]
                )
            ),
        }
        row |= changed(units[dense if base is None else base], units[sparse])
        if base is not None:
            row |= {"base": scores[base], **against("base_difference", sparse, base)}
        if untrained is not None and p == answerer.variants[untrained].p:
            row |= {"untrained": scores[untrained]}
            row |= {"untrained_token_ratio": means[untrained]["token_ratio"]}
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
        "layers": {str(p): means[v]["layers"] for p, v in number.items()}
        | ({} if untrained is None else {UNTRAINED: means[untrained]["layers"]}),
        "lmms_eval": lmms_eval_version(),
        "gallery": _gallery(scored[0], answerer),
        "samples": _samples(scored, answerer),
        "units": _units(units, list(place)),
    }


def changed(before: Units, after: Units) -> dict[str, int]:
    """Of how many units the result is worse after, and of how many better; empty where samples hold no number."""
    if before.score is None or after.score is None or len(before.score) != len(after.score):
        return {}
    return {
        "lost": int((after.score < before.score).sum()),
        "won": int((after.score > before.score).sum()),
        "compared": len(after.score),
    }


def _means(answers: Sequence[Answer]) -> dict[str, Any]:
    """Of one variant, over questions; seconds are the sum. first_token_ms: in the language model, the median question's
    share of its batch's prefill, for a first batch takes longer."""
    return {
        "token_ratio": float(np.mean([a.token_ratio for a in answers])),
        "kv_bytes": float(np.mean([a.kv_bytes for a in answers])),
        "seconds": float(sum(a.seconds for a in answers)),
        "first_token_ms": 1e3 * float(np.median([a.prefill_seconds for a in answers])),
        "layers": np.mean([a.layer_ratios for a in answers], 0).tolist(),
    }


def _texts(answerer: Answerer, answered: Answered) -> dict[str, str]:
    """A question's answers by the names of the variants."""
    return {v.name: a.text for v, a in zip(answerer.variants, answered.answers, strict=True)}


def _samples(scored: Sequence[Scored], answerer: Answerer) -> list[dict[str, Any]]:
    """Every question's answers, how right they are and token ratios, by variant."""
    return [
        {
            "task": one.task.name,
            "doc_id": sample["doc_id"],
            "name": f"{one.task.name}/{name_of(sample)}",
            "question": one_line(sample["arguments"][0], LONGEST),
            "target": str(sample["target"]),
            "said": _texts(answerer, answered),
            "right": {v.name: _right(one, k, i) for k, v in enumerate(answerer.variants)},
            "token_ratio": {
                v.name: a.token_ratio
                for v, a in zip(answerer.variants, answered.answers, strict=True)
            },
        }
        for one in scored
        for i, (sample, answered) in enumerate(zip(one.samples[0], one.answered, strict=True))
    ]


def _units(units: Sequence[Units], names: Sequence[str]) -> dict[str, Any]:
    """What the score is made of, by variant, so that another evaluation can be paired with this one."""
    one = units[0]
    return {
        "name": one.name,
        "weight": one.weight.tolist(),
        "cluster": [str(c) for c in one.cluster],
        "score": {
            name: None if u.score is None else u.score.tolist()
            for name, u in zip(names, units, strict=True)
        },
    }


def _gallery(scored: Scored, answerer: Answerer) -> list[dict[str, Any]]:
    """Questions with pictures of what was kept by the sparse variant with the highest p below 1, and by the base there.

    before, after: the names of the variants that are held against each other. right: how right their answers are, in
    [0, 1], where the benchmark's samples tell. first: one of the first questions, drawn whatever its answers are.
    """
    names = [v.name for v in answerer.variants]
    examples: list[dict[str, Any]] = []
    for i, answered in enumerate(scored.answered):
        if not answered.pictures or answerer.before is None or answerer.after is None:
            continue
        after = names.index(answerer.after)
        sample = scored.samples[0][i]
        ratios = {n: a.token_ratio for n, a in zip(names, answered.answers, strict=True)}
        scores = {n: _right(scored, v, i) for v, n in enumerate(names)}
        examples.append(
            {
                "question": str(sample["arguments"][0]),
                "target": str(sample["target"]),
                "said": _texts(answerer, answered),
                "right": scores,
                "p": answerer.variants[after].p,
                "before": answerer.before,
                "after": answerer.after,
                "token_ratio": {n: ratios[n] for n in answered.pictures if n in ratios},
                "pictures": answered.pictures,
                "first": answered.first,
            }
        )
    first = [e for e in examples if e["first"]][: answerer.shown]  # several processes draw as many
    return first + [e for e in examples if not e["first"]]


def _right(scored: Scored, variant: int, index: int) -> float | None:
    sample = scored.samples[variant][index]
    values = [sample[key] for key in scored.task.metric if key in sample]
    try:
        return right(values[0]) if values else None
    except ValueError:
        return None
