"""From lmms-eval's samples to scores that can be compared pair by pair.

A benchmark's score is a weighted sum over its units (units.py): a question; for MME the two questions about a picture;
for MMBench the rotations of one question. The weighted sum of one model's units must be lmms-eval's own number; where
it is not, that is corrected or noted, and the report says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from zipr1.evaluate.harness import Scored
from zipr1.evaluate.suites import SUITES, Suite
from zipr1.evaluate.units import Units, question_name

# Fields of a sample's document that say which picture or clip it is about.
CLUSTERS = (
    "picture",
    "videoID",
    "video",
    "video_name",
    "video_path",
    "video_idx",
    "video_id",
    "image_id",
)
PAIRS = (("parsed_pred", "answer"), ("pred_answer", "answer"), ("pred", "ground_truth"))


def right(value: Any) -> float:
    """How right one sample is, from what its scorer logged: a number, a score, or an answer beside the gold one."""
    if isinstance(value, bool | int | float | np.number):
        return float(value)
    if isinstance(value, dict):
        if isinstance(value.get("score"), int | float):
            return float(value["score"])
        for answer, gold in PAIRS:
            if answer in value and gold in value:
                return float(str(value[answer]) == str(value[gold]))
    raise ValueError("no number")


def _values(scored: Scored, variant: int) -> list[tuple[dict[str, Any], Any]]:
    """(sample, what the metric logged); samples that do not count for the metric are left out."""
    return [
        (sample, sample[key])
        for sample in scored.samples[variant]
        for key in scored.task.metric
        if key in sample
    ]


def _cluster(sample: dict[str, Any], index: int) -> Any:
    doc = sample.get("doc", {})
    return next((str(doc[name]) for name in CLUSTERS if doc.get(name)), f"#{index}")


def name_of(sample: dict[str, Any]) -> str:
    """What a sample's question is called in every evaluation."""
    question = sample.get("arguments", [""])[0]
    return question_name(sample.get("doc_id", ""), question, sample.get("target", ""))


def _mean(scored: Scored, variant: int, top: float) -> Units:
    pairs = _values(scored, variant)
    try:
        score = np.array([right(value) for _, value in pairs])
    except ValueError:
        score = None
    if score is not None and len(score) and (score.min() < 0 or score.max() > 1):
        score = None
    clusters = [_cluster(sample, i) for i, (sample, _) in enumerate(pairs)]
    names = [name_of(sample) for sample, _ in pairs]
    return Units(score, np.full(len(pairs), top / max(1, len(pairs))), clusters, names)


def _macro(field: str) -> Callable[[Scored, int, float], Units]:
    """The mean over the values of `field` of the means within them."""

    def units(scored: Scored, variant: int, top: float) -> Units:
        plain = _mean(scored, variant, top)
        kinds = [value[field] for _, value in _values(scored, variant)]
        sizes = Counter(kinds)
        weight = np.array([top / len(sizes) / sizes[kind] for kind in kinds])
        return Units(plain.score, weight, plain.cluster, plain.name)

    return units


def _mme(scored: Scored, variant: int, top: float) -> Units:
    """A unit is a picture's two questions: half for each right one, half again for both; 200 points a category."""
    right_of: dict[tuple[str, str], float] = {}
    for _, value in _values(scored, variant):
        picture = (value["category"], value["question_id"])
        right_of[picture] = right_of.get(picture, 0) + value["score"]
    sizes = Counter(category for category, _ in right_of)
    score = np.array([(n / 2 + (n == 2)) / 2 for n in right_of.values()])
    weight = np.array([200 / sizes[category] for category, _ in right_of])
    return Units(score, weight, list(right_of), [f"{a}/{b}" for a, b in right_of])


def _mmbench(scored: Scored, variant: int, top: float) -> Units:
    """A unit is a question with its rotated options, right if all are; judged by lmms-eval's own matching."""
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    rotations: dict[int, list[Any]] = {}
    for _, value in _values(scored, variant):
        rotations.setdefault(int(value["index"]) % 1_000_000, []).append(value)
    # A limit may leave rotations without their question, which lmms-eval does not count.
    whole = {q: some for q, some in rotations.items() if any(r["index"] < 1_000_000 for r in some)}
    score = [mmbench_evaluator.eval_result(some, "static")[0] for some in whole.values()]
    weight = np.full(len(whole), top / len(whole))
    return Units(np.array(score, float), weight, list(whole), [str(q) for q in whole])


UNITS: dict[str, Callable[[Scored, int, float], Units]] = {
    "mean": _mean,
    "mme": _mme,
    "mmbench": _mmbench,
    "mmstar": _macro("l2_category"),
    "mlvu": _macro("task_type"),
}


def suite_units(suite: Suite, scored: Sequence[Scored], variant: int) -> Units:
    """A benchmark's units in one variant; its tasks count alike."""
    parts = [UNITS[suite.units](one, variant, suite.top / len(scored)) for one in scored]
    score = None
    if all(part.score is not None for part in parts):
        score = np.concatenate([part.score for part in parts if part.score is not None])
    clusters = [(k, c) for k, part in enumerate(parts) for c in part.cluster]
    names = [
        f"{one.task.name}/{n}" for one, part in zip(scored, parts, strict=True) for n in part.name
    ]
    return Units(score, np.concatenate([part.weight for part in parts]), clusters, names)


def suite_score(
    suite: Suite, scored: Sequence[Scored], variant: int, units: Units, notes: list[str]
) -> float | None:
    """The shown score: lmms-eval's number where it is right, else ours, with a note that names the correction."""
    headlines = [one.headline[variant] for one in scored]
    numbers = [number for number in headlines if number is not None]
    theirs = sum(numbers) * suite.scale / len(headlines) if len(numbers) == len(headlines) else None
    ours = units.total
    if suite.name not in SUITES and None not in (ours, theirs):
        # Of other tasks only the samples tell whether 1 or 100 is the highest score.
        scaled = theirs * 100  # type: ignore[operator]
        theirs = scaled if abs(scaled - ours) <= 2e-4 * suite.top else theirs  # type: ignore[operator]
    if ours is None or theirs is None or abs(ours - theirs) <= 2e-4 * suite.top:
        return theirs if theirs is not None else ours
    note = CORRECTIONS.get(suite.name)
    if note is None:
        return _noted(
            notes,
            "the mean over the logged samples is not lmms-eval's number, which is shown",
            theirs,
        )
    return _noted(notes, note, ours)


# Where the score over samples replaces lmms-eval's number when they differ, and why.
CORRECTIONS = {
    "mvbench": "MVBench: empty answers count as wrong; lmms-eval leaves them out of the denominator",
    "ocrbench": "OCRBench: the sum is divided by the number of questions asked; lmms-eval divides by 1000 always",
    "mlvu": "MLVU: the mean is over the kinds of question asked; lmms-eval counts absent kinds as 0",
}


def _noted(notes: list[str], note: str, value: float) -> float:
    if note not in notes:
        notes.append(note)
    return value
