"""The supervised stage: cross-entropy on the assistant's turns, dense attention.

It makes the embedded base model (recipes/tiny_base.yaml). Embedded lessons put several questions behind one picture,
each blind to the others and placed where it would stand alone: seen one after another, an answer could be copied from
the questions before it, and a model trained so never looked at the picture (docs/log.md). Files of rows are taken as
they are, one answer each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from zipr1.core import distributed
from zipr1.core.errors import InputError
from zipr1.core.recipe import Recipe
from zipr1.core.types import Prompt
from zipr1.data.embedded import SOURCES
from zipr1.models.batching import by_length
from zipr1.models.encoder import MediaEncoder
from zipr1.models.policy import Features, Policy
from zipr1.models.processors import Encoded
from zipr1.models.token_budget import token_budget
from zipr1.models.transfer import fetch, send
from zipr1.train import chunks, losses
from zipr1.train.update import with_tower

VISION_END = "<|vision_end|>"


@dataclass(frozen=True)
class Lesson:
    """A conversation. segments `(l,)` int64: 0 for what all questions see, then the number of the question; a token
    attends to segment 0 and to its own. None: one conversation, plainly causal."""

    encoded: Encoded
    segments: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.encoded)


@dataclass(frozen=True)
class Portion:
    """This rank's rows of a step, at least one. features: of their pictures, if they were looked at (then their patches
    are gone). counted: False for a rank without a row of its own, which takes another's that does not count."""

    lessons: list[Lesson]
    features: Features | None
    counted: bool


def lesson(policy: Policy, recipe: Recipe, step: int, stage: int) -> list[Lesson]:
    """Embedded scenes for one step, a pure function of the arguments. stage: index into the curriculum. One question
    in four has a second turn."""
    plan = recipe.supervised
    scenes = SOURCES[recipe.data.source].lesson(
        recipe.seed,
        step,
        recipe.train.prompts_per_step,
        plan.video_share,
        plan.curriculum[stage],
        plan.hard_share,
        plan.questions,
    )
    batch = []
    for index, (scene, pairs) in enumerate(scenes):
        visual = policy.processor.visual(scene.kind, scene.pixels, scene.fps)
        parts, segments, places = [], [], []
        for number, turns in enumerate(_conversations(pairs), start=1):
            messages: list[dict[str, Any]] = []
            for question, answer in turns:
                messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
                messages.append({"role": "assistant", "content": answer})
            messages[0]["content"].insert(0, {"type": scene.kind})
            text = policy.processor.text(messages, generation=False).rstrip()
            first, rest = text.split(VISION_END, 1)
            if number == 1:
                shown = policy.processor.ids(first + VISION_END, [visual])
                prefix = policy.place(shown, [visual], f"{step}/{index}")
                parts, segments, places = [shown], [torch.zeros_like(shown)], [prefix.positions]
            ids = policy.processor.ids(rest, [])
            parts.append(ids)
            segments.append(torch.full_like(ids, number))
            places.append((prefix.next_position + torch.arange(len(ids))).expand(3, -1))
        encoded = Encoded(
            torch.cat(parts), torch.cat(places, dim=1), 0, prefix.visuals, prefix.picture
        )
        batch.append(Lesson(encoded, torch.cat(segments)))
    return batch


def _conversations(pairs: Sequence[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Questions and answers in conversations of one turn, every fourth of two."""
    waiting, out = list(pairs), list[list[tuple[str, str]]]()
    while waiting:
        turns = 2 if len(out) % 4 == 3 else 1
        out.append(waiting[:turns])
        waiting = waiting[turns:]
    return out


def own_lessons(policy: Policy, recipe: Recipe, step: int, stage: int) -> Portion:
    """This rank's part of `lesson`."""
    made = lesson(policy, recipe, step, stage)
    own = [made[i] for i in distributed.deal(len(made))]
    return Portion(own or made[:1], None, bool(own))


def own_rows(pictures: MediaEncoder, prompts: Sequence[Prompt]) -> Portion:
    """This rank's part of a step's prompts, with their right answers appended."""
    mine = [prompts[i] for i in distributed.deal(len(prompts))]
    own, features = _read(pictures, mine)
    if not sum(distributed.gather(len(own))):
        raise InputError(
            f"all of {len(prompts)} rows are bad, the first is {prompts[0].id}; mend the data"
        )
    for prompt in prompts if not own else ():
        spare, features = _read(pictures, [prompt])
        if spare:
            return Portion(spare, features, False)
    return Portion(own, features, True)


def _read(
    pictures: MediaEncoder, prompts: Sequence[Prompt]
) -> tuple[list[Lesson], Features | None]:
    """Conversations of the prompts that can be read, and the features of their pictures unless the tower is trained:
    that one needs the pixels in each pass."""
    policy = pictures.policy
    features: Features | None = None
    if policy.settings.train_vision:
        asked, encoded = pictures.usable(prompts, least=0)
    else:
        asked, encoded, features = [], [], {}
        for chunk in chunks.seen(pictures, prompts, max(1, len(prompts)), skip=True):
            asked += [prompts[i] for i in chunk.places]
            encoded += chunk.encoded
            features |= chunk.features.policy
    lessons = []
    for prompt, one in zip(asked, encoded, strict=True):
        ids = torch.cat([one.ids, policy.processor.answer_ids(prompt.answer)])
        lessons.append(Lesson(policy.place(ids, one.visuals, one.picture)))
    return lessons, features


def backward(policy: Policy, recipe: Recipe, portion: Portion) -> tuple[float, float]:
    """The gradient of the mean cross-entropy over the answer tokens of the step, summed over ranks and added to the
    parameters'; the mean, and the share of tokens predicted right.

    One pass after another, each of at most `train.micro_batch` rows and of the tokens that a pass of the update may
    have; all ranks make the same number of passes, for those are where sharded ranks wait for each other.
    """
    lessons = portion.lessons
    own = sum(answer_tokens(policy, one) for one in lessons) if portion.counted else 0
    count = sum(distributed.gather(own))
    # Long and short conversations run apart: padding pictures to the length of clips cost a third of the time.
    most = min(recipe.train.micro_batch, -(-len(lessons) // 2))
    room = token_budget(policy, recipe, update=True)
    parts = by_length([len(one) for one in lessons], most, room)
    cost, right = 0.0, 0.0
    passes = max(distributed.gather(len(parts)))
    for turn in range(passes):
        # Where another rank has more passes, the shortest row goes once more and does not count.
        some = [lessons[i] for i in parts[turn]] if turn < len(parts) else [min(lessons, key=len)]
        share = 1 / count if portion.counted and turn < len(parts) else 0.0
        work = partial(_pass, policy, some, portion.features, share)
        lost, same = policy.parallel.backward(work, last=turn + 1 == passes)
        cost, right = cost + lost * share, right + same * share
    both = distributed.gather((cost, right))
    return sum(value for value, _ in both), sum(right for _, right in both)


def answer_tokens(policy: Policy, lesson: Lesson) -> int:
    return int(policy.processor.answer_mask(lesson.encoded.ids)[1:].sum())


def _pass(
    policy: Policy, batch: Sequence[Lesson], features: Features | None, share: float
) -> tuple[torch.Tensor, tuple[float, float]]:
    """Cross-entropy summed over answer tokens, times `share`; the sum itself, and how many are predicted right."""
    lost, same = _scores(policy, *_predictions(policy, batch, features))
    loss = with_tower(policy, [lesson.encoded for lesson in batch], lost * share)
    cost, right = fetch(lost.detach(), same)
    return loss, (float(cost), float(right))


def _predictions(
    policy: Policy, batch: Sequence[Lesson], features: Features | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states `(M, hidden)` that predict all answer tokens of a batch, and the tokens `(M,)`. features: of its
    pictures, or None to look at them now."""
    encoded = [lesson.encoded for lesson in batch]
    features = policy.encode_vision(encoded) if features is None else features
    inputs, valid = policy.rows(encoded, features, None, left=False)
    hidden = policy.decoder(
        **inputs,
        attention_mask=_mask(batch, valid.shape[1], policy.device),
        use_cache=False,
    ).last_hidden_state
    target = torch.zeros(valid.shape, dtype=torch.long)
    said = torch.zeros(valid.shape, dtype=torch.bool)
    for b, e in enumerate(encoded):
        target[b, : len(e)] = e.ids
        said[b, : len(e)] = policy.processor.answer_mask(e.ids)
    said, target = said[:, 1:].flatten(), target[:, 1:].flatten()
    places = said.nonzero()[:, 0]
    places, wanted = send(hidden.device, places, target[places])
    return hidden[:, :-1].flatten(0, 1)[places], wanted


def _scores(
    policy: Policy, states: torch.Tensor, wanted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy summed over tokens, and how many of them are predicted right; scalars."""

    def work(part: slice) -> tuple[torch.Tensor, ...]:
        logits = policy.head(states[part])
        lost = F.cross_entropy(logits, wanted[part], reduction="sum")
        return lost[None], (logits.argmax(-1) == wanted[part]).sum()[None]

    lost, same = losses.in_chunks(work, len(wanted), policy.words)
    return lost.sum(), same.sum()


def _mask(batch: Sequence[Lesson], width: int, device: torch.device) -> torch.Tensor | None:
    """Who attends to whom, `(B, 1, width, width)` bool, or None where causality says it all."""
    if all(lesson.segments is None for lesson in batch):
        return None
    segments = torch.zeros(len(batch), width, dtype=torch.long)
    for b, lesson in enumerate(batch):
        if lesson.segments is not None:
            segments[b, : len(lesson)] = lesson.segments
    shared = (segments == 0)[:, None, :] | (segments[:, :, None] == segments[:, None, :])
    mask = (shared & torch.ones(width, width, dtype=torch.bool).tril())[:, None]
    (there,) = send(device, mask)
    return there
