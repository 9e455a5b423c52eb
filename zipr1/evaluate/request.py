"""What `zipr1 eval` is asked for, and what is wrong with it before anything is loaded. Light: no torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zipr1.core.config import override
from zipr1.core.errors import InputError
from zipr1.core.load import validate
from zipr1.core.recipe import Recipe
from zipr1.core.runs import names_nothing
from zipr1.evaluate.names import suites_of
from zipr1.evaluate.suites import GROUPS, SUITES, check_p_values

# Recipe keys that mean something here.
READ = (
    "model.",
    "sparse.",
    "data.max_frames",
    "data.fps",
    "train.max_new_tokens",
    "evaluation.batch",
    "train.stall_minutes",
)


@dataclass
class EvalRequest:
    """What a user asks for. tasks: names of suites, groups and lmms-eval's tasks. p_values: of --budget, 1.0 is dense.

    limit: first questions of each benchmark; None takes the suite's own, 0 all. changes: `a.b=c` of a recipe.
    base: measure the untouched model too, where `model` is a run. output: None is a folder named by all of this.
    """

    model: str
    tasks: Sequence[str]
    p_values: Sequence[float]
    limit: int | None = None
    output: Path | None = None
    data_root: Path | None = None
    device: str | None = None
    changes: Sequence[str] = ()
    base: bool = True


def check(request: EvalRequest) -> None:
    """Raise InputError for what can be seen to be wrong by the request alone."""
    check_p_values(request.p_values)
    if request.data_root is not None and not request.data_root.is_dir():
        raise InputError(
            f"--data-root {request.data_root}: no such folder; give one with a folder for each benchmark"
        )
    suites = suites_of(request.tasks)
    others = [suite.name for suite in suites if suite.name not in SUITES]
    if request.data_root is not None and others:
        raise InputError(
            f"--data-root {request.data_root}: not read for {', '.join(others)}; it serves "
            f"{', '.join(GROUPS['paper13'])}: evaluate other tasks without it, from the hub or its cache"
        )
    if names_nothing(request.model):
        raise InputError(
            f"--model {request.model}: does not exist; give a model folder, a run, a hub id or 'tiny'"
        )
    settings(request, {})


def settings(request: EvalRequest, sparse: dict[str, Any]) -> tuple[Recipe, set[str]]:
    """A recipe that holds what is read here, and the keys given on the command line. sparse: the model's own."""
    values: dict[str, Any] = {"model": {"path": request.model}, "sparse": sparse}
    keys = [override(values, text) for text in request.changes]
    for key in keys:
        if not any(key == name or key.startswith(name) for name in READ):
            raise InputError(
                f"command line: `{key}`: not read by zipr1 eval; allowed: {', '.join(READ)}"
            )
        if key in ("model.path", "sparse.p"):
            raise InputError(
                f"command line: `{key}`: use --{'model' if key == 'model.path' else 'budget'}"
            )
    return validate(values, "command line", keys), set(keys)
