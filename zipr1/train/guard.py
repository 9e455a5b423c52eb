"""Guard questions: never trained on, never drawn more often than others, asked in every step, sparse and dense.

They are asked of the average of the weights (average.py), which is what a run ends with. What follows from the answers
is constraint.py.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from zipr1.core import distributed
from zipr1.core.recipe import Recipe
from zipr1.core.types import Prompt
from zipr1.data import embedded
from zipr1.models.encoder import MediaEncoder
from zipr1.models.policy import Policy
from zipr1.models.processors import Encoded
from zipr1.models.sparse.request import Request
from zipr1.train.constraint import Constraint, Judged
from zipr1.train.rollout import answer_greedily, dense_correct

log = logging.getLogger("zipr1")

# Of a task's rows from files so many become guard questions at most.
SHARE = 0.1
# Of embedded guard questions: other pictures than the held-out ones of `data.heldout: validation`.
SEED = 77_000


class Guard:
    """by_task: the questions of each task. Tasks without any are not judged."""

    def __init__(
        self,
        policy: Policy,
        recipe: Recipe,
        pictures: MediaEncoder,
        by_task: Mapping[str, Sequence[Prompt]],
    ) -> None:
        self.policy, self.recipe, self.pictures = policy, recipe, pictures
        self.by_task = {task: _spread(own) for task, own in by_task.items() if own}

    def ask(self, constraint: Constraint, known: dict[str, float]) -> list[Judged]:
        """The next questions of each task; every second one is asked with all tokens too. known: whether the untouched
        base answers a prompt right, by `fingerprint`; what is missing is added. All ranks must ask."""
        asked: dict[str, int] = constraint.state.setdefault("asked", {})
        number = self.recipe.efficiency.guard.per_step
        chosen: list[tuple[Prompt, bool]] = []
        for task, count in constraint.portions(list(self.by_task), number).items():
            own, first = self.by_task[task], asked.get(task, 0)
            taken = range(first, first + min(count, len(own)))
            chosen += [(own[i % len(own)], i % 2 == 0) for i in taken]
            asked[task] = taken.stop
        numbered = {i: prompt for i, (prompt, _) in enumerate(chosen)}
        own = distributed.deal(len(chosen))
        prompts, encoded, places = self.pictures.usable_at(numbered, own, least=0)
        found = self._judge(prompts, encoded, [chosen[i][1] for i in places], known)
        return [one for part in distributed.gather(found) for one in part]

    def _judge(
        self,
        prompts: Sequence[Prompt],
        encoded: Sequence[Encoded],
        dense: Sequence[bool],
        known: dict[str, float],
    ) -> list[Judged]:
        policy, recipe = self.policy, self.recipe
        seen = self.pictures.look(encoded)
        base = dense_correct(policy, recipe, prompts, encoded, seen.reference, known)
        whole = [i for i, too in enumerate(dense) if too]
        about = (policy, recipe, prompts, encoded, seen.policy)
        sparse, full = policy.parallel.run_unsharded(
            lambda: (
                answer_greedily(*about, range(len(prompts)), Request(recipe.sparse)),
                answer_greedily(*about, whole),
            ),
            policy=True,
        )
        drift = {i: base[i] - right for i, (right, _) in zip(whole, full, strict=True)}
        return [
            Judged(prompt.task, base[i] - right, drift.get(i), kept)
            for i, (prompt, (right, kept)) in enumerate(zip(prompts, sparse, strict=True))
        ]


def part(
    prompts: Sequence[Prompt], recipe: Recipe
) -> tuple[list[Prompt], dict[str, Sequence[Prompt]]]:
    """The prompts to train on, and those that guard them, by task.

    Embedded tasks draw theirs besides, of what is kept for tuning: hands that are not trained on. Of rows from files
    whole pictures of each task are taken away from training, at most SHARE of its questions.
    """
    most = recipe.efficiency.guard.questions
    if recipe.data.source in embedded.SOURCES:
        tasks = sorted({prompt.task for prompt in prompts})
        return list(prompts), {t: embedded.draw("validation", t, most, SEED) for t in tasks}
    # By a hash of their names: the order of `prompts` depends on the seed, and what is held back must not.
    pictures: dict[str, dict[str, int]] = {}
    for prompt in prompts:
        own = pictures.setdefault(prompt.task, {})
        own[_picture(prompt)] = own.get(_picture(prompt), 0) + 1
    held: dict[str, set[str]] = {}
    for task, own in pictures.items():
        room = min(most, int(SHARE * sum(own.values())))
        for name in sorted(own, key=lambda name: hashlib.sha256(name.encode()).digest()):
            if own[name] <= room:
                held.setdefault(task, set()).add(name)
                room -= own[name]
    guard: dict[str, list[Prompt]] = {}
    train: list[Prompt] = []
    shown = {name for names in held.values() for name in names}
    for prompt in prompts:
        if _picture(prompt) in held.get(prompt.task, ()):
            guard.setdefault(prompt.task, []).append(prompt)
        elif _picture(prompt) not in shown:  # nor is the picture shown to another task
            train.append(prompt)
    for task in sorted(set(pictures) - set(guard)):
        log.warning(
            "%s: %d questions are too few to take a tenth away: efficiency.max_accuracy_drop is not held for it",
            task, sum(pictures[task].values()),
        )  # fmt: skip
    return train, dict(sorted(guard.items()))


def _picture(prompt: Prompt) -> str:
    return prompt.picture or prompt.id


def _spread(own: Sequence[Any]) -> list[Any]:
    """The same questions in another order, in which those of a picture are far from each other."""
    size = len(own)
    stride = max(1, int(0.618 * size))
    while math.gcd(stride, size) != 1:
        stride += 1
    return [own[i * stride % size] for i in range(size)]
