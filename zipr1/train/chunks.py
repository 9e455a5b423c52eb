"""Prompts a chunk at a time, so that memory does not grow with their number: few media are decoded at once, and their
pixels are forgotten once the vision tower has seen them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from zipr1.core.errors import InputError
from zipr1.core.types import Prompt
from zipr1.models.encoder import Looked, MediaEncoder, without_patches
from zipr1.models.processors import Encoded

# Media that are decoded at a time: 16 clips of 16 frames of 100,352 pixels are 0.6 GB as patches.
MEDIA = 16
# Bytes of vision features at a time: 2,048 tokens of a 7B model take 15 MB in bfloat16.
FEATURES = 2**30


@dataclass(frozen=True)
class Chunk:
    """Prompts that were read and seen. places: of them among all; encoded: theirs, without patches."""

    places: list[int]
    encoded: list[Encoded]
    features: Looked


def by_media(prompts: Sequence[Prompt], most: int) -> Iterator[list[int]]:
    """Places of prompts that follow each other and have at most `most` different media together; a single prompt may
    have more."""
    part: list[int] = []
    media: set[str] = set()
    for place, prompt in enumerate(prompts):
        keys = {m.key for m in prompt.media}
        if part and len(media | keys) > most:
            yield part
            part, media = [], set()
        part.append(place)
        media |= keys
    if part:
        yield part


def seen(
    pictures: MediaEncoder, prompts: Sequence[Prompt], size: int, skip: bool = False
) -> Iterator[Chunk]:
    """Chunks of at most `size` prompts, fewer where their features are more than FEATURES bytes.

    skip: leave out bad rows with a warning, where `data.on_bad_row` says so; else they are an InputError.
    """
    for start in range(0, len(prompts), size):
        chunk = Chunk([], [], Looked({}, {}))
        for part in by_media(prompts[start : start + size], MEDIA):
            few = [prompts[start + i] for i in part]
            good, encoded = pictures.usable(few, least=0) if skip else (few, pictures.encode(few))
            looked = pictures.encode_vision(encoded)
            waiting = iter(part)  # some may be missing, the others are in order
            chunk.places.extend(
                next(start + i for i in waiting if prompts[start + i] is prompt) for prompt in good
            )
            chunk.encoded.extend(without_patches(one) for one in encoded)
            chunk.features.policy.update(looked.policy)
            chunk.features.reference.update(looked.reference)
            if _bytes(chunk.features) > FEATURES:
                yield chunk
                chunk = Chunk([], [], Looked({}, {}))
        if chunk.places:
            yield chunk


def readable(pictures: MediaEncoder, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts that can be decoded and tokenised; bad ones are left out with a warning. Nothing that was decoded
    stays. Raises InputError if none is left."""
    good: list[Prompt] = []
    for part in by_media(prompts, MEDIA):
        good += pictures.usable([prompts[i] for i in part], least=0)[0]
    if prompts and not good:
        raise InputError(
            f"all of {len(prompts)} rows are bad, the first is {prompts[0].id}; mend the data"
        )
    return good


def _bytes(features: Looked) -> int:
    tensors = {id(t): t.nbytes for part in features for t in part.values()}
    return sum(tensors.values())
