"""How much of what a run has learned holds for handwriting that it never saw.

    python recipes/hands.py RUN [RUN ...] [--questions 1200] [--task hard_digits]

Fresh pictures, drawn with a seed that no training uses: of the hands that the model was trained on (split train), and
of others (split validation). The run answers dense and sparse, its untouched base dense; the base is the model that the
first run of a row of runs began with, so a run of recipes/tiny.yaml that goes on from one of recipes/tiny_rl.yaml is
compared with the model before both. Differences are paired, by question, with 95 % intervals by picture. The last line
of a run is the gap: how much more was gained on known hands than on unknown ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
from fair import models

from zipr1.core.errors import InputError, ZipError
from zipr1.core.statistics import Z, confidence_interval, paired_difference
from zipr1.data import embedded

# Of the pictures asked about. Runs are seeded with small numbers.
FRESH = 31_337
HANDS = {"known hands": "train", "unknown hands": "validation"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--questions", type=int, default=1200, help="of each kind of hands")
    parser.add_argument("--task", default="hard_digits")
    given = parser.parse_args(arguments)
    if given.questions < embedded.PER_PICTURE:
        parser.error(
            f"--questions: got {given.questions}; {embedded.PER_PICTURE} or more are allowed"
        )
    try:
        for run in given.runs:
            print(*measured(run, given.task, given.questions), sep="\n", flush=True)
    except ZipError as error:
        print(f"hands: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def measured(run: str, task: str, number: int) -> list[str]:
    """Lines about a run: its answers beside its base's, by hands, and the gap between the two."""
    subject = models.find(run)
    if subject.recipe.seed == FRESH:
        raise InputError(
            f"{run}: trained with the seed {FRESH} of the fresh pictures; train another seed"
        )
    lines = [f"{subject.name}, base {subject.base}, {task}, {number} questions of each"]
    gained: dict[str, list[tuple[float, float]]] = {"dense": [], "sparse": []}
    for hands, split in HANDS.items():
        prompts = embedded.draw(split, task, number, FRESH)
        clusters = [prompt.picture or prompt.id for prompt in prompts]
        (base,) = models.ask(subject.base, subject.recipe, prompts, [None])
        dense, sparse = models.ask(run, subject.recipe, prompts, [None, subject.sparse])
        low, high = confidence_interval(base.correct, clusters)
        lines.append(
            f"  {hands}: base {100 * base.correct.mean():.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        )
        for name, result in (("dense", dense), ("sparse", sparse)):
            difference, low, high = paired_difference(result.correct, base.correct, clusters)
            gained[name].append((difference, (high - low) / 2 / Z))
            lines.append(
                f"    {name}: {100 * difference:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}] at "
                f"{100 * result.token_ratio.mean():.1f} % of the tokens"
            )
    for name, ((known, one), (unknown, other)) in gained.items():
        gap, error = gap_of(known, one, unknown, other)
        lines.append(
            f"  gap, {name}: {100 * gap:+.1f} points [{100 * (gap - Z * error):+.1f}, "
            f"{100 * (gap + Z * error):+.1f}]"
        )
    return lines


def gap_of(known: float, one: float, unknown: float, other: float) -> tuple[float, float]:
    """The difference of two gains and its standard error, from theirs: they are of different questions."""
    return known - unknown, float(np.hypot(one, other))


if __name__ == "__main__":
    main()
