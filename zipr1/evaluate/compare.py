"""Two runs, or two evaluations, side by side: what their folders hold, paired where the questions are the same.

Nothing is loaded or asked again, and no torch is needed: an evaluation's files have every question's score, and so has
after.json of a run (its held-out questions at the inference p).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zipr1.core.errors import InputError
from zipr1.core.load import load_written
from zipr1.core.recipe import Recipe
from zipr1.core.records import After, Benchmark, Results, read_json, wrong
from zipr1.core.rundir import read_lines
from zipr1.evaluate.units import Units, matched, paired, question_name

# What a folder must hold to be compared, by kind.
NEEDED = {"run": ("recipe.yaml", "after.json"), "evaluation": ("eval.json", "results.json")}


@dataclass
class Line:
    """One benchmark, or task of held-out questions, at one p. score: 0 to top. kv_bytes, first_token_ms: means of a
    question, None where nobody knows. asked: by the name of a question what was asked, the right answer, what was said
    and how right it is, in [0, 1] or None."""

    p: float
    n: int
    score: float | None
    top: float
    token_ratio: float
    kv_bytes: float | None
    first_token_ms: float | None
    units: Units | None
    asked: Mapping[str, tuple[str, str, str, float | None]]


@dataclass
class Side:
    """One folder. lines: by benchmark and p. run: its metrics and recipe, where it is a run."""

    name: str
    path: Path
    kind: str
    lines: dict[str, dict[float, Line]]
    run: tuple[list[dict[str, Any]], Recipe] | None = None


@dataclass
class Pair:
    """One benchmark on both sides. gap: score of b less score of a, with its 95 % interval where `paired` questions
    are the same (0: there are none, and scores alone are compared)."""

    task: str
    a: Line
    b: Line
    gap: float | None
    interval: list[float] | None
    paired: int
    differing: list[tuple[str, str, str, str, float, float]] = field(default_factory=list)


def read(path: Path) -> Side:
    """What a folder holds. Raises InputError for a folder that is neither a finished run nor an evaluation."""
    for kind, names in NEEDED.items():
        if (path / names[0]).is_file():
            if not (path / names[1]).is_file():
                what = "its training has not ended, or was of an older zipr1"
                what = what if kind == "run" else "nothing was measured yet"
                raise InputError(f"{path}: no {names[1]} ({what}); finish it, then compare")
            try:
                return _run(path) if kind == "run" else _evaluation(path)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise InputError(
                    f"{path}: not written by this version of zipr1 ({type(error).__name__}: {error}); "
                    "make it again to compare it"
                ) from None
    raise InputError(
        f"{path}: neither a run nor an evaluation; give folders that zipr1 train or zipr1 eval wrote"
    )


def compare(a: Side, b: Side) -> list[Pair]:
    """The benchmarks that both have, at every p below 1 that both have; else each at its own highest.

    Raises InputError for a run beside an evaluation, and where no benchmark is in both.
    """
    if a.kind != b.kind:
        raise InputError(
            f"{a.path} is of zipr1 {_command(a)} and {b.path} of zipr1 {_command(b)}; give two of the same kind"
        )
    pairs = []
    for task in a.lines:
        if task in b.lines:
            for p, q in _values(a.lines[task], b.lines[task]):
                pairs.append(_pair(task, a.lines[task][p], b.lines[task][q]))
    if not pairs:
        raise InputError(
            f"{a.path} has {', '.join(a.lines) or 'nothing'} and {b.path} {', '.join(b.lines) or 'nothing'}: no "
            "benchmark is in both; give two that share one"
        )
    return pairs


def leading(pairs: Sequence[Pair]) -> list[Pair]:
    """Of each benchmark the pair with the highest p: what the statement is made of."""
    best: dict[str, Pair] = {}
    for pair in pairs:
        if pair.task not in best or pair.a.p > best[pair.task].a.p:
            best[pair.task] = pair
    return list(best.values())


def mean_gap(pairs: Sequence[Pair]) -> tuple[float | None, float | None]:
    """The mean difference in points of 100, and half of its 95 % interval, of benchmarks that count alike. Their
    questions are not the same, so variances add; None without numbers."""
    if any(pair.gap is None for pair in pairs):
        return None, None
    mean = float(np.mean([pair.gap / pair.a.top * 100 for pair in pairs if pair.gap is not None]))
    if any(pair.interval is None for pair in pairs):
        return mean, None
    halves = [
        max(pair.interval[1] - pair.gap, pair.gap - pair.interval[0]) / pair.a.top * 100
        for pair in pairs
        if pair.interval is not None and pair.gap is not None
    ]
    return mean, math.sqrt(sum(half**2 for half in halves)) / len(halves)


def _command(side: Side) -> str:
    return "train" if side.kind == "run" else "eval"


def _values(a: Mapping[float, Line], b: Mapping[float, Line]) -> list[tuple[float, float]]:
    both = sorted((p for p in a if p in b and p < 1), reverse=True)
    if both:
        return [(p, p) for p in both]
    return [(_highest(a), _highest(b))]


def _highest(lines: Mapping[float, Line]) -> float:
    return max((p for p in lines if p < 1), default=1.0)


def _pair(task: str, a: Line, b: Line) -> Pair:
    both = None if a.units is None or b.units is None else matched(a.units, b.units)
    common = [name for name in a.asked if name in b.asked]
    differing = []
    for name in common:
        (question, target, old, was), (_, _, new, now) = a.asked[name], b.asked[name]
        if was is not None and now is not None and was != now:
            differing.append((question, target, old, new, was, now))
    if both is not None:
        found = paired(both[1], both[0], a.top)
        if found is not None:
            return Pair(task, a, b, found[0], found[1], len(both[0].name), differing)
    gap = None if a.score is None or b.score is None else b.score - a.score
    return Pair(task, a, b, gap, None, 0, differing)


def _read(path: Path, form: type[Any]) -> dict[str, Any]:
    """A JSON file of that form. Raises ValueError for another one."""
    values = read_json(path)
    trouble = wrong(values, form)
    if trouble:
        raise ValueError(f"{path.name}: {trouble}")
    return values


def _run(path: Path) -> Side:
    """A run: its held-out questions after training, by task."""
    after = _read(path / "after.json", After)["after"]
    recipe = load_written(path / "recipe.yaml")
    metrics = path / "metrics.jsonl"
    rows = read_lines(metrics) if metrics.is_file() else []
    ratios = np.array(after["layer_ratios"]).mean(1)
    names = [
        question_name(*one)
        for one in zip(after["ids"], after["question"], after["answer"], strict=True)
    ]
    lines: dict[str, dict[float, Line]] = {}
    p = recipe.sparse.p
    for task in dict.fromkeys(after["task"]):
        at = [i for i, one in enumerate(after["task"]) if one == task]
        right = np.array([after["correct"][i] for i in at], dtype=float)
        units = Units(
            right, np.full(len(at), 100.0 / len(at)), [after["picture"][i] for i in at], [names[i] for i in at]
        )  # fmt: skip
        asked = {
            names[i]: (after["question"][i], after["answer"][i], after["said"][i], float(after["correct"][i]))
            for i in at
        }  # fmt: skip
        # Time and memory are known of all tasks together.
        kv, first = after["kv_bytes"] or None, after["first_token_ms"] or None
        lines[task] = {
            p: Line(p, len(at), float(100 * right.mean()), 100.0, float(ratios[at].mean()), kv, first, units, asked)
        }  # fmt: skip
    return Side(str(path), path, "run", lines, (rows, recipe))


def _evaluation(path: Path) -> Side:
    results = _read(path / "results.json", Results)
    lines: dict[str, dict[float, Line]] = {}
    for task in dict.fromkeys(row["task"] for row in results["rows"]):
        record = _read(path / "benchmarks" / f"{task}.json", Benchmark)
        for row in record["rows"]:
            name, units = f"{row['p']:g}", record["units"]
            score = units["score"].get(name)
            made = None
            if score is not None:
                weight = np.array(units["weight"], dtype=float)
                right = np.array(score, dtype=float)
                if not len(right) == len(weight) == len(units["cluster"]) == len(units["name"]):
                    raise ValueError(f"{task}.json: units: lists of several lengths")
                made = Units(right, weight, units["cluster"], units["name"])
            asked = {
                one["name"]: (one["question"], one["target"], one["said"][name], one["right"][name])
                for one in record["samples"]
            }
            lines.setdefault(task, {})[row["p"]] = Line(
                row["p"], row["n"], row["sparse"], row["top"], row["token_ratio"], row["kv_bytes"],
                row.get("first_token_ms"), made, asked,
            )  # fmt: skip
    return Side(str(path), path, "evaluation", lines)
