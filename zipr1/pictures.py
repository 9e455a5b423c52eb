"""Prompts made ready for the model: media decoded, prompts tokenised, pictures seen, each once.

A frozen tower says the same about a picture in every step, so what it said is remembered. Pictures go through it one
at a time: the numbers then do not depend on what else is in the step, so a resumed run, which remembers nothing, gets
the same ones. On a CPU core that took three quarters of the time of a step's pictures in one pass.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from zipr1.data.media import load_media
from zipr1.episode import Prompt
from zipr1.errors import InputError
from zipr1.models import Encoded, Features, Policy
from zipr1.models.processors import Visual
from zipr1.recipe import Recipe

# Bytes of features that are remembered, of the pictures seen last: in the memory of the CPU, which has more.
MOST = 2**30


class Looked(NamedTuple):
    """Vision features as the policy and as the reference see them: the same unless the tower is trained."""

    policy: Features
    reference: Features


class Pictures:
    """The media of a run. most: bytes of vision features to remember; 0 where the tower is trained."""

    def __init__(self, policy: Policy, recipe: Recipe, most: int = MOST) -> None:
        self.policy = policy
        self.data = recipe.data
        self.most = 0 if policy.settings.train_vision else most
        self.seen: OrderedDict[str, torch.Tensor] = OrderedDict()
        self.visuals: dict[str, tuple[Visual, ...]] = {}
        self.held = 0

    def encode(self, prompts: Sequence[Prompt]) -> list[Encoded]:
        """Decode media, once for questions about the same picture, and tokenise. What was seen before is not decoded
        again: its `patches` are empty. Raises InputError for a bad prompt."""
        decoded: dict[str, Any] = {}
        out = []
        for prompt in prompts:
            media: Sequence[Any] = self.visuals.get(prompt.media_key, ())
            if not media:
                for m in prompt.media:
                    if m.key not in decoded:
                        decoded[m.key] = load_media(m, self.data.max_frames, self.data.fps)
                media = [decoded[m.key] for m in prompt.media]
            out.append(self.policy.encode(prompt, media, self.data.max_prompt_tokens))
        return out

    def usable(self, prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Encoded]]:
        """Prompts that can be decoded and tokenised, with what came of it. A bad one is an InputError, or with
        `data.on_bad_row: skip` left out with a warning. Raises InputError if none is left."""
        if self.data.on_bad_row == "error":
            return list(prompts), self.encode(prompts)
        good: list[Prompt] = []
        encoded: list[Encoded] = []
        for prompt in prompts:
            try:
                encoded += self.encode([prompt])
                good.append(prompt)
            except InputError as error:
                logging.getLogger("zipr1").warning("skipped %s: %s", prompt.id, error)
        if not good:
            raise InputError(
                f"all of {len(prompts)} rows are bad, the first is {prompts[0].id}; mend the data"
            )
        return good, encoded

    @torch.no_grad()
    def look(self, encoded: Sequence[Encoded]) -> Looked:
        """Features of these pictures; those that are not remembered go through the tower (if it is trained, through
        the reference's too)."""
        pictures = {e.picture: e for e in encoded if e.visuals}
        features: Features = {}
        for name, one in pictures.items():
            known = None
            if name in self.seen:
                known = {name: self.seen[name].to(self.policy.device, non_blocking=True)}
            features |= self.policy.look([one], known)
        if self.policy.settings.train_vision:
            with self.policy.reference() as model:
                return Looked(features, self.policy.look(encoded, model=model))
        for name, one in pictures.items():
            self._remember(name, one, features[name])
        return Looked(features, features)

    def _remember(self, name: str, one: Encoded, features: torch.Tensor) -> None:
        if name not in self.seen:
            self.held += features.nbytes
            self.visuals[name] = tuple(replace(v, patches=v.patches[:0]) for v in one.visuals)
            self.seen[name] = kept = features.cpu()
            if features.is_cuda:
                self.seen[name] = kept.pin_memory()
        self.seen.move_to_end(name)
        while self.held > self.most:
            oldest, dropped = self.seen.popitem(last=False)
            self.held -= dropped.nbytes
            del self.visuals[oldest]
