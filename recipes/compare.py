"""The comparison of docs/results.md, from nothing: methods x seeds on recipes/tiny.yaml, each read along p.

    python recipes/compare.py [--methods NAME ...] [--seeds 0 1 2 3 4] [--control-seeds 0 1 2 3 4] [--out runs/compare]
    python recipes/compare.py --only-table        # the table and the figure from docs/compare.csv; asks nothing
    python recipes/compare.py --plan              # what is still to be trained and read, run by run

Each run is a `zipr1 train recipes/tiny.yaml seed=S KEY=VALUE...` into OUT/METHOD-S. Then validation questions choose
the p at which it keeps 10 to 40 % of the tokens, for each task; the held-out questions are read once at these p, at the
run's own p, and dense (recipes/fair/front.py). Jobs have one thread each, two run at a time. What a run gave goes into
docs/compare.csv, one row a point, to be committed; a run that stands there with the same recipe is not made again, and
one that was trained is not trained again: the command goes on where it stopped. Of the paper's estimator, three lower
ends of the range of p are tried with seed 0, and the best on validation questions is taken for the others.

Written are OUT/table.md and docs/pareto.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fair import rows, seeds, table
from fair.methods import BASE, METHODS, TRIES, paper

from zipr1.core.errors import InputError, RunError, ZipError
from zipr1.core.jsontext import loads
from zipr1.core.statistics import paired_difference

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "docs" / "compare.csv"
FIGURE = ROOT / "docs" / "pareto.png"
Job = tuple[str, int]  # method and seed


class Comparison:
    """out: for runs. questions, validation: asked of each task. record: rows of the CSV, which grows."""

    def __init__(self, out: Path, questions: int, validation: int) -> None:
        self.out, self.questions, self.validation = out, questions, validation
        self.record = rows.read(RECORD, table.COLUMNS)
        self.lock = threading.Lock()
        self.base = threading.Event()  # the base was read, which the others are compared with

    def is_read(self, job: Job) -> bool:
        """Whether the record has this run, of the recipe as it is now."""
        name, seed = job
        sha = METHODS[name].hashes(seed)[0]
        return any(
            (row["method"], row["seed"], row["recipe_sha256"]) == (name, str(seed), sha)
            for row in self.record
        )

    def run(self, jobs: Sequence[Job], at_once: int) -> None:
        """All of these runs. The first error ends it, when the runs that have begun are done. Raises InputError before
        anything begins where a folder holds another run."""
        for name, seed in jobs:
            self.is_trained(name, seed)
        self.base.clear()
        if all(name != BASE for name, _ in jobs):
            self.base.set()
        with ThreadPoolExecutor(at_once) as pool:
            for _ in pool.map(self.one, jobs):
                pass

    def one(self, job: Job) -> None:
        """Trains and reads what is missing of one run, and adds its rows."""
        name, seed = job
        try:
            model = self.train(name, seed) if METHODS[name].rule is None else "tiny"
            began = time.monotonic()
            found = self.read(name, seed, str(model))
            if name != BASE:
                self.base.wait()
            with self.lock:
                found = self.completed(name, seed, found)
                rows.append(RECORD, table.COLUMNS, found)
                self.record += found
            print(f"{name}, seed {seed}: read in {time.monotonic() - began:.0f} s", flush=True)
        finally:
            if name == BASE:
                self.base.set()

    def is_trained(self, name: str, seed: int) -> bool:
        """Whether the folder of the run holds it, finished. Raises InputError where it holds another."""
        folder = self.out / f"{name}-{seed}"
        summary = folder / "summary.json"
        if not summary.is_file():
            return False
        known = loads(summary.read_bytes()).get("recipe_sha256")
        if known != METHODS[name].recipe(seed).sha256():
            raise InputError(
                f"{folder}: holds a run of another recipe ({str(known)[:8]}); rename it, or give another --out"
            )
        return True

    def train(self, name: str, seed: int) -> Path:
        """The folder of the run, finished; a run that stopped goes on."""
        method, folder = METHODS[name], self.out / f"{name}-{seed}"
        if self.is_trained(name, seed):
            return folder
        command = [sys.executable, "-m", "zipr1", "train", str(ROOT / "recipes" / "tiny.yaml")]
        command += [f"seed={seed}", *method.overrides, "--output", str(folder), "--device", "cpu"]
        began = time.monotonic()
        _run(command, self.out / f"{name}-{seed}.log")
        print(f"{name}, seed {seed}: trained in {time.monotonic() - began:.0f} s", flush=True)
        return folder

    def read(self, name: str, seed: int, model: str) -> list[dict[str, str]]:
        """What recipes/fair/front.py finds."""
        found = self.out / f"{name}-{seed}.rows.json"
        command = [sys.executable, "-m", "fair.front", model, name, str(found)]
        command += [str(self.questions), str(self.validation)]
        _run(command, self.out / f"{name}-{seed}.read.log")
        values: list[dict[str, str]] = json.loads(found.read_text())
        found.unlink()
        return values

    def completed(self, name: str, seed: int, found: list[dict[str, str]]) -> list[dict[str, str]]:
        """Rows with all columns: how they compare with the base, where that was asked the same."""
        sha, recipe = METHODS[name].hashes(seed)
        own = found if name == BASE else self.record
        base = {
            (row["task"], row["questions"]): rows.unpack(row["right"], int(row["n"]))
            for row in own
            if row.get("method", BASE) == BASE and row["split"] == "test" and row["at"] == "dense"
        }
        done = []
        for row in found:
            known = {
                "date": time.strftime("%Y-%m-%d"), "method": name, "seed": str(seed), "recipe_sha256": sha,
                "recipe": recipe, "base": "", "difference": "", "low": "", "high": "",
            }  # fmt: skip
            dense = base.get((row["task"], row["questions"]))
            if row["split"] == "test" and dense is not None:
                right = rows.unpack(row["right"], int(row["n"]))
                values = paired_difference(right, dense, seeds.pictures(len(dense)))
                known["base"] = f"{100 * dense.mean():.3f}"
                for key, value in zip(("difference", "low", "high"), values, strict=True):
                    known[key] = f"{100 * value:.3f}"
            done.append({**known, **row})
        return done


def _run(command: Sequence[str], log: Path) -> None:
    """With one thread; its output goes to `log`. Raises RunError."""
    places = [ROOT / "recipes", ROOT, ROOT / "kernels", os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(map(str, places))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with log.open("w") as file:
        code = subprocess.run(command, env=environment, stdout=file, stderr=file).returncode
    if code:
        raise RunError(f"{' '.join(command)}: ended with {code}; its words are in {log}")


# What --methods takes: of the paper's estimator its variants, without the lower end, which is chosen.
PAPER = [name.rpartition("-")[0] for name in paper(0.5)]
CHOICES = [*(name for name in METHODS if not name.startswith("paper")), *PAPER]


def planned(
    methods: Sequence[str], ours: Sequence[int], others: Sequence[int], low: float | None
) -> list[Job]:
    """The runs, in order: the base first, then the tries of the paper's estimator; its other seeds and its variants
    where the lower end is known. ours, others: seeds."""
    jobs: list[Job] = [(BASE, 0)]
    if set(PAPER) & set(methods):
        jobs += [(name, 0) for name in TRIES]
    for name in methods:
        if name in PAPER:
            jobs += [(f"{name}-{low:g}", seed) for seed in others] if low is not None else []
        elif METHODS[name].rule is not None:
            jobs.append((name, 0))
        else:
            jobs += [(name, seed) for seed in (ours if name == "ours" else others)]
    return list(dict.fromkeys(jobs))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--control-seeds", type=int, nargs="+", help="of the other methods; default: the same"
    )
    parser.add_argument(
        "--methods", nargs="+", default=CHOICES, choices=CHOICES, metavar="NAME", help=", ".join(CHOICES)
    )  # fmt: skip
    parser.add_argument("--questions", type=int, default=2000, help="held-out ones of each task")
    parser.add_argument("--validation", type=int, default=200, help="of each task, to choose p")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "compare")
    parser.add_argument("--only-table", action="store_true", help="train and ask nothing")
    parser.add_argument("--plan", action="store_true", help="list what is to be done")
    given = parser.parse_args(arguments)
    try:
        comparison = Comparison(given.out, given.questions, given.validation)
        given.out.mkdir(parents=True, exist_ok=True)
        others = given.control_seeds or given.seeds
        while not given.only_table:  # the tries before what depends on them
            low = table.lower_end(comparison.record)
            jobs = planned(given.methods, given.seeds, others, low)
            left = [job for job in jobs if not comparison.is_read(job)]
            if given.plan:
                print(*(f"{name}, seed {seed}" for name, seed in left), sep="\n")
                if low is None and set(PAPER) & set(given.methods):
                    print("then the paper's estimator with the best of these lower ends")
                return
            if not left:
                break
            comparison.run(left, given.jobs)
        text = table.markdown(comparison.record)
        (given.out / "table.md").write_text(text)
        print(text)
        table.draw(comparison.record, FIGURE)
    except ZipError as error:
        print(f"compare: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
