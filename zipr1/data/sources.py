"""Where questions come from: `load` turns the recipe's `data` section into Prompts.

A new embedded source is one file and one line in SOURCES; everything else is rows (rows.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from zipr1.core.errors import InputError
from zipr1.core.recipe import Data
from zipr1.core.types import Prompt
from zipr1.data import rows
from zipr1.data.digits import tasks
from zipr1.data.sampler import Deck as Deck

Split = Literal["train", "heldout"]
# Held-out questions are drawn with this seed whatever the run's seed is, so that runs can be compared.
HELDOUT_SEED = 20250
_SMALLEST_HARD = 40


def load(data: Data, split: Split, seed: int) -> list[Prompt]:
    """Prompts of one split, in an order that depends on `seed` for `train` and on nothing for `heldout`.

    `data.heldout: validation` takes the digits kept for tuning instead of the test digits.
    """
    source = data.source
    if split == "heldout":
        source = data.heldout or data.source
        if source == "validation":
            source = data.source
        elif data.heldout is None and source not in SOURCES:
            raise InputError(
                "data.heldout: not set; a source of rows needs a second one of held-out rows; "
                "set data.heldout=FILE, or OWNER/NAME:SPLIT"
            )
    prompts = SOURCES[source](data, split, seed) if source in SOURCES else rows.load(source, data)
    if not prompts:
        raise InputError(f"{source}: no prompts for {split}; give at least one question")
    if source in SOURCES and split == "heldout":
        return prompts
    order = np.random.default_rng(seed if split == "train" else HELDOUT_SEED).permutation(
        len(prompts)
    )
    chosen = [prompts[i] for i in order]
    return chosen if split == "train" else chosen[: data.heldout_prompts]


def identity(prompts: Sequence[Prompt]) -> str:
    """sha256 of questions: their texts, answers and rewards, and of each medium the pixels, the encoded bytes, or a
    file's name and size (clips are too large to read whole). The same rows in the same order give the same hash."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(
            repr(
                (prompt.id, prompt.messages, prompt.answer, prompt.accepted, prompt.reward)
            ).encode()
        )
        for media in prompt.media:
            if isinstance(media.source, str | Path):
                path = Path(media.source)
                size = path.stat().st_size if path.is_file() else None
                digest.update(f"{media.kind}:{path.name}:{size}".encode())
            else:
                digest.update(media.key.encode())
    return digest.hexdigest()


def _digits(data: Data, split: Split, seed: int) -> list[Prompt]:
    """The embedded tasks. train: `data.prompts` in the proportions of `data.mix`, 4 questions a picture.

    heldout: `data.heldout_prompts` questions of each task, 4 a picture; a quarter of that (but 40 at least) for
    `hard_digits`. The same questions for every mix and seed.
    """
    if split == "train":
        numbers = _shares(data.mix, data.prompts)
        drawn_from, per_picture = "train", 4
    else:
        seed, per_picture = HELDOUT_SEED, 4
        drawn_from = "validation" if data.heldout == "validation" else "test"
        most = data.heldout_prompts
        numbers = dict.fromkeys(tasks.TASKS, most)
        numbers["hard_digits"] = min(most, max(_SMALLEST_HARD, most // 4))
    made = []
    for task, number in numbers.items():
        pictures = -(-number // per_picture)
        made += tasks.prompts(drawn_from, task, pictures, per_picture, seed)[:number]
    return made


def _shares(mix: dict[str, float], number: int) -> dict[str, int]:
    """`number` split in the proportions of `mix`, largest remainders first."""
    unknown = [task for task in mix if task not in tasks.TASKS]
    if unknown:
        raise InputError(
            f"data.mix: unknown task {unknown[0]!r}; allowed: {', '.join(tasks.TASKS)}; rename or remove it"
        )
    total = sum(mix.values())
    if total <= 0:
        raise InputError("data.mix: all shares are 0; give at least one task a positive share")
    exact = {task: number * share / total for task, share in mix.items()}
    counts = {task: int(value) for task, value in exact.items()}
    for task in sorted(exact, key=lambda t: counts[t] - exact[t])[: number - sum(counts.values())]:
        counts[task] += 1
    return counts


SOURCES: dict[str, Callable[[Data, Split, int], list[Prompt]]] = {"digits": _digits}
