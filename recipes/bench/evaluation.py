"""Three budgets in one pass over the data against three passes: what sharing the vision tower saves in `zipr1 eval`.

    python recipes/bench/evaluation.py [--model tiny] [--questions 64] [--repeats 5] [--json]

Both sides run in one process, in turn; one question a picture. With S the time of three passes and V what they spend
in the vision tower, sharing the tower alone allows a speed-up of S / (S - 2 V / 3). `reached` is the share of that
gain, (speed-up - 1) / (allowed - 1); decoding the media once, too, can bring it over 100 %.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch

from zipr1.core.recipe import Model
from zipr1.core.types import Prompt
from zipr1.data.digits import tasks
from zipr1.evaluate.answers import Answerer, Conditions
from zipr1.models.open import find_source
from zipr1.models.policy import load_policy

BUDGETS = (1.0, 0.975, 0.94)
CONDITIONS = Conditions(max_new_tokens=6, frames=16, fps=None)


def measure(model: str, questions: int, repeats: int) -> list[dict[str, object]]:
    """A row for images and one for videos; seconds are medians over repeats."""
    policy = load_policy(Model(path=model))
    sparse = find_source(model).sparse
    together = Answerer(policy, sparse, BUDGETS, shown=0)
    single = [Answerer(policy, sparse, [p], shown=0) for p in BUDGETS]
    rows: list[dict[str, object]] = []
    for task in ("digits", "moving_digits"):
        prompts = tasks.prompts("test", task, questions, 1, seed=0)
        asked: list[Callable[[], Prompt]] = [lambda p=p: p for p in prompts]  # type: ignore[misc]
        found = []
        for _ in range(repeats + 1):
            clock = [time.perf_counter()]
            shared = together.answer(asked, CONDITIONS)
            clock.append(time.perf_counter())
            passes = [one.answer(asked, CONDITIONS) for one in single]
            clock.append(time.perf_counter())
            for variant, answered in enumerate(passes):
                texts = [a.answers[0].text for a in answered]
                assert texts == [a.answers[variant].text for a in shared], (
                    "the two sides must agree"
                )
            vision = sum(a.vision_seconds for answered in passes for a in answered)
            found.append([*np.diff(clock), vision])
        one, three, vision = np.median(found[1:], axis=0)  # the first warms up
        allowed = three / (three - vision * 2 / 3)
        ratios = [b / a for a, b, _ in found[1:]]
        speedup = float(np.median(ratios))
        rows.append(
            {
                "op": "evaluation",
                "task": task,
                "questions": questions,
                "budgets": len(BUDGETS),
                "repeats": repeats,
                "one_pass_s": round(float(one), 3),
                "three_passes_s": round(float(three), 3),
                "vision_share": round(float(vision / three), 3),
                "speedup": round(speedup, 3),
                "speedup_low": round(min(ratios), 3),
                "speedup_high": round(max(ratios), 3),
                "allowed": round(float(allowed), 3),
                "reached": round(float((speedup - 1) / (allowed - 1)), 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    with torch.no_grad():
        rows = measure(arguments.model, arguments.questions, arguments.repeats)
    print(
        f"{'task':14} {'one pass':>9} {'three':>9} {'vision':>8} {'speed-up':>20} {'allowed':>8} {'reached':>8}"
    )
    for row in rows:
        spread = f"{row['speedup']} ({row['speedup_low']}-{row['speedup_high']})"
        print(
            f"{row['task']:14} {row['one_pass_s']:8} s {row['three_passes_s']:7} s {row['vision_share']:8.1%} "
            f"{spread:>20} {row['allowed']:8} {row['reached']:8.0%}"
        )
    if arguments.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
