"""Where a step's numbers go besides metrics.jsonl: `log.to`, by name in WRITERS.

A new one is a function that opens it and a line in WRITERS. A package that is missing is an error before the first
step. What each needs besides (a project, a key) it takes from its own environment variables.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from zipr1 import ranks
from zipr1.errors import InputError
from zipr1.recipe import Recipe

Writer = Callable[[int, Mapping[str, float]], None]
Opened = contextlib.AbstractContextManager[Writer]


@contextlib.contextmanager
def tensorboard(recipe: Recipe, root: Path) -> Iterator[Writer]:
    """Into `DIR/tensorboard`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise _missing("tensorboard") from None
    with SummaryWriter(str(root / "tensorboard")) as writer:

        def write(step: int, scalars: Mapping[str, float]) -> None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)

        yield write


@contextlib.contextmanager
def wandb(recipe: Recipe, root: Path) -> Iterator[Writer]:
    """A run called like the folder; a resumed one goes on with it. WANDB_PROJECT, WANDB_MODE and so on hold."""
    try:
        import wandb as library
    except ImportError:
        raise _missing("wandb") from None
    run = library.init(
        name=root.name,
        id=hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16],
        resume="allow",
        dir=str(root),
        config=recipe.model_dump(mode="json"),
    )
    try:
        yield lambda step, scalars: run.log(dict(scalars), step=step)
    finally:
        run.finish()


WRITERS: dict[str, Callable[[Recipe, Path], Opened]] = {"tensorboard": tensorboard, "wandb": wandb}


@contextlib.contextmanager
def board(recipe: Recipe, root: Path) -> Iterator[Callable[[int, Mapping[str, Any]], None]]:
    """A function that sends the numbers of a step's metrics to all that `log.to` names."""
    with contextlib.ExitStack() as stack:
        names = recipe.log.to if ranks.is_first() else []
        writers = [stack.enter_context(WRITERS[name](recipe, root)) for name in names]

        def write(step: int, metrics: Mapping[str, Any]) -> None:
            scalars = dict(flat(metrics))
            for writer in writers:
                writer(step, scalars)

        yield write


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of nested mappings, by names such as `seconds/rollout`; lists and texts are left out."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", float(value)


def _missing(name: str) -> InputError:
    return InputError(f"log.to has {name}, which is not installed; pip install 'zipr1[{name}]'")
