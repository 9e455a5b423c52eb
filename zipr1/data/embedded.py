"""Families of embedded tasks: questions that are drawn by this package rather than read from files.

A new family is a folder of zipr1/data with a module `tasks` that has what EmbeddedTasks lists, and one line in SOURCES.
Its name is then a `data.source`, and its tasks can stand in `data.mix` beside those of other families.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from zipr1.core.errors import InputError
from zipr1.core.types import Prompt
from zipr1.data.digits import tasks as digits
from zipr1.data.drawn import Scene
from zipr1.data.pages import tasks as pages

PER_PICTURE = 4  # questions about each picture or clip
# Held-out questions are drawn with this seed whatever the run's seed is, so that runs can be compared.
HELDOUT_SEED = 20250
# Questions that settings are never chosen on, not even by a glance: asked once of a trained run (recipes/lockbox.py).
LOCKBOX_SEED = 81173
_FEWEST_HELDOUT = 40  # of a task that asks only a part of `data.heldout_prompts`


class EmbeddedTasks(Protocol):
    """What the module of a family offers.

    TASKS: names, different from those of all other families. MIX: their shares among training prompts where a recipe
    says nothing. HELDOUT_SHARE: of `data.heldout_prompts`, for tasks that ask fewer than all of them.
    """

    @property
    def TASKS(self) -> tuple[str, ...]: ...

    @property
    def MIX(self) -> Mapping[str, float]: ...

    @property
    def HELDOUT_SHARE(self) -> Mapping[str, float]: ...

    def prompts(
        self, split: str, task: str, pictures: int, questions_per_picture: int, seed: int
    ) -> list[Prompt]:
        """`pictures` x `questions_per_picture` prompts of `train`, `validation` or `test`; a pure function."""

    def lesson(
        self,
        seed: int,
        step: int,
        pictures: int,
        video_share: float,
        size: int,
        hard_share: float,
        questions: int,
    ) -> Sequence[tuple[Scene, list[tuple[str, str]]]]:
        """`pictures` fresh training scenes with at most `questions` (question, answer) pairs each; a pure function.

        size: of the scenes, the family's own measure (`supervised.curriculum`)."""


SOURCES: dict[str, EmbeddedTasks] = {"digits": digits, "pages": pages}


def draw(split: str, task: str, number: int, seed: int) -> list[Prompt]:
    """The first `number` questions of one task, PER_PICTURE about each picture. split: train, validation or test."""
    pictures = -(-number // PER_PICTURE)
    return _family(task).prompts(split, task, pictures, PER_PICTURE, seed)[:number]


def shares(source: str, mix: Mapping[str, float]) -> Mapping[str, float]:
    """Of the tasks among training questions: `mix`, or where that is empty those of the family `source`."""
    return mix or SOURCES[source].MIX


def draw_training(source: str, mix: Mapping[str, float], number: int, seed: int) -> list[Prompt]:
    """`number` training questions in the proportions of `mix` (empty: of the family `source`), task by task."""
    mix = shares(source, mix)
    return [
        prompt
        for task, count in _counts(mix, number).items()
        for prompt in draw("train", task, count, seed)
    ]


def draw_heldout(source: str, mix: Mapping[str, float], number: int, split: str) -> list[Prompt]:
    """`number` questions of each task (or its HELDOUT_SHARE of them, 40 at least): all tasks of the family `source`,
    whatever the mix, and those of other families that are trained. The same questions for every run."""
    prompts = []
    for task in _heldout_tasks(source, mix):
        share = _family(task).HELDOUT_SHARE.get(task, 1.0)
        count = min(number, max(_FEWEST_HELDOUT, int(number * share)))
        prompts += draw(split, task, count, HELDOUT_SEED)
    return prompts


def draw_lockbox(source: str, mix: Mapping[str, float], number: int) -> list[Prompt]:
    """`number` questions of each task that `draw_heldout` asks, from the same test hands, about other pictures."""
    tasks = _heldout_tasks(source, mix)
    return [prompt for task in tasks for prompt in draw("test", task, number, LOCKBOX_SEED)]


def check_mix(mix: Mapping[str, float]) -> None:
    """Raises InputError for a task that no family has, or shares that leave nothing to ask."""
    for task in mix:
        _family(task)  # an unknown one is an error even where its share comes to nothing
    total = sum(mix.values())
    if mix and not 0 < total < math.inf:
        raise InputError(
            f"data.mix: the shares add up to {total:g}; give at least one task a positive, finite share"
        )


def _heldout_tasks(source: str, mix: Mapping[str, float]) -> list[str]:
    trained = [task for task, share in mix.items() if share > 0]
    return list(dict.fromkeys([*SOURCES[source].TASKS, *trained]))


def _family(task: str) -> EmbeddedTasks:
    for family in SOURCES.values():
        if task in family.TASKS:
            return family
    known = [name for family in SOURCES.values() for name in family.TASKS]
    near = difflib.get_close_matches(task, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(
        f"data.mix: unknown task {task!r}; {hint}allowed: {', '.join(known)}; rename or remove it"
    )


def _counts(mix: Mapping[str, float], number: int) -> dict[str, int]:
    """`number` split in the proportions of `mix`, largest remainders first."""
    check_mix(mix)
    total = sum(mix.values())
    exact = {task: number * share / total for task, share in mix.items()}
    counts = {task: int(value) for task, value in exact.items()}
    by_remainder = sorted(exact, key=lambda task: counts[task] - exact[task])
    for task in by_remainder[: number - sum(counts.values())]:
        counts[task] += 1
    return counts
