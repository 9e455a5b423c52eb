"""Where a step's numbers go besides metrics.jsonl: `log.to`, by name in WRITERS.

A new one is a function that opens it, a line in WRITERS and a line in MODULES. A package that is missing is an error
before anything is loaded. What each needs besides (a project, a key) it takes from its own environment variables.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from zipr1.core import activity, extras, launcher
from zipr1.core.errors import InputError
from zipr1.core.recipe import Recipe
from zipr1.core.records import read_json
from zipr1.core.text import reason

Writer = Callable[[int, Mapping[str, float]], None]
Opened = contextlib.AbstractContextManager[Writer]

MODULES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


def check(recipe: Recipe) -> None:
    """Raise InputError if a package that `log.to` names is not installed; none is imported."""
    for name in recipe.log.to if launcher.is_first() else []:
        if not _installed(MODULES[name]):
            raise InputError(f"log.to has {name}, which is not installed; {extras.install(name)}")


def _installed(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None
    found = importlib.util.find_spec(module)
    # A folder called wandb, such as runs of wandb leave in the working folder, can be imported too.
    return found is not None and found.origin is not None


@contextlib.contextmanager
def tensorboard(recipe: Recipe, root: Path, start: int) -> Iterator[Writer]:
    """Into `DIR/tensorboard`. What a killed run wrote of steps that are done again is not shown twice."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(root / "tensorboard"), purge_step=start) as writer:

        def write(step: int, scalars: Mapping[str, float]) -> None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)

        yield write


@contextlib.contextmanager
def wandb(recipe: Recipe, root: Path, start: int) -> Iterator[Writer]:
    """A run called like the folder; a resumed one goes on with it. WANDB_PROJECT, WANDB_MODE and so on hold."""
    import wandb as library

    # Another run in a folder of the same name, here or on another machine, is another one.
    known = f"{root.resolve()} {read_json(root / 'run.json').get('started')}"
    try:
        run = library.init(
            name=root.name,
            id=hashlib.sha256(known.encode()).hexdigest()[:16],
            resume="allow",
            dir=str(root),
            config=recipe.model_dump(mode="json"),
        )
    except library.Error as error:
        raise InputError(
            f"log.to has wandb, which does not start ({reason(error).rstrip('. ')}); run `wandb login`, "
            "set WANDB_MODE=offline, or leave it out"
        ) from error
    try:
        yield lambda step, scalars: run.log(dict(scalars), step=step)
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


@contextlib.contextmanager
def trackio(recipe: Recipe, root: Path, start: int) -> Iterator[Writer]:
    """A run called like the folder, in the project TRACKIO_PROJECT or `zipr1`; a resumed one goes on with it."""
    import trackio as library

    known = f"{root.resolve()} {read_json(root / 'run.json').get('started')}"
    run = library.init(
        project=os.environ.get("TRACKIO_PROJECT", "zipr1"),
        # Another run in a folder of the same name is another one; `resume` goes by the name.
        name=f"{root.name}-{hashlib.sha256(known.encode()).hexdigest()[:6]}",
        config=recipe.model_dump(mode="json"),
        resume="allow",
    )
    try:
        yield lambda step, scalars: run.log(dict(scalars), step=step)
    finally:
        library.finish()


WRITERS: dict[str, Callable[[Recipe, Path, int], Opened]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "trackio": trackio,
}


@contextlib.contextmanager
def board(
    recipe: Recipe, root: Path, start: int = 0
) -> Iterator[Callable[[int, Mapping[str, Any]], None]]:
    """A function that sends the numbers of a step's metrics to all that `log.to` names. start: the first step."""
    with contextlib.ExitStack() as stack:
        writers = []
        for name in recipe.log.to if launcher.is_first() else []:
            try:
                writers.append(stack.enter_context(WRITERS[name](recipe, root, start)))
            except ImportError as error:
                raise InputError(
                    f"log.to has {name}, which cannot be imported ({reason(error)}); {extras.install(name)}"
                ) from error

        def write(step: int, metrics: Mapping[str, Any]) -> None:
            scalars = dict(flat(metrics))
            for writer in writers:
                writer(step, scalars)

        try:
            yield write
        finally:
            if writers:
                activity.tell("sending the last metrics")


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of nested mappings, by names such as `seconds/rollout`; lists and texts are left out."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", float(value)
