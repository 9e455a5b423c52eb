"""Questions answered dense and sparse together: media decoded once, seen once, then answered in every variant.

A variant is a value of the selection's p (1.0 is the dense model itself), or the untouched base, dense and at the
highest p below 1, which shows what training changed. Answers are greedy.
Not here: where questions come from and what makes an answer right (lmms-eval, in harness.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from zipr1.core import distributed
from zipr1.core.errors import InputError
from zipr1.core.recipe import Data, Recipe, Sparse, Train
from zipr1.core.types import Prompt
from zipr1.data.media import load_media
from zipr1.models import gallery
from zipr1.models.batching import by_length
from zipr1.models.encoder import MediaEncoder, without_patches
from zipr1.models.loading import without_plans
from zipr1.models.policy import Features, Policy
from zipr1.models.processors import Encoded
from zipr1.models.sampling import Answers
from zipr1.models.sparse.request import Request
from zipr1.models.token_budget import token_budget

# lmms-eval adds this stop where a task names none; answers may well have paragraphs.
IMPLICIT_STOP = "\n\n"
BASE = "base"  # the name of the base's variant
UNTRAINED = "base, sparse"  # and of the base at the highest p below 1
DIFFERING = 8  # pictures drawn, a benchmark, of questions whose dense and sparse answers differ


class Variant(NamedTuple):
    """One way to answer every question. name: `1`, `0.975`, BASE or UNTRAINED. sparse: None is dense.

    model: what answers in place of the policy's own model; None is that one.
    """

    name: str
    p: float
    sparse: Sparse | None = None
    model: Any = None


@dataclass
class Answer:
    """One answer in one variant. layer_ratios: kept share of the prompt by layer, `(D,)`, ones when dense.

    kv_bytes: keys and values of this prompt after its prefill, no padding. seconds: its share of the batch's time in
    the language model, prefill and decoding; prefill_seconds: to the first token. answer_tokens: the end token
    included.
    """

    text: str
    layer_ratios: list[float]
    kv_bytes: int
    seconds: float
    prompt_tokens: int
    answer_tokens: int
    prefill_seconds: float = 0.0

    @property
    def token_ratio(self) -> float:
        """Mean over layers of the kept share of the prompt."""
        return float(np.mean(self.layer_ratios))


@dataclass
class Answered:
    """One question's answers, in the order of the variants. The seconds are of its media, once for all variants.

    pictures: the picture or clip as it is, and by a variant's name darkened where tokens were dropped, as gallery.py
    draws them; first: they are drawn whatever the answers are.
    """

    answers: list[Answer]
    decoding_seconds: float
    vision_seconds: float
    pictures: dict[str, str] = field(default_factory=dict)
    first: bool = False


class Conditions(NamedTuple):
    """What dense and sparse share. frames, fps, frame_pixels: of clips, at most; fps None takes all frames."""

    max_new_tokens: int = 16
    frames: int = 64
    fps: float | None = 2.0
    frame_pixels: int = 256 * 28 * 28
    stops: tuple[str, ...] = ()


@dataclass
class _Drawn:
    """Whose pictures are drawn: of which first questions, by their pictures, and of how many more."""

    first: set[str]
    differing: int


class Answerer:
    """A loaded policy and the variants in which it answers: a value of p each, then the base.

    batch: most questions in one forward pass; fewer where the memory of a GPU holds fewer tokens. base: the untouched
    model that the policy was trained from. shown: of how many questions, the first ones, pictures are drawn, and 0
    draws none; else DIFFERING more are drawn whose answers differ. micro_tokens: most tokens in one pass, as a recipe
    has it; None: what the memory of a GPU holds.
    """

    def __init__(
        self,
        policy: Policy,
        sparse: Sparse,
        p_values: Sequence[float],
        batch: int = 16,
        shown: int = 3,
        base: Policy | None = None,
        micro_tokens: int | None = None,
    ) -> None:
        for p in p_values:
            if not 0 < p <= 1:
                raise InputError(
                    f"--budget {p}: outside (0, 1]; give shares such as 0.975, or 1.0 for dense"
                )
        without_plans(policy.device)
        self.policy = policy
        self.variants = tuple(
            Variant(f"{p:g}", p, None if p >= 1 else sparse.model_copy(update={"p": p}))
            for p in p_values
        )
        dense = next((v.name for v in self.variants if v.sparse is None), None)
        sparse_ones = [v for v in self.variants if v.sparse is not None]
        self.before: str | None = dense  # the variant that a sparse answer is held against, and
        self.after = max(sparse_ones, key=lambda v: v.p).name if sparse_ones else None  # that one
        if base is not None:
            self.before = BASE
            self.variants += (Variant(BASE, 1.0, model=base.model),)
            for most in (v for v in sparse_ones if v.name == self.after):
                self.variants += (Variant(UNTRAINED, most.p, most.sparse, base.model),)
        self.batch = batch
        self.bound = Recipe(train=Train(micro_tokens=micro_tokens))
        self.shown = shown
        self._warm = False
        self.longest = int(policy.model.config.get_text_config().max_position_embeddings)

    def answer(
        self,
        asked: Sequence[Callable[[], Prompt]],
        conditions: Conditions,
        tell: Callable[[int], None] = lambda done: None,
    ) -> list[Answered]:
        """Answers to questions, in their order; each is made when it is needed, so that not all media are held at once.

        Under several processes each takes every n-th question, and all get all answers. tell: called with the number
        of questions done. Raises InputError for media that cannot be read, on every process.
        """
        mine = range(distributed.rank(), len(asked), distributed.size())
        mine_answered: list[tuple[int, Answered]] = []
        failure: str | None = None
        tell(0)
        try:
            size = self.batch * 4
            encoder = self._encoder(conditions)
            drawn = _Drawn(set(), 0)
            for start in range(0, len(mine), size):
                chunk = mine[start : start + size]

                def told(done: int, start: int = start) -> None:
                    tell(min(len(asked), (start + done) * distributed.size()))

                prompts = [asked[i]() for i in chunk]
                answered = self._chunk(prompts, conditions, encoder, drawn, told)
                mine_answered += zip(chunk, answered, strict=True)
        except InputError as error:
            failure = str(error)
        parts = distributed.gather((mine_answered, failure))
        failures = [f for _, f in parts if f is not None]
        if failures:
            raise InputError(failures[0])
        every = dict(pair for part, _ in parts for pair in part)
        return [every[i] for i in range(len(asked))]

    def _encoder(self, conditions: Conditions) -> MediaEncoder:
        data = Data(
            max_frames=conditions.frames, fps=conditions.fps, max_prompt_tokens=self.longest
        )
        return MediaEncoder(self.policy, Recipe(data=data), frame_pixels=conditions.frame_pixels)

    def _chunk(
        self,
        prompts: Sequence[Prompt],
        conditions: Conditions,
        encoder: MediaEncoder,
        drawn: _Drawn,
        tell: Callable[[int], None],
    ) -> list[Answered]:
        """Answers of some questions. encoder: knows the pictures that were seen last. drawn: what is drawn
        already; changed here. tell: called after each batch with how many are done."""
        encoded: list[Encoded] = []
        answered: list[Answered] = []
        features: Features = {}
        # One question at a time: the patches of one exist at once, and what is seen does not depend on the batch.
        for b, prompt in enumerate(prompts):
            began = time.perf_counter()
            (one,) = encoder.encode([prompt])
            decoded = time.perf_counter()
            if one.visuals and one.picture not in features:
                features |= encoder.encode_vision([one]).policy
                if self.policy.device.type == "cuda":
                    torch.cuda.synchronize(self.policy.device)
            answered.append(Answered([], decoded - began, time.perf_counter() - decoded))
            encoded.append(without_patches(one))
            if (
                len(one.visuals) == 1
                and one.picture not in drawn.first
                and len(drawn.first) < self.shown
            ):
                drawn.first.add(one.picture)
                answered[b].first = True
        kept: dict[int, dict[str, Any]] = {}  # by variant
        done = 0
        lengths = [len(e) + conditions.max_new_tokens for e in encoded]
        most = token_budget(self.policy, self.bound, update=False)
        for batch in by_length(lengths, self.batch, most):
            self._warm_up([encoded[b] for b in batch], features)
            for variant in self.variants:
                began = time.perf_counter()
                output = self.policy.generate(
                    [encoded[b] for b in batch],
                    features,
                    None if variant.sparse is None else Request(variant.sparse),
                    conditions.max_new_tokens,
                    model=variant.model,
                    timed=True,
                )
                seconds = (time.perf_counter() - began) / len(batch)
                for row, b in enumerate(batch):
                    answered[b].answers.append(
                        self._answer(output, row, len(encoded[b]), seconds, conditions.stops)
                    )
                    if variant.name in (self.after, UNTRAINED) and output.kept is not None:
                        kept.setdefault(b, {})[variant.name] = output.kept[row]
            done += len(batch)
            tell(done)
        for b, positions in sorted(kept.items()):
            if self._worth(answered[b], encoded[b], drawn):
                frames, _ = load_media(prompts[b].media[0], *encoder.frames)
                answered[b].pictures = gallery.draw(self.policy, encoded[b], frames, positions)
        return answered

    def _warm_up(self, encoded: Sequence[Encoded], features: Features) -> None:
        """The first pass of a variant takes longer than those after it, and is nobody's time: once, for nothing."""
        for variant in self.variants if not self._warm else ():
            request = None if variant.sparse is None else Request(variant.sparse)
            self.policy.generate(encoded, features, request, 2, model=variant.model)
        self._warm = True

    def _worth(self, answered: Answered, encoded: Encoded, drawn: _Drawn) -> bool:
        """Whether a question's picture is drawn: one of the first, or one of some whose answers differ."""
        if answered.first:
            return True
        if not self.shown or len(encoded.visuals) != 1 or drawn.differing == DIFFERING:
            return False
        said = {v.name: a.text for v, a in zip(self.variants, answered.answers, strict=True)}
        differs = self.before is not None and said[self.before] != said[self.after or ""]
        drawn.differing += differs
        return differs

    def _answer(
        self, output: Answers, row: int, length: int, seconds: float, stops: Sequence[str]
    ) -> Answer:
        """What a row of a batch says. length: tokens of its prompt."""
        layers = self.policy.layers
        counts = [length] * layers if output.counts is None else output.counts[row].tolist()
        return Answer(
            text=cut(self.policy.processor.decode(output.tokens[row]), stops),
            layer_ratios=[count / length for count in counts],
            kv_bytes=sum(counts) * self.policy.token_bytes,
            seconds=seconds,
            prefill_seconds=(output.prefill_seconds or 0.0) / len(output.tokens),
            prompt_tokens=length,
            answer_tokens=len(output.tokens[row]),
        )


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    places = [text.find(stop) for stop in stops if stop and stop != IMPLICIT_STOP]
    return text[: min((p for p in places if p >= 0), default=len(text))].strip()
