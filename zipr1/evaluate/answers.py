"""Questions answered dense and sparse together: media decoded once, seen once, then answered in every variant.

A variant is a value of the selection's p (1.0 is the dense model itself), or the untouched base. Answers are greedy.
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
from zipr1.evaluate import gallery
from zipr1.models.batching import by_length
from zipr1.models.encoder import MediaEncoder, without_patches
from zipr1.models.policy import Features, Policy
from zipr1.models.processors import Encoded
from zipr1.models.sampling import Answers
from zipr1.models.sparse.request import Request
from zipr1.models.token_budget import token_budget

# lmms-eval adds this stop where a task names none; answers may well have paragraphs.
IMPLICIT_STOP = "\n\n"
BASE = "base"  # the name of the base's variant


class Variant(NamedTuple):
    """One way to answer every question. name: `1`, `0.975`, or `base`. sparse: None is dense.

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
    the language model, prefill and decoding. answer_tokens: the end token included.
    """

    text: str
    layer_ratios: list[float]
    kv_bytes: int
    seconds: float
    prompt_tokens: int
    answer_tokens: int

    @property
    def token_ratio(self) -> float:
        """Mean over layers of the kept share of the prompt."""
        return float(np.mean(self.layer_ratios))


@dataclass
class Answered:
    """One question's answers, in the order of the variants. The seconds are of its media, once for all variants.

    pictures: the picture or clip as it is and darkened where tokens were dropped, as gallery.py draws them.
    """

    answers: list[Answer]
    decoding_seconds: float
    vision_seconds: float
    pictures: list[str] = field(default_factory=list)


class Conditions(NamedTuple):
    """What dense and sparse share. frames, fps, frame_pixels: of clips, at most; fps None takes all frames."""

    max_new_tokens: int = 16
    frames: int = 64
    fps: float | None = 2.0
    frame_pixels: int = 256 * 28 * 28
    stops: tuple[str, ...] = ()


class Answerer:
    """A loaded policy and the variants in which it answers: a value of p each, then the base.

    batch: most questions in one forward pass; fewer where the memory of a GPU holds fewer tokens. base: the untouched
    model that the policy was trained from, dense. shown: of how many questions pictures are drawn. micro_tokens: most
    tokens in one pass, as a recipe has it; None: what the memory of a GPU holds.
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
        self.policy = policy
        self.variants = tuple(
            Variant(f"{p:g}", p, None if p >= 1 else sparse.model_copy(update={"p": p}))
            for p in p_values
        )
        if base is not None:
            self.variants += (Variant(BASE, 1.0, model=base.model),)
        self.batch = batch
        self.bound = Recipe(train=Train(micro_tokens=micro_tokens))
        self.shown = shown
        text = policy.model.config.get_text_config()
        heads = text.num_key_value_heads
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.token_bytes = 2 * heads * dim * policy.decoder.embed_tokens.weight.element_size()
        self.longest = int(text.max_position_embeddings)

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
        try:
            size = self.batch * 4
            encoder = self._encoder(conditions)
            drawn: set[str] = set()
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
        drawn: set[str],
        tell: Callable[[int], None],
    ) -> list[Answered]:
        """Answers of some questions. encoder: knows the pictures that were seen last. drawn: pictures that are drawn
        already; changed here. tell: called after each batch with how many are done."""
        encoded: list[Encoded] = []
        answered: list[Answered] = []
        pixels: dict[int, np.ndarray] = {}  # of questions whose picture is to be drawn
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
            if len(one.visuals) == 1 and one.picture not in drawn and len(drawn) < self.shown:
                drawn.add(one.picture)
                pixels[b], _ = load_media(prompt.media[0], *encoder.frames)
        kept: dict[int, Any] = {}  # of the first sparse variant
        done = 0
        lengths = [len(e) + conditions.max_new_tokens for e in encoded]
        most = token_budget(self.policy, self.bound, update=False)
        for batch in by_length(lengths, self.batch, most):
            for variant in self.variants:
                began = time.perf_counter()
                output = self.policy.generate(
                    [encoded[b] for b in batch],
                    features,
                    None if variant.sparse is None else Request(variant.sparse),
                    conditions.max_new_tokens,
                    model=variant.model,
                )
                seconds = (time.perf_counter() - began) / len(batch)
                for row, b in enumerate(batch):
                    answer = self._answer(output, row, len(encoded[b]), seconds, conditions.stops)
                    answered[b].answers.append(answer)
                    if b in pixels and output.kept is not None:
                        kept.setdefault(b, output.kept[row])
            done += len(batch)
            tell(done)
        for b, positions in kept.items():
            answered[b].pictures = gallery.draw(self.policy, encoded[b], pixels[b], positions)
        return answered

    def _answer(
        self, output: Answers, row: int, length: int, seconds: float, stops: Sequence[str]
    ) -> Answer:
        """What a row of a batch says. length: tokens of its prompt."""
        layers = self.policy.layers
        counts = [length] * layers if output.counts is None else output.counts[row].tolist()
        return Answer(
            text=cut(self.policy.processor.decode(output.tokens[row]), stops),
            layer_ratios=[count / length for count in counts],
            kv_bytes=sum(counts) * self.token_bytes,
            seconds=seconds,
            prompt_tokens=length,
            answer_tokens=len(output.tokens[row]),
        )


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    places = [text.find(stop) for stop in stops if stop and stop != IMPLICIT_STOP]
    return text[: min((p for p in places if p >= 0), default=len(text))].strip()
