"""What trained weights answer without sparsity: what a server that does not know zipr1 makes of an exported run.

    python recipes/dense.py RUN [RUN ...] [--split validation] [--questions 400]

Each RUN is one seed of the same recipe; `tiny` is the untouched base. The held-out questions of docs/results.md:
`--split test --questions 2000`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from zipr1.core.load import load
from zipr1.core.recipe import Model
from zipr1.data import sources
from zipr1.models.policy import load_policy
from zipr1.train import heldout

RECIPE = load(Path(__file__).resolve().parent / "tiny.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--questions", type=int, default=400, help="of each task")
    arguments = parser.parse_args()
    heldout_digits = "validation" if arguments.split == "validation" else None
    settings = {"heldout": heldout_digits, "heldout_prompts": arguments.questions}
    prompts = sources.load(RECIPE.data.model_copy(update=settings), "heldout", 0)
    found: dict[str, list[float]] = {}
    for run in arguments.runs:
        policy = load_policy(Model(path=run))
        (result,) = heldout.evaluate(policy, RECIPE, prompts, [None])
        for groups in (result.groups(lambda p: p.task), result.groups(lambda p: p.task_kind)):
            for name, part in groups.items():
                found.setdefault(f"{name} (n = {part['n']})", []).append(100 * part["accuracy"])
    for name, values in found.items():
        tail = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        print(f"{name}: {np.mean(values):.2f}{tail} %")


if __name__ == "__main__":
    main()
