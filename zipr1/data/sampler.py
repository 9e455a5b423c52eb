"""Which of the training questions a step asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from zipr1.core.types import Prompt


class Deck:
    """Training questions, `count` of them a step. What a step asks depends on `seed` and the step alone, so that a
    resumed run asks what an unbroken one does."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, count: int) -> None:
        self.prompts, self.seed, self.count = prompts, seed, count
        # Sorted by kind once: at every step it would take longer than decoding the step's pictures.
        numbers: dict[str, int] = {}
        self._kind = np.array([numbers.setdefault(p.task_kind, len(numbers)) for p in prompts], int)
        self._kinds = list(numbers)
        tasks: dict[str, int] = {}
        self._task = np.array([tasks.setdefault(p.task, len(tasks)) for p in prompts], int)

    def draw(self, step: int, weights: Mapping[str, float] | None = None) -> list[Prompt]:
        """The `count` questions of a step: epochs without replacement, shuffled by (seed, epoch).

        weights: by `Prompt.task_kind`, missing ones 1: then each step draws anew by them, without replacement within
        the step. They move draws between the kinds of a task, never between tasks, whose shares stay those of
        `prompts`.
        """
        size = len(self.prompts)
        if weights and size > self.count:
            each = np.array([weights.get(kind, 1.0) for kind in self._kinds])[self._kind]
            each /= (np.bincount(self._task, each) / np.bincount(self._task))[self._task]
            rng = np.random.default_rng([self.seed, 2, step])
            chosen = rng.choice(size, self.count, replace=False, p=each / each.sum()).tolist()
        else:
            places = range(step * self.count, (step + 1) * self.count)
            chosen = [_order(size, self.seed, place // size)[place % size] for place in places]
        return [self.prompts[i] for i in chosen]


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    return [int(i) for i in np.random.default_rng([seed, 1, epoch]).permutation(count)]
