"""Does it fit? The longest questions are tried before the first step, and what comes of it is thrown away.

A run that would die of memory in its third hour dies in its first minute. Lengths are estimated, from the sizes that
files of pictures have in their first bytes, for clips from the most that they can have.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from zipr1.core.recipe import Recipe
from zipr1.core.types import Media, Prompt
from zipr1.models.encoder import Pictures
from zipr1.models.policy import Policy
from zipr1.models.processors import PixelSettings
from zipr1.train.controller import Pressure
from zipr1.train.rollout import roll_out
from zipr1.train.update import backward, flatten

LOOKED = 1024  # prompts whose lengths are estimated, evenly spaced


def rehearse(policy: Policy, recipe: Recipe, pictures: Pictures, prompts: Sequence[Prompt]) -> int:
    """Roll out and learn from the longest questions with answers of full length, and change nothing. Returns the
    tokens of the longest row."""
    few = prompts[:: max(1, len(prompts) // LOOKED)]
    most = -(-recipe.train.micro_batch // recipe.budgets.count)
    count = min(most, recipe.train.prompts, len(few))
    longest = sorted(few, key=lambda p: length(p, policy, recipe), reverse=True)
    asked: list[Prompt] = []
    while not asked:  # rows that may be skipped are only known to be bad once they are read
        tried, longest = longest[:count], longest[count:]
        asked, encoded = pictures.usable(tried, least=int(not longest))

    trained = policy.settings.train_vision
    seen = policy.parallel.apart(lambda: pictures.look(encoded), policy=trained, reference=trained)
    batch = roll_out(policy, recipe, asked, encoded, seen.policy, 0, seen.reference)
    generator = torch.Generator().manual_seed(0)
    for group in batch.groups:
        for rollout in group.rollouts:
            missing = recipe.train.max_new_tokens - len(rollout.tokens)
            # Any words but special ones will do, so long as each answer is another.
            extra = torch.randint(100, 200, (missing,), generator=generator) % policy.words
            rollout.tokens = torch.cat([rollout.tokens, extra])
            rollout.logprobs = torch.cat([rollout.logprobs, torch.zeros(missing)])
    none = Pressure({}, {}, torch.zeros(policy.layers))
    rows = flatten(batch, recipe, none)
    order = sorted(range(len(rows.lengths)), key=lambda b: -rows.lengths[b])
    backward(policy, recipe, batch, rows, order[: recipe.train.micro_batch], share=1.0)
    for _, parameter in policy.trainable():
        parameter.grad = None
    return max(rows.lengths)


def length(prompt: Prompt, policy: Policy, recipe: Recipe) -> float:
    """About how many tokens a prompt has: a quarter of its characters, and one for each `factor` squared pixels."""
    settings = policy.processor.settings
    text = sum(len(str(m.get("content", ""))) for m in prompt.messages) / 4
    return text + sum(visual(m, settings, recipe) for m in prompt.media)


def visual(media: Media, settings: PixelSettings, recipe: Recipe) -> float:
    if isinstance(media.source, np.ndarray):
        frames = media.source[None] if media.source.ndim == 3 else media.source
        count, (height, width) = len(frames), frames.shape[1:3]
    elif media.kind == "image" and isinstance(media.source, str | Path):
        count = 1
        try:
            with Image.open(media.source) as picture:
                width, height = picture.size
        except OSError:
            return 0.0  # a bad row is reported where it is read
    else:
        count, height, width = recipe.data.max_frames, settings.max_pixels, 1
    area = min(max(height * width, settings.min_pixels), settings.max_pixels)
    return -(-count // settings.temporal) * area / settings.factor**2
