"""Does it fit? The longest questions are tried before the first step, and what comes of it is thrown away.

A run that would die of memory in its third hour dies in its first minute. Lengths are exact: counted from the sizes of
media, for which nothing is decoded where the rows know them. Of media of unknown size a bounded number is opened.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from zipr1.core.errors import InputError
from zipr1.core.recipe import Recipe
from zipr1.core.types import Prompt
from zipr1.data.media import check
from zipr1.models.batching import by_length
from zipr1.models.encoder import MediaEncoder
from zipr1.models.policy import Policy
from zipr1.models.token_budget import token_budget
from zipr1.train.controller import EfficiencyController
from zipr1.train.minibatch import flatten
from zipr1.train.rollout import roll_out
from zipr1.train.sampler_check import check_sampler
from zipr1.train.update import backward

log = logging.getLogger("zipr1")

OPENED = 256  # prompts whose media are opened to learn their size, evenly spaced among those that need it


def rehearse(
    policy: Policy, recipe: Recipe, pictures: MediaEncoder, prompts: Sequence[Prompt]
) -> int:
    """Roll out and learn from the longest questions with answers of full length, and change nothing. Returns the
    tokens of the longest row. What was sampled is scored again first: see `check_sampler`, and what it raises."""
    most = -(-recipe.train.micro_batch // recipe.budgets.group)
    longest = by_tokens(pictures, prompts)
    count = min(most, recipe.train.prompts_per_step, len(longest))
    asked: list[Prompt] = []
    while not asked:  # rows that may be skipped are only known to be bad once they are read
        tried, longest = longest[:count], longest[count:]
        asked, encoded = pictures.usable(tried, least=int(not longest))

    seen = pictures.look(encoded)
    batch = roll_out(policy, recipe, asked, encoded, seen.policy, 0, seen.reference)
    log.info("%s", check_sampler(policy, recipe, batch))
    generator = torch.Generator().manual_seed(0)
    for group in batch.groups:
        for rollout in group.rollouts:
            missing = recipe.train.max_new_tokens - len(rollout.tokens)
            # Any words but special ones will do, so long as each answer is another.
            extra = torch.randint(100, 200, (missing,), generator=generator) % policy.words
            rollout.tokens = torch.cat([rollout.tokens, extra])
            rollout.logprobs = torch.cat([rollout.logprobs, torch.zeros(missing)])
    free = recipe.efficiency.model_copy(update={"weight": 0.0})
    rows = flatten(batch, recipe, EfficiencyController(free, policy.layers))
    room = token_budget(policy, recipe, update=True)
    first = by_length(rows.lengths, recipe.train.micro_batch, room)[0]
    backward(policy, recipe, batch, rows, first, share=1.0)
    for _, parameter in policy.trainable():
        parameter.grad = None
    return max(rows.lengths)


def by_tokens(pictures: MediaEncoder, prompts: Sequence[Prompt]) -> list[Prompt]:
    """All prompts, those with most tokens first. Counted are those whose media have a size or are in memory; of the
    others at most OPENED are opened to be counted, and the rest comes last, with bad rows that may be skipped."""
    sized = [_with_sizes(prompt) for prompt in prompts]
    known = [prompt for prompt in sized if _has_sizes(prompt)]
    unknown = [prompt for prompt in sized if not _has_sizes(prompt)]
    every = max(1, -(-len(unknown) // OPENED))
    with ThreadPoolExecutor(pictures.data.workers) as pool:
        opened = list(pool.map(lambda prompt: _opened(prompt, pictures), unknown[::every]))
    known += [prompt for prompt in opened if _has_sizes(prompt)]
    rest = [prompt for i, prompt in enumerate(unknown) if i % every]
    rest += [prompt for prompt in opened if not _has_sizes(prompt)]
    counted: dict[bytes, int] = {}
    known.sort(key=lambda prompt: _length(pictures, prompt, counted), reverse=True)
    return known + rest


def _length(pictures: MediaEncoder, prompt: Prompt, counted: dict[bytes, int]) -> int:
    """Tokens of a prompt whose media have sizes, counted once for those that read alike; 0 for one that is too long and
    may be skipped. counted: changed here. Raises InputError for one that may not."""
    text = repr((prompt.messages, [(m.kind, m.size, m.asked) for m in prompt.media]))
    name = hashlib.blake2b(text.encode(), digest_size=16).digest()
    if name not in counted:
        try:
            counted[name] = pictures.length(prompt)[0]
        except InputError:
            if pictures.data.on_bad_row == "error":
                raise
            counted[name] = 0
    return counted[name]


def _has_sizes(prompt: Prompt) -> bool:
    return all(m.size is not None for m in prompt.media)


def _with_sizes(prompt: Prompt, opens: bool = False) -> Prompt:
    """The prompt with the sizes of media that are arrays, and of the others too if it opens them."""
    if _has_sizes(prompt):
        return prompt
    media = [
        replace(m, size=check(m))
        if m.size is None and (opens or isinstance(m.source, np.ndarray))
        else m
        for m in prompt.media
    ]
    return replace(prompt, media=tuple(media))


def _opened(prompt: Prompt, pictures: MediaEncoder) -> Prompt:
    """The prompt with the sizes of all its media; as it was if it is bad and may be skipped. Raises InputError."""
    try:
        return _with_sizes(prompt, opens=True)
    except InputError as error:
        if pictures.data.on_bad_row == "error":
            raise InputError(f"{prompt.row or prompt.id}: {error}") from None
        return prompt
