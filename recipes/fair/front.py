"""One model read along p: for each task and given share of tokens, p is chosen on validation questions, and the
held-out questions are read once at these p, at the model's own p, and dense.

    PYTHONPATH=recipes python -m fair.front MODEL METHOD OUT.json QUESTIONS VALIDATION    # as recipes/compare.py does
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fair import rows
from fair.methods import METHODS
from fair.table import SHARES, TASKS
from zipr1.core.files import write_whole
from zipr1.core.recipe import Model, Recipe, Sparse
from zipr1.data import sources
from zipr1.data.embedded import HELDOUT_SEED, draw
from zipr1.models.open import find_source
from zipr1.models.policy import Policy, load_policy
from zipr1.train import heldout

GRIDS = {"top_p": (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 0.94, 0.975, 0.99, 0.997)}
SHARE_GRID = (0.02, 0.1, 0.2, 0.3, 0.45)  # of the rules whose p is a share


def main() -> None:
    model, name, out, questions, validation = sys.argv[1:]
    method = METHODS[name]
    own = None if method.rule else find_source(model).sparse.p
    found = read(
        load_policy(Model(path=model)), method.recipe(0), method.sparse(), own, int(questions), int(validation)
    )  # fmt: skip
    write_whole(Path(out), json.dumps(found))


def read(
    policy: Policy, recipe: Recipe, sparse: Sparse, own: float | None, questions: int, validation: int
) -> list[dict[str, str]]:  # fmt: skip
    """Rows of all tasks. own: a p to read at besides; questions, validation: of each task."""
    found = []
    for task in TASKS:
        tuning = draw("validation", task, validation, HELDOUT_SEED)
        seen: dict[float, heldout.Result] = {}

        def more(values: Sequence[float], tuning=tuning, seen=seen) -> dict[float, float]:
            """What is kept at each p that was looked at, these included."""
            new = [p for p in dict.fromkeys(values) if p not in seen]
            settings = [sparse.model_copy(update={"p": p}) for p in new]
            if new:
                results = heldout.evaluate(policy, recipe, tuning, settings)
                seen.update(zip(new, results, strict=True))
            return {p: float(result.token_ratio.mean()) for p, result in seen.items()}

        chosen = choose(more, GRIDS.get(sparse.rule, SHARE_GRID))
        more(list(chosen.values()))
        for share, p in chosen.items():
            found.append(_row("validation", task, f"{share:g}", p, tuning, seen[p]))
        asked = draw("test", task, questions, HELDOUT_SEED)
        points = [(f"{share:g}", p) for share, p in chosen.items()]
        points += [("own", own)] if own is not None else []
        settings = [sparse.model_copy(update={"p": p}) for _, p in points]
        results = heldout.evaluate(policy, recipe, asked, [*settings, None])
        for (at, p), result in zip([*points, ("dense", 1.0)], results, strict=True):
            row = _row("test", task, at, p, asked, result)
            found.append(row | {"right": rows.pack(result.correct)})
        print(f"{task}: read at {len(points)} p", flush=True)
    return found


def choose(more, grid: Sequence[float], shares: Sequence[float] = SHARES) -> dict[float, float]:
    """p for each share of tokens that lies within what the grid keeps: interpolated twice, looking in between.

    more(values): looks at these p, and returns what is kept at all that were looked at.
    """
    kept = more(grid)
    for _ in range(2):
        near = [p for p in (p_for(kept, share) for share in shares) if p is not None]
        kept = more(near) if near else kept
    found = {share: p_for(kept, share) for share in shares}
    return {share: p for share, p in found.items() if p is not None}


def p_for(kept: Mapping[float, float], share: float) -> float | None:
    """The p that keeps `share`, linear between its neighbours in `kept` (by p); None where that is outside. What is
    kept is taken to rise with p: where noise lets it fall, the higher value before holds on."""
    values = np.array(sorted(kept))
    ratios = np.maximum.accumulate([kept[p] for p in values])
    above = int(np.searchsorted(ratios, share))
    if above == len(values) or (above == 0 and ratios[0] > share):
        return None
    if above == 0:
        return float(values[0])
    low, high = ratios[above - 1], ratios[above]
    part = (share - low) / (high - low)
    return round(float(values[above - 1] + part * (values[above] - values[above - 1])), 5)


def _row(split: str, task: str, at: str, p: float, prompts, result: heldout.Result) -> dict[str, str]:  # fmt: skip
    return {
        "split": split,
        "task": task,
        "at": at,
        "p": f"{p:g}",
        "kept": f"{100 * result.token_ratio.mean():.3f}",
        "correct": f"{100 * result.correct.mean():.3f}",
        "n": str(len(prompts)),
        "questions": sources.identity(prompts)[:16],
        "right": "",
    }


if __name__ == "__main__":
    main()
