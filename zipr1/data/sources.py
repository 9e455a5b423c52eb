"""Where questions come from: `load` turns the recipe's `data` section into Prompts.

A source is the name of a family of embedded tasks (embedded.py) or rows in files and on the hub (rows.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from os.path import expanduser
from pathlib import Path
from typing import Literal

import numpy as np

from zipr1.core.errors import InputError, Missing
from zipr1.core.recipe import Data
from zipr1.core.types import NOTHING, Prompt
from zipr1.data import embedded, readers, rows
from zipr1.data.embedded import HELDOUT_SEED, SOURCES

Split = Literal["train", "heldout"]


def load(data: Data, split: Split, seed: int) -> list[Prompt]:
    """Prompts of one split, in an order that depends on `seed` for `train` and on nothing for `heldout`.

    `data.heldout: validation` draws embedded held-out questions from what is kept for tuning (of the digits, other
    handwriting) instead of from the test part.
    """
    source, part = data.source, "test"
    if split == "heldout":
        source = data.heldout or data.source
        if source == "validation":
            source, part = data.source, "validation"
        elif data.heldout is None and source not in SOURCES:
            raise InputError(
                "data.heldout: not set; a source of rows needs a second one of held-out rows; "
                "set data.heldout=FILE, or OWNER/NAME:SPLIT"
            )
    if source not in SOURCES:
        prompts = rows.load(source, data)
    elif split == "train":
        prompts = embedded.draw_training(source, data.mix, data.prompts, seed)
    else:
        prompts = embedded.draw_heldout(source, data.mix, data.heldout_prompts, part)
    if not prompts:
        raise InputError(f"{source}: no prompts for {split}; give at least one question")
    if source in SOURCES and split == "heldout":
        return prompts
    order = np.random.default_rng(seed if split == "train" else HELDOUT_SEED).permutation(
        len(prompts)
    )
    chosen = [prompts[i] for i in order]
    return chosen if split == "train" else chosen[: data.heldout_prompts]


def files_in(data: Data, folder: Path) -> dict[str, str]:
    """The keys of a recipe's `data` section that name files or folders of this machine outside of `folder`, and what
    they name. Rows inside of it count too: they may name pictures anywhere."""
    named = {"source": data.source, "heldout": data.heldout, "media_root": data.media_root}
    found = {}
    for key, value in named.items():
        if value is None or value in SOURCES or value == "validation":
            continue
        try:
            place = Path(expanduser(value)) if key == "media_root" else readers.file_of(value)
            within = place is None or (
                key == "media_root" and place.resolve().is_relative_to(folder.resolve())
            )
        except (ValueError, OSError):  # no name that a file can have
            within = False
        if not within:
            found[f"data.{key}"] = value
    return found


def missing(data: Data) -> list[str]:
    """What of the recipe's data sets is not here and how to get it, a message for each; one row of the others is read.

    For who is about to fail for another reason, such as a model that is not here either.
    """
    found: dict[str, str] = {}
    for source in (data.source, data.heldout):
        if source is None or source in SOURCES or source == "validation":
            continue
        try:
            _, _, numbered = readers.read(source, data)
            next(numbered, None)
        except Missing as error:
            found.setdefault(source.partition(":")[0], str(error))
        except InputError:
            pass  # told when it is read in earnest
    return list(found.values())


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
            if media.asked != NOTHING:
                digest.update(repr(media.asked).encode())
            frames = media.source if isinstance(media.source, tuple) else (media.source,)
            for source in frames:
                if isinstance(source, str | Path):
                    path = Path(source)
                    size = path.stat().st_size if path.is_file() else None
                    digest.update(f"{media.kind}:{path.name}:{size}".encode())
                else:
                    digest.update(replace(media, source=source, asked=NOTHING).key.encode())
    return digest.hexdigest()
