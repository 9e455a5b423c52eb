"""Which of the training prompts a step takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache

import numpy as np

from zipr1.core.types import Prompt


class PromptSampler:
    """Draws `prompts_per_step` training prompts for each step. The draw depends on `seed` and the step alone, so that a
    resumed run takes the same prompts as an unbroken one."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, prompts_per_step: int) -> None:
        self.prompts, self.seed, self.prompts_per_step = prompts, seed, prompts_per_step
        # Numbered by kind and task once: at every step it would take longer than decoding the step's pictures.
        kind_numbers: dict[str, int] = {}
        self._kind_of_prompt = np.array(
            [kind_numbers.setdefault(p.task_kind, len(kind_numbers)) for p in prompts], int
        )
        self._kinds = list(kind_numbers)
        self._task_numbers = task_numbers = dict[str, int]()
        self._task_of_prompt = np.array(
            [task_numbers.setdefault(p.task, len(task_numbers)) for p in prompts], int
        )
        self._tasks = list(task_numbers)

    def draw(
        self,
        step: int,
        weights: Mapping[str, float] | None = None,
        tasks: Mapping[str, float] | None = None,
    ) -> list[Prompt]:
        """The prompts of a step: epochs without replacement, shuffled by (seed, epoch).

        weights: by `Prompt.task_kind`, tasks: by `Prompt.task`, missing ones 1. With either each step draws anew, in
        proportion to their product and without replacement within the step. `weights` move draws between the kinds of
        a task and never between tasks, `tasks` between tasks, whose shares are else those of `prompts`.
        """
        size = len(self.prompts)
        if (weights or tasks) and size > self.prompts_per_step:
            by_kind = np.array([(weights or {}).get(kind, 1.0) for kind in self._kinds])
            probability = by_kind[self._kind_of_prompt]
            # Divided by the mean weight of its task, a prompt leaves its task's share of the draws as it was.
            task = self._task_of_prompt
            mean_weight = np.bincount(task, probability) / np.bincount(task)
            probability /= mean_weight[task]
            if tasks:
                probability *= np.array([tasks.get(name, 1.0) for name in self._tasks])[task]
            rng = np.random.default_rng([self.seed, 2, step])
            chosen = rng.choice(
                size, self.prompts_per_step, replace=False, p=probability / probability.sum()
            ).tolist()
        else:
            first = step * self.prompts_per_step
            chosen = [
                _order_in_epoch(size, self.seed, index // size)[index % size]
                for index in range(first, first + self.prompts_per_step)
            ]
        return [self.prompts[i] for i in chosen]

    def instead(
        self,
        step: int,
        turn: int,
        tasks: Sequence[str],
        asked: Collection[Prompt],
        weights: Mapping[str, float] | None = None,
    ) -> list[Prompt | None]:
        """Further questions of a step, one of each of `tasks` and none of `asked`; None where a task has no more. They
        depend on `seed`, the step and `turn`. weights: of the kinds within a task, as of `draw`."""
        before = {id(prompt) for prompt in asked}
        free = np.array([id(prompt) not in before for prompt in self.prompts])
        by_kind = np.array([(weights or {}).get(kind, 1.0) for kind in self._kinds])
        weight = by_kind[self._kind_of_prompt]
        rng = np.random.default_rng([self.seed, 3, step, turn])
        out: list[Prompt | None] = [None] * len(tasks)
        for name in dict.fromkeys(tasks):
            places = [i for i, task in enumerate(tasks) if task == name]
            of_task = self._task_of_prompt == self._task_numbers[name]
            pool = np.flatnonzero(free & of_task)
            if not len(pool):
                continue
            share = weight[pool] / weight[pool].sum()
            chosen = rng.choice(pool, min(len(places), len(pool)), replace=False, p=share)
            for place, i in zip(places, chosen.tolist(), strict=False):
                out[place] = self.prompts[i]
        return out


@lru_cache(maxsize=4)
def _order_in_epoch(count: int, seed: int, epoch: int) -> list[int]:
    return [int(i) for i in np.random.default_rng([seed, 1, epoch]).permutation(count)]
