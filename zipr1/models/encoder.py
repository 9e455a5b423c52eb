"""Prompts made ready for the model: media decoded, prompts tokenised, pictures seen, each once.

Features of a frozen vision tower are cached for each picture, since they are the same in every step. Pictures go
through it one at a time: the numbers then do not depend on what else is in the step, so a resumed run, whose cache is
empty, gets the same ones. On a CPU core that took three quarters of the time of a step's pictures in one pass.

Threads decode and cut into patches, `ahead` of the step that asks for it: what they make depends on the medium alone,
so their order does not matter.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch

from zipr1.core.errors import InputError
from zipr1.core.recipe import Recipe
from zipr1.core.types import Media, Prompt
from zipr1.data import video
from zipr1.data.media import limits, load_timed
from zipr1.models.policy import Features, Policy
from zipr1.models.processors import Encoded
from zipr1.models.visual import Visual

log = logging.getLogger("zipr1")

# Bytes of features that are remembered, of the pictures seen first, in the memory of the CPU, which has more. Training
# comes back to a picture when it has gone through all others: of more pictures than fit, those seen last would all be
# forgotten before they are needed, and each be copied for nothing.
MOST = 2**30


# Of a medium, and whether it is the only one of its prompt.
Key = tuple[str, bool]


class Looked(NamedTuple):
    """Vision features as the policy and as the reference see them: the same unless the tower is trained."""

    policy: Features
    reference: Features


class MediaEncoder:
    """The media of a run. most: bytes of vision features to remember; 0 where the tower is trained. frame_pixels: a
    bound of clips' frames that holds beside the model's own."""

    def __init__(
        self, policy: Policy, recipe: Recipe, most: int = MOST, frame_pixels: int | None = None
    ) -> None:
        self.policy = policy
        self.data = recipe.data
        self.frame_pixels = frame_pixels
        rule = policy.processor.settings.frame_rule
        self.frames = recipe.data.max_frames, recipe.data.fps, rule
        self.most = 0 if policy.settings.train_vision else most
        self.seen: dict[str, torch.Tensor] = {}
        self.visuals: dict[str, tuple[Visual, ...]] = {}
        self.coming: dict[Key, Future[Visual]] = {}
        self._cuts_alone = bool(policy.processor.settings.cuts.canvases)
        self.held = 0

    def ahead(self, prompts: Sequence[Prompt]) -> None:
        """Begin to decode what `encode` of these prompts will need, and forget what was begun for others."""
        self.coming = self._begun(prompts)

    def encode(self, prompts: Sequence[Prompt]) -> list[Encoded]:
        """Decode media, once for questions about the same picture, and tokenise. What was seen before is not decoded
        again: its `patches` are empty. Raises InputError for a bad prompt."""
        begun = self._begun(prompts)
        out = []
        for prompt in prompts:
            media: Sequence[Visual] = self.visuals.get(prompt.media_key, ())
            try:
                media = media or [begun[self._key(m, prompt)].result() for m in prompt.media]
            except InputError as error:
                raise InputError(f"{prompt.row or prompt.id}: {error}") from None
            out.append(self.policy.encode(prompt, media, self.data.max_prompt_tokens))
        return out

    def _begun(self, prompts: Sequence[Prompt]) -> dict[Key, Future[Visual]]:
        """The work on each medium that is not remembered, by key: begun now unless it was before."""
        new = [p for p in prompts if p.media_key not in self.visuals]
        media = {self._key(m, p): m for p in new for m in p.media}
        pool = _pool(self.data.workers)
        return {
            key: self.coming.pop(key)
            if key in self.coming
            else pool.submit(self._decode, m, alone=key[1])
            for key, m in media.items()
        }

    def _key(self, media: Media, prompt: Prompt) -> Key:
        """Of what becomes of a medium: whether it is alone in its prompt matters where only such ones are cut up."""
        return media.key, len(prompt.media) == 1 or not self._cuts_alone

    def _decode(self, media: Media, alone: bool) -> Visual:
        pixels, fps, times = load_timed(media, *self.frames)
        return self.policy.processor.visual(
            media.kind, pixels, fps, times, frame_pixels=self.frame_pixels, asked=media.asked,
            alone=alone,
        )  # fmt: skip

    def fitting(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Prompts with one placeholder for each medium and at most `data.max_prompt_tokens` tokens, found from the
        sizes of their media: nothing is decoded, and nothing is ever cut to fit. Media whose size is not known are
        looked at when their turn comes. A bad prompt is an InputError, or left out with a count (`data.on_bad_row`).
        """
        good, bad = [], []
        for prompt in prompts:
            try:
                if all(m.size is not None for m in prompt.media):
                    self.length(prompt)
                good.append(prompt)
            except InputError as error:
                if self.data.on_bad_row == "error":
                    raise
                bad.append(str(error))
        if bad:
            log.warning("%d of %d prompts skipped; the first: %s", len(bad), len(prompts), bad[0])
        if prompts and not good:
            raise InputError(f"all of {len(prompts)} prompts are bad; the first: {bad[0]}")
        return good

    def length(self, prompt: Prompt) -> tuple[int, int]:
        """Tokens of a prompt whose media have sizes, and how many of them are visual. Raises InputError."""
        processor, visuals = self.policy.processor, []
        where = prompt.row or prompt.id
        try:
            for media in prompt.media:
                assert media.size is not None
                total, height, width, own = media.size
                fps: float | None = None
                times = None
                if media.kind == "video":
                    chosen = video.choose(total, own, *limits(media, *self.frames))
                    times = chosen / own if own > 0 else None
                    rows = len(chosen)
                    total, fps = rows, own * rows / total
                visuals.append(
                    processor.planned(
                        media.kind,
                        total,
                        height,
                        width,
                        fps,
                        times,
                        media.asked,
                        alone=len(prompt.media) == 1,
                    )
                )
            length = processor.length(processor.text(prompt.messages), visuals)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        most = self.data.max_prompt_tokens
        if length > most:
            raise InputError(
                f"{where}: the prompt has {length} tokens and data.max_prompt_tokens is {most}; raise it, or lower "
                "model.max_pixels, model.max_frame_pixels or data.max_frames"
            )
        return length, sum(v.tokens for v in visuals)

    def usable(
        self, prompts: Sequence[Prompt], least: int = 1
    ) -> tuple[list[Prompt], list[Encoded]]:
        """Prompts that can be decoded and tokenised, with what came of it. A bad one is an InputError, or with
        `data.on_bad_row: skip` left out with a warning. Raises InputError if fewer than `least` (0 or 1) are left."""
        if self.data.on_bad_row == "error":
            return list(prompts), self.encode(prompts)
        good: list[Prompt] = []
        encoded: list[Encoded] = []
        self.coming |= self._begun(prompts)
        for prompt in prompts:
            try:
                encoded += self.encode([prompt])
                good.append(prompt)
            except InputError as error:
                log.warning("skipped %s: %s", prompt.id, error)
        if len(good) < least:
            raise InputError(
                f"all of {len(prompts)} rows are bad, the first is {prompts[0].id}; mend the data"
            )
        return good, encoded

    def usable_at(
        self, prompts: Mapping[int, Prompt], places: Sequence[int], least: int = 1
    ) -> tuple[list[Prompt], list[Encoded], list[int]]:
        """`usable` of the prompts at these places, and the places of those that are left."""
        good, encoded = self.usable([prompts[i] for i in places], least)
        waiting = iter(places)  # a bad row may be missing, the others are in order
        left = [next(i for i in waiting if prompts[i] is prompt) for prompt in good]
        return good, encoded, left

    def look(self, encoded: Sequence[Encoded]) -> Looked:
        """`encode_vision` with whole weights, should the tower be trained and in parts. All ranks must come."""
        trained = self.policy.settings.train_vision
        return self.policy.parallel.run_unsharded(
            lambda: self.encode_vision(encoded), policy=trained, reference=trained
        )

    @torch.no_grad()
    def encode_vision(self, encoded: Sequence[Encoded]) -> Looked:
        """Features of these pictures; those that are not remembered go through the tower (if it is trained, through
        the reference's too)."""
        pictures = {e.picture: e for e in encoded if e.visuals}
        features: Features = {}
        for name, one in pictures.items():
            known = None
            if name in self.seen:
                known = {name: self.seen[name].to(self.policy.device, non_blocking=True)}
            features |= self.policy.encode_vision([one], known)
            self._same_number(one, features[name])
        if self.policy.settings.train_vision:
            with self.policy.reference() as model:
                return Looked(features, self.policy.encode_vision(encoded, model=model))
        for name, one in pictures.items():
            self._remember(name, one, features[name])
        return Looked(features, features)

    def _same_number(self, one: Encoded, features: torch.Tensor) -> None:
        """Raise InputError unless there is a placeholder for each feature: spare ones would be dropped unseen."""
        marks = torch.tensor(list(self.policy.processor.placeholder.values()))
        places = int(torch.isin(one.ids, marks).sum())
        if places != len(features):
            raise InputError(
                f"{one.picture}: {places} placeholders but {len(features)} visual features; the pixel settings beside "
                "the model are not those of its vision tower"
            )

    def _remember(self, name: str, one: Encoded, features: torch.Tensor) -> None:
        if name in self.seen or self.held + features.nbytes > self.most:
            return
        self.held += features.nbytes
        self.visuals[name] = without_patches(one).visuals
        # Pinned, so that no copy is waited for, in either direction: the GPU alone reads and writes it, in order.
        kept = torch.empty(features.shape, dtype=features.dtype, pin_memory=features.is_cuda)
        kept.copy_(features, non_blocking=True)
        self.seen[name] = kept


def without_patches(encoded: Encoded) -> Encoded:
    """The same prompt, for a decoder that is given the features of its media."""
    # A copy: a slice would keep all patches in memory.
    visuals = (replace(v, patches=v.patches[:0].clone()) for v in encoded.visuals)
    return replace(encoded, visuals=tuple(visuals))


@lru_cache
def _pool(workers: int) -> ThreadPoolExecutor:
    """One for all: its threads idle between steps. Decoders and PIL release the interpreter's lock."""
    return ThreadPoolExecutor(workers, thread_name_prefix="decode")


def effective(encoded: Sequence[Encoded], policy: Policy) -> list[str]:
    """What becomes of pictures and clips, a line each: sizes after resizing, frames and their rate, tokens."""
    settings = policy.processor.settings
    lines = []
    for kind, name in (("image", "pictures"), ("video", "clips")):
        seen = [v for e in encoded for v in e.visuals if v.kind == kind]
        if not seen:
            continue
        most = str(settings.cuts) if settings.tile else f"at most {settings.of(kind).max_pixels:,}"
        if kind == "video" and settings.clip_pixels is not None:
            most += " over all frames"
        parts = [
            f"{_between([v.grid[1] * settings.patch for v in seen])} x "
            f"{_between([v.grid[2] * settings.patch for v in seen])} pixels ({most})"
        ]
        if kind == "video":
            rates = [settings.temporal / v.seconds for v in seen if v.seconds]
            parts.insert(0, f"{_between([v.grid[0] * settings.temporal for v in seen])} frames")
            parts.insert(1, f"{_between([round(rate, 2) for rate in rates])} a second")
        parts.append(f"{_between([v.tokens for v in seen])} tokens")
        reader = f", read by {video.reader()[0]}" if kind == "video" else ""
        lines.append(f"{name}: {', '.join(parts)}{reader}")
    return lines


def _between(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:,g}" if low == high else f"{low:,g} to {high:,g}"
