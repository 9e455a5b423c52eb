"""The lock-box: questions that no setting was chosen on, asked once of a finished run of the embedded tasks.

    python recipes/lockbox.py RUN [RUN ...] [--questions 2000] [--again]
    python recipes/lockbox.py tiny --rule top_p|top_k|random --p P     # no training: the base, sparse
    python recipes/lockbox.py --table                                  # what docs/lockbox.csv holds; asks nothing

2,000 questions of each task about pictures of their own (test hands, LOCKBOX_SEED of zipr1/data/embedded.py). The run's
weights answer sparse, at the run's p and settings, and dense; what they lose is counted against the untouched base,
dense, question by question. The answers go into RUN/lockbox.json and into docs/lockbox.csv, which is to be committed:
weights that stand there are refused, whatever their folder is called, unless --again is given, and then the row says
how often they were asked. Runs of one recipe that differ by their seed are summed up (recipes/fair/seeds.py).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from fair import models, rows, seeds

from zipr1.core.errors import InputError, ZipError
from zipr1.core.files import write_whole, writing
from zipr1.core.jsontext import dumps
from zipr1.core.recipe import Sparse
from zipr1.core.statistics import Z, difference_error
from zipr1.core.types import Prompt
from zipr1.data import sources
from zipr1.data.embedded import LOCKBOX_SEED, PER_PICTURE, draw_lockbox, shares

RECORD = Path(__file__).resolve().parents[1] / "docs" / "lockbox.csv"
# lost, low, high, error: points lost against the base, dense, their 95 % interval and standard error; of questions
# alone. share: of the task among the run's training questions. right_*: packed answers (recipes/fair/rows.py).
COLUMNS = (
    "date", "run", "seed", "recipe_sha256", "recipe", "weights", "base", "split", "questions_seed", "questions", "task",
    "share", "n", "rule", "p", "skip", "kept", "base_correct", "sparse_lost", "sparse_low", "sparse_high",
    "sparse_error", "dense_lost", "dense_low", "dense_high", "dense_error", "times", "right_base", "right_sparse",
    "right_dense",
)  # fmt: skip
WIDTH = "{:<13} {:>5} {:>6} {:>6} {:<22} {:<22}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN")
    parser.add_argument("--questions", type=int, default=2000, help="of each task")
    parser.add_argument("--again", action="store_true", help="ask weights that were asked before")
    parser.add_argument("--rule", choices=("top_p", "top_k", "random"), help="of `tiny`")
    parser.add_argument("--p", type=float, help="of `tiny`")
    parser.add_argument("--table", action="store_true", help="show what was found; ask nothing")
    given = parser.parse_args(arguments)
    if given.table == bool(given.runs):
        parser.error("name a run to ask, or give --table alone")
    if ("tiny" in given.runs) != (given.rule is not None and given.p is not None):
        parser.error("--rule and --p belong to `tiny`, and `tiny` needs both")
    if given.questions < PER_PICTURE:
        parser.error(f"--questions: got {given.questions}; {PER_PICTURE} or more are allowed")
    try:
        record = rows.read(RECORD, COLUMNS)
        if given.table:
            print(*summed(record), sep="\n")
            return
        subjects = [subject_of(path, given.rule, given.p) for path in given.runs]
        refuse(subjects, record, given.again)
        for subject in subjects:
            found = measure(subject, given.questions, 1 + asked(subject, record))
            record += found
            print(*shown(found), "", sep="\n", flush=True)
        recipes = {subject.seedless for subject in subjects}
        print(*summed([row for row in record if row["recipe"] in recipes]), sep="\n")
    except ZipError as error:
        print(f"lockbox: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def subject_of(path: str, rule: str | None, p: float | None) -> models.Subject:
    """A model to ask; the base gets the sparsity that a model without training bears best: its MLPs see all tokens."""
    subject = models.find(path)
    if path != "tiny":
        return subject
    values = subject.recipe.sparse.model_dump() | {"rule": rule, "p": p, "skip": "attention"}
    if p is None or not 0 < p <= 1:
        raise InputError(f"--p: got {p}; more than 0 and at most 1 is allowed")
    return replace(subject, sparse=Sparse.model_validate(values))


def asked(subject: models.Subject, record: Sequence[rows.Row]) -> int:
    """How often these weights were asked. Of the base each rule and p counts by itself."""
    mine = [row for row in record if row["weights"] == subject.weights]
    if subject.path == "tiny":
        settings = (subject.sparse.rule, f"{subject.sparse.p:g}")
        mine = [row for row in mine if (row["rule"], row["p"]) == settings]
    return max((int(row["times"]) for row in mine), default=0)


def refuse(subjects: Sequence[models.Subject], record: Sequence[rows.Row], again: bool) -> None:
    """Raises InputError for weights that were asked before, or are named twice."""
    seen: dict[str, str] = {}
    for subject in subjects:
        if subject.weights in seen:
            raise InputError(
                f"{subject.path}: the same weights as {seen[subject.weights]}; name them once"
            )
        seen[subject.weights] = subject.path
        if asked(subject, record) and not again:
            before = [row for row in record if row["weights"] == subject.weights][-1]
            raise InputError(
                f"{subject.path}: these weights answered the lock-box on {before['date']} as {before['run']}, and are "
                "asked once; --table shows what they answered, --again asks again and writes down that it did"
            )


def measure(subject: models.Subject, number: int, times: int) -> list[dict[str, str]]:
    """Asks a model and its base, writes what it found into the record and the run's folder, and returns its rows."""
    recipe = subject.recipe
    prompts = draw_lockbox(recipe.data.source, recipe.data.mix, number)
    own: list[Sparse | None] = [subject.sparse, None]
    if subject.path == subject.base:
        sparse, base = models.ask(subject.path, recipe, prompts, own)
        dense = base
    else:
        sparse, dense = models.ask(subject.path, recipe, prompts, own)
        (base,) = models.ask(subject.base, recipe, prompts, [None])
    found = []
    for task in dict.fromkeys(prompt.task for prompt in prompts):
        index = [i for i, prompt in enumerate(prompts) if prompt.task == task]
        row = about(subject, [prompts[i] for i in index], task) | {"times": str(times)}
        row["kept"] = f"{100 * sparse.token_ratio[index].mean():.3f}"
        row["base_correct"] = f"{100 * base.correct[index].mean():.3f}"
        row["right_base"] = rows.pack(base.correct[index])
        for name, result in (("sparse", sparse), ("dense", dense)):
            row |= lost(name, base.correct[index], result.correct[index])
            row[f"right_{name}"] = rows.pack(result.correct[index])
        found.append(row)
    rows.append(RECORD, COLUMNS, found)
    if subject.folder is not None:
        path = subject.folder / "lockbox.json"
        with writing(path, "look at docs/lockbox.csv, which has it"):
            write_whole(path, dumps({"again": times > 1, "rows": found}, indent=2) + "\n")
    return found


def about(subject: models.Subject, prompts: Sequence[Prompt], task: str) -> dict[str, str]:
    """The part of a row that is known before anything is asked."""
    data, sparse = subject.recipe.data, subject.sparse
    mix = shares(data.source, data.mix)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "run": subject.name,
        "seed": str(subject.recipe.seed),
        "recipe_sha256": subject.recipe.sha256(),
        "recipe": subject.seedless,
        "weights": subject.weights,
        "base": subject.base,
        "split": "test",
        "questions_seed": str(LOCKBOX_SEED),
        "questions": sources.identity(prompts)[:16],
        "task": task,
        "share": f"{mix.get(task, 0.0) / sum(mix.values()):.6g}",
        "n": str(len(prompts)),
        "rule": sparse.rule,
        "p": f"{sparse.p:g}",
        "skip": sparse.skip,
    }


def lost(name: str, base: np.ndarray, right: np.ndarray) -> dict[str, str]:
    """Points lost, with their 95 % interval and standard error."""
    mean, error = difference_error(base, right, seeds.pictures(len(base)))
    values = {"lost": mean, "low": mean - Z * error, "high": mean + Z * error, "error": error}
    return {
        f"{name}_{key}": f"{np.clip(100 * value, -100, 100):.3f}" for key, value in values.items()
    }


def shown(found: Sequence[rows.Row]) -> list[str]:
    """One run, a line a task."""
    first = found[0]
    times = "once" if first["times"] == "1" else f"{first['times']} times"
    lines = [
        f"{first['run']}: seed {first['seed']}, {first['rule']} at {first['p']}, weights {first['weights'][:8]}, "
        f"asked {times}",
        WIDTH.format("task", "n", "base", "tokens", "points lost, sparse", "points lost, dense"),
    ]
    for row in found:
        intervals = [
            f"{float(row[f'{k}_lost']):.2f} [{float(row[f'{k}_low']):.2f}, {float(row[f'{k}_high']):.2f}]"
            for k in ("sparse", "dense")
        ]
        correct, kept = f"{float(row['base_correct']):.1f}%", f"{float(row['kept']):.1f}%"
        number = f"{int(row['n']):,}"
        lines.append(WIDTH.format(row["task"], number, correct, kept, *intervals).rstrip())
    return lines


def summed(record: Sequence[rows.Row]) -> list[str]:
    """Runs that differ by their seed, together: the first answers of each. Untrained ones stand by themselves."""
    groups: dict[Any, list[rows.Row]] = {}
    for row in record:
        if row["times"] == "1":
            untrained = (row["rule"], row["p"]) if row["run"] == "tiny" else ()
            key = (row["recipe"], row["questions_seed"], row["n"], untrained)
            groups.setdefault(key, []).append(row)
    lines = [
        "Points lost against the base, dense. ± of tokens, seeds, questions: standard",
        "errors. [95 %]: t x seeds and 1.96 x questions in quadrature; of one run of",
        "questions alone.",
    ]
    for group in groups.values():
        lines += ["", *_sum(group)]
    return lines if groups else ["No run was asked yet."]


def _sum(group: Sequence[rows.Row]) -> list[str]:
    first = group[0]
    runs = list(dict.fromkeys((row["run"], row["seed"], row["weights"]) for row in group))
    name = f"recipe {first['recipe'][:8]}, seeds {' '.join(seed for _, seed, _ in runs)}"
    if first["run"] == "tiny":
        name = f"no training, {first['rule']} at {first['p']}"
    lines = [
        f"{name}; {int(first['n']):,} questions of each task",
        f"{'':<21} {'tokens':>12} {'lost':>6} {'seeds':>6} {'questions':>9}  [95 %]",
    ]
    mean_kept = np.zeros(len(runs))
    for task in dict.fromkeys(row["task"] for row in group):
        some = [row for row in group if row["task"] == task]
        if len({row["questions"] for row in some}) > 1:
            raise InputError(
                f"{RECORD}: runs of one recipe were asked other questions about {task}; the questions were drawn by "
                "another version: ask the older runs again"
            )
        kept = [float(row["kept"]) for row in some]
        mean_kept += float(some[0]["share"]) * np.array(kept)
        base = [rows.unpack(some[0]["right_base"], int(some[0]["n"]))]
        for how in ("sparse", "dense"):
            right = [rows.unpack(row[f"right_{how}"], int(row["n"])) for row in some]
            d = seeds.difference(right, base, seeds.pictures(len(base[0])), base=True)
            mean, error = seeds.mean_error(kept)
            spread = "" if error is None else f" ± {error:.1f}"
            tokens = f"{mean:.1f}%{spread}" if how == "sparse" else "all"
            of_seeds = "" if d.seeds is None else f"{100 * d.seeds:.2f}"
            low, high = np.clip((-100 * (d.mean + d.half), -100 * (d.mean - d.half)), -100, 100)
            lines.append(
                f"{task + ', ' + how:<21} {tokens:>12} {100 * (0 - d.mean):>6.2f} {of_seeds:>6} "
                f"{100 * d.questions:>9.2f}  [{low:.2f}, {high:.2f}]"
            )
    mean, error = seeds.mean_error(mean_kept.tolist())
    spread = "" if error is None else f" ± {error:.1f}"
    lines.append(f"{'mean over the mix':<21} {f'{mean:.1f}%{spread}':>12}")
    return lines


if __name__ == "__main__":
    main()
