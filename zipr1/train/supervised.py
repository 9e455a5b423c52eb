"""The supervised stage: cross-entropy on the assistant's turns, dense attention.

It makes the embedded base model (recipes/tiny_base.yaml). Embedded lessons put several questions behind one picture,
each blind to the others and placed where it would stand alone: seen one after another, an answer could be copied from
the questions before it, and a model trained so never looked at the picture (docs/log.md). Files of rows are taken as
they are, one answer each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from zipr1.core import distributed
from zipr1.core.recipe import Recipe
from zipr1.core.types import Prompt
from zipr1.data.digits import tasks
from zipr1.models.encoder import Pictures
from zipr1.models.policy import Policy
from zipr1.models.processors import Encoded
from zipr1.train import losses
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


def lesson(policy: Policy, recipe: Recipe, step: int, stage: int) -> list[Lesson]:
    """Embedded scenes for one step, a pure function of the arguments. stage: index into the curriculum. One question
    in four has a second turn."""
    plan = recipe.supervised
    scenes = tasks.lesson(
        recipe.seed,
        step,
        recipe.train.prompts,
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


def rows(policy: Policy, recipe: Recipe, prompts: Sequence[Prompt]) -> list[Lesson]:
    """A step's prompts with their right answers appended."""
    batch = []
    for prompt, encoded in zip(*Pictures(policy, recipe).usable(prompts), strict=True):
        ids = torch.cat([encoded.ids, policy.processor.answer_ids(prompt.answer)])
        batch.append(Lesson(policy.place(ids, encoded.visuals, encoded.picture)))
    return batch


def backward(policy: Policy, batch: Sequence[Lesson]) -> tuple[float, float]:
    """The gradient of the mean cross-entropy over the answer tokens of the step, summed over ranks and added to the
    parameters'; the mean, and the share of tokens predicted right. batch: the whole step's, the same on all ranks."""
    count = sum(answer_tokens(policy, lesson) for lesson in batch)
    # A rank without a row of its own takes one that does not count: passes are where sharded ranks wait for each other.
    own = [batch[i] for i in distributed.deal(len(batch))]
    share = float(bool(own))
    own = own or list(batch[:1])
    said = [0.0, 0.0]

    def work() -> torch.Tensor:
        total, right, _ = loss(policy, own, split=len(batch) >= 2 * distributed.size())
        said[:] = [share * float(total.detach() / count), share * right / count]
        return with_tower(policy, [lesson.encoded for lesson in own], total * share / count)

    policy.parallel.backward(work, last=True)
    parts = distributed.gather(said)
    return sum(value for value, _ in parts), sum(right for _, right in parts)


def answer_tokens(policy: Policy, lesson: Lesson) -> int:
    return int(policy.processor.answer_mask(lesson.encoded.ids)[1:].sum())


def loss(
    policy: Policy, batch: Sequence[Lesson], split: bool = True
) -> tuple[torch.Tensor, float, int]:
    """Cross-entropy summed over answer tokens, how many of them are predicted right, and their number.

    Long and short conversations run apart: padding pictures to the length of clips cost a third of the time.
    split: False where another rank may have one row only, and so one pass.
    """
    order = sorted(batch, key=len)
    half = len(order) // 2 if split else 0
    total, right, count = torch.zeros((), device=policy.device), 0.0, 0
    for part in (order[:half], order[half:]):
        if part:
            states, wanted = _predictions(policy, part)
            lost, same = _scores(policy, states, wanted)
            total = total + lost
            right += float(same)
            count += len(wanted)
    return total, right, count


def _predictions(policy: Policy, batch: Sequence[Lesson]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states `(M, hidden)` that predict all answer tokens of a batch, and the tokens `(M,)`."""
    encoded = [lesson.encoded for lesson in batch]
    inputs, valid = policy.rows(encoded, policy.look(encoded), None, left=False)
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
    states = hidden[:, :-1][said[:, 1:].to(hidden.device)]
    return states, target[:, 1:][said[:, 1:]].to(states.device)


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
    return (shared & torch.ones(width, width, dtype=torch.bool).tril())[:, None].to(device)
