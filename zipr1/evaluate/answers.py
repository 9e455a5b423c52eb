"""Questions answered at several budgets in one pass: media decoded once, seen once, answered dense and sparse.

Not here: where questions come from and what makes an answer right (lmms-eval, in harness.py). Answers are greedy.
A budget is the p of the selection; 1.0 is the dense model itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from zipr1.core.errors import InputError
from zipr1.core.recipe import Sparse
from zipr1.core.types import Prompt
from zipr1.data.media import load_media
from zipr1.evaluate import gallery, processes
from zipr1.models.batching import by_length
from zipr1.models.policy import Features, Policy
from zipr1.models.processors import Encoded, Processor, Visual
from zipr1.models.sparse.request import Request

# lmms-eval adds this stop where a task names none; answers may well have paragraphs.
IMPLICIT_STOP = "\n\n"


@dataclass
class Said:
    """One answer at one budget. layer_ratios: kept share of the prompt by layer, `(D,)`, ones when dense.

    kv_bytes: keys and values of this prompt after its prefill, no padding. seconds: its share of the batch's time in
    the language model, prefill and decoding. length: prompt tokens. tokens: answer tokens, the end token included.
    """

    text: str
    layer_ratios: list[float]
    kv_bytes: int
    seconds: float
    length: int
    tokens: int

    @property
    def token_ratio(self) -> float:
        """Mean over layers of the kept share of the prompt."""
        return float(np.mean(self.layer_ratios))


@dataclass
class Answered:
    """One question's answers, by budget. seconds: of decoding its media and of the vision tower."""

    said: list[Said]
    decoding: float
    vision: float
    pictures: list[str] = field(default_factory=list)


class Conditions(NamedTuple):
    """What dense and sparse share. frames, fps, frame_pixels: of clips, at most; fps None takes all frames."""

    max_new_tokens: int = 16
    frames: int = 64
    fps: float | None = 2.0
    frame_pixels: int = 256 * 28 * 28
    stops: tuple[str, ...] = ()


class Answerer:
    """A loaded policy and the budgets it answers at. batch: most questions in one forward pass.

    base: the untouched model that the policy was trained from; its dense answers come after those of all budgets.
    shown: of how many questions pictures are drawn.
    """

    def __init__(
        self,
        policy: Policy,
        sparse: Sparse,
        budgets: Sequence[float],
        batch: int = 16,
        shown: int = 3,
        base: Policy | None = None,
    ) -> None:
        for p in budgets:
            if not 0 < p <= 1:
                raise InputError(
                    f"--budget {p}: outside (0, 1]; give shares such as 0.975, or 1.0 for dense"
                )
        self.policy = policy
        self.budgets = tuple(budgets)
        self.settings = [None if p >= 1 else sparse.model_copy(update={"p": p}) for p in budgets]
        self.base = base
        self.batch = batch
        self.shown = shown
        text = policy.core.config.get_text_config()
        heads = text.num_key_value_heads
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.token_bytes = 2 * heads * dim * policy.decoder.embed_tokens.weight.element_size()
        self.longest = int(text.max_position_embeddings)

    @property
    def turns(self) -> int:
        """Answers to each question: one for each budget, and the base's."""
        return len(self.budgets) + (self.base is not None)

    def answer(
        self,
        asked: Sequence[Callable[[], Prompt]],
        conditions: Conditions,
        tell: Callable[[int], None] = lambda done: None,
    ) -> list[Answered]:
        """Answers to questions that are made when their turn comes, in their order.

        Under several processes each takes every n-th question, and all get all answers. tell: called with the number
        of questions done. Raises InputError for media that cannot be read, on every process.
        """
        mine = range(processes.rank(), len(asked), processes.world())
        found: list[tuple[int, Answered]] = []
        failure: str | None = None
        try:
            size = self.batch * 4
            known: Features = {}
            seen: set[str] = set()
            for start in range(0, len(mine), size):
                chunk = mine[start : start + size]

                def told(done: int, start: int = start) -> None:
                    tell(min(len(asked), (start + done) * processes.world()))

                answered, known = self._chunk(
                    [asked[i]() for i in chunk], conditions, known, seen, told
                )
                found += zip(chunk, answered, strict=True)
        except InputError as error:
            failure = str(error)
        parts = processes.gather((found, failure))
        failures = [f for _, f in parts if f is not None]
        if failures:
            raise InputError(failures[0])
        every = dict(pair for part, _ in parts for pair in part)
        return [every[i] for i in range(len(asked))]

    def _chunk(
        self,
        prompts: Sequence[Prompt],
        conditions: Conditions,
        known: Features,
        seen: set[str],
        tell: Callable[[int], None],
    ) -> tuple[list[Answered], Features]:
        """Answers of some questions, and the features of their pictures, which the next ones may ask about too.

        seen: pictures that are drawn already; changed here. tell: called after each batch with how many are done.
        """
        encoded, decoding, shots = self._encode(prompts, conditions)
        drawn = []
        for b, one in enumerate(encoded):
            if len(one.visuals) == 1 and one.picture not in seen and len(seen) < self.shown:
                seen.add(one.picture)
                drawn.append(b)
        features, vision = self._look(encoded, known)
        answered = [Answered([], d, v) for d, v in zip(decoding, vision, strict=True)]
        kept: list[list[Any]] = [[] for _ in prompts]
        done = 0
        for rows in by_length([len(e) for e in encoded], self.batch):
            done += len(rows)
            few = [encoded[b] for b in rows]
            for setting, model in self._passes():
                request = None if setting is None else Request(setting)
                began = time.perf_counter()
                answers = self.policy.generate(
                    few, features, request, conditions.max_new_tokens, model=model
                )
                spent = (time.perf_counter() - began) / len(rows)
                for row, b in enumerate(rows):
                    counts = None if answers.counts is None else answers.counts[row]
                    length, layers = len(encoded[b]), self.policy.layers
                    held = length * layers if counts is None else int(counts.sum())
                    ratios = (
                        [1.0] * layers if counts is None else (counts.double() / length).tolist()
                    )
                    text = cut(self.policy.processor.decode(answers.tokens[row]), conditions.stops)
                    answered[b].said.append(
                        Said(
                            text,
                            ratios,
                            held * self.token_bytes,
                            spent,
                            length,
                            len(answers.tokens[row]),
                        )
                    )
                    if b in drawn and answers.kept is not None and not kept[b]:
                        kept[b] = answers.kept[row]
            tell(done)
        for b, positions in enumerate(kept):
            if b in drawn and positions:
                answered[b].pictures = gallery.draw(self.policy, encoded[b], shots[b], positions)
        return answered, {e.picture: features[e.picture] for e in encoded if e.visuals}

    def _passes(self) -> list[tuple[Sparse | None, Any]]:
        passes: list[tuple[Sparse | None, Any]] = [(setting, None) for setting in self.settings]
        return passes if self.base is None else [*passes, (None, self.base.core)]

    def _encode(
        self, prompts: Sequence[Prompt], conditions: Conditions
    ) -> tuple[list[Encoded], list[float], list[np.ndarray]]:
        """Each picture decoded once; also seconds and the first medium's pixels, by question."""
        processor = self.policy.processor
        most = min(conditions.frame_pixels, processor.settings.max_pixels)
        low = min(processor.settings.min_pixels, most)
        clips = Processor(
            processor.tokenizer,
            replace(processor.settings, min_pixels=low, max_pixels=most),
            processor.placeholder["image"],
            processor.placeholder["video"],
        )
        made: dict[str, tuple[Visual, np.ndarray]] = {}
        encoded, seconds, shots = [], [], []
        for prompt in prompts:
            began = time.perf_counter()
            for media in prompt.media:
                if media.key not in made:
                    pixels, fps = load_media(media, conditions.frames, conditions.fps)
                    reader = clips if media.kind == "video" else processor
                    made[media.key] = (reader.visual(media.kind, pixels, fps), pixels)
            pairs = [made[media.key] for media in prompt.media]
            encoded.append(self.policy.encode(prompt, [v for v, _ in pairs], self.longest))
            seconds.append(time.perf_counter() - began)
            shots.append(pairs[0][1] if pairs else np.zeros((0, 0, 3), np.uint8))
        return encoded, seconds, shots

    def _look(self, encoded: Sequence[Encoded], known: Features) -> tuple[Features, list[float]]:
        """Each picture through the tower once, one at a time: so what is seen does not depend on the batch."""
        features, seconds = dict(known), []
        for one in encoded:
            began = time.perf_counter()
            features = self.policy.look([one], features)
            if self.policy.device.type == "cuda":
                torch.cuda.synchronize(self.policy.device)
            seconds.append(time.perf_counter() - began)
        return features, seconds


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    places = [text.find(stop) for stop in stops if stop and stop != IMPLICIT_STOP]
    return text[: min((p for p in places if p >= 0), default=len(text))].strip()
