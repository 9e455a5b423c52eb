"""Questions whose answers all agree are dropped, and others asked in their place: the dynamic sampling of DAPO
(arXiv 2503.14476).

Where all answers of a group are right, or all wrong, each is as good as its baseline and the policy gradient is 0. A
question that takes the place of another is of the same task, so that a step's tasks keep their shares, and it is asked
by the same rank, so that no rank is left without one. All of it is a function of (seed, step, turn, place), and of
rewards that all ranks know: they go through the same turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from zipr1.core import distributed, watch
from zipr1.core.recipe import Recipe
from zipr1.core.types import Group, Prompt
from zipr1.data.sampler import PromptSampler
from zipr1.models.encoder import MediaEncoder
from zipr1.models.policy import Policy
from zipr1.train.minibatch import informative
from zipr1.train.rollout import Batch, by_place, roll_out


def redraw(
    policy: Policy,
    recipe: Recipe,
    pictures: MediaEncoder,
    deck: PromptSampler,
    batch: Batch,
    drawn: Sequence[Prompt],
    step: int,
    known: dict[str, float],
    kinds: Mapping[str, float] | None = None,
) -> Batch:
    """The batch of all ranks with other questions in place of those that teach nothing, `ppo.redraw` times at most.

    drawn: the step's questions, none of which is asked again. known: as of `roll_out`. kinds: as of `deck.draw`.
    A place whose task has no more questions, or whose question turns out to be a bad row, keeps what it has.
    """
    asked, first = list(drawn), batch.groups
    for turn in range(1, recipe.ppo.redraw + 1):
        dull = [i for i, good in enumerate(informative(batch.groups, recipe)) if not good]
        tasks = [batch.groups[i].prompt.task for i in dull]
        others = deck.instead(step, turn, tasks, asked, kinds)
        new = {i: prompt for i, prompt in zip(dull, others, strict=True) if prompt is not None}
        if not new:
            break
        asked += new.values()
        watch.at(f"step {step + 1}: rollout, other questions")
        batch = asked_instead(policy, recipe, pictures, batch, new, step, turn, known)
    return replace(batch, drawn=first if batch.redrawn else None)


def asked_instead(
    policy: Policy,
    recipe: Recipe,
    pictures: MediaEncoder,
    batch: Batch,
    new: Mapping[int, Prompt],
    step: int,
    turn: int,
    known: dict[str, float],
) -> Batch:
    """The batch with these questions, by place, rolled out by the ranks that have the pictures of those before them."""
    own = [i for i in new if batch.encoded[i] is not None]
    asked, encoded, places = pictures.usable_at(new, own, least=0)
    seen = pictures.look(encoded)
    # Random numbers of their own: places behind all those of the turns before.
    far = [turn * recipe.train.prompts_per_step + i for i in places]
    part = roll_out(policy, recipe, asked, encoded, seen.policy, step, seen.reference, known, far)
    mine = by_place(part, places)
    made: dict[int, Any] = {i: m for ranks in distributed.gather(mine) for i, m in ranks.items()}
    here = dict(zip(places, part.encoded, strict=True))

    def each(old: Sequence[Any] | None, which: int) -> list[Any] | None:
        if old is None:
            return None
        return [made[i][which] if i in made else value for i, value in enumerate(old)]

    return replace(
        batch,
        groups=[
            Group(new[i], made[i][0]) if i in made else group
            for i, group in enumerate(batch.groups)
        ],
        encoded=[here.get(i, value) for i, value in enumerate(batch.encoded)],
        features={**batch.features, **part.features},
        reference={**batch.reference, **part.reference},
        cut_logprobs=each(batch.cut_logprobs, 1),
        checks=each(batch.checks, 2),
        dense=each(batch.dense, 3),
        redrawn=batch.redrawn + len(new),
    )
