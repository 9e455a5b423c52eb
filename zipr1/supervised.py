"""The supervised stage: cross-entropy on the assistant's turns, dense attention.

It makes the embedded base model (recipes/tiny_base.yaml). Embedded lessons put several questions about one picture
into one conversation, with more digits a picture as steps go by: without that curriculum naming and colour are not
bound (shared notes, docs/log.md). Files of rows are taken as they are, one answer each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from zipr1.data import digits
from zipr1.data.media import load_media
from zipr1.episode import Prompt
from zipr1.models import Encoded, Policy
from zipr1.recipe import Recipe


def lesson(policy: Policy, recipe: Recipe, step: int) -> list[Encoded]:
    """Conversations of embedded scenes for one step, a pure function of the recipe and the step."""
    plan = recipe.supervised
    most = max(count for start, count in plan.curriculum if start <= step)
    scenes = digits.lesson(
        recipe.seed,
        step,
        recipe.train.prompts,
        plan.video_share,
        most,
        plan.hard_share,
        plan.questions,
    )
    batch = []
    for index, (scene, pairs) in enumerate(scenes):
        visual = policy.processor.visual(scene.kind, scene.pixels, scene.fps)
        messages = []
        for turn, (question, answer) in enumerate(pairs):
            media = [{"type": scene.kind}] if turn == 0 else []
            messages.append(
                {"role": "user", "content": [*media, {"type": "text", "text": question}]}
            )
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        ids = policy.processor.ids(policy.processor.text(messages, generation=False), [visual])
        batch.append(policy.place(ids, [visual], f"{step}/{index}"))
    return batch


def rows(policy: Policy, recipe: Recipe, prompts: Sequence[Prompt], step: int) -> list[Encoded]:
    """Prompts with their right answers appended, drawn without replacement in epochs."""
    count, per_step = len(prompts), recipe.train.prompts
    batch = []
    for place in range(step * per_step, (step + 1) * per_step):
        order = np.random.default_rng([recipe.seed, place // count]).permutation(count)
        prompt = prompts[int(order[place % count])]
        media = [load_media(m, recipe.data.max_frames, recipe.data.fps) for m in prompt.media]
        encoded = policy.encode(prompt, media, recipe.data.max_prompt_tokens)
        ids = torch.cat([encoded.ids, policy.processor.answer_ids(prompt.answer)])
        batch.append(policy.place(ids, encoded.visuals, f"{place}/{prompt.id}"))
    return batch


def loss(policy: Policy, batch: Sequence[Encoded]) -> tuple[torch.Tensor, float]:
    """Mean cross-entropy over answer tokens, and the share of them predicted right.

    Long and short conversations run apart: padding pictures to the length of clips cost a third of the time.
    """
    order = sorted(batch, key=len)
    half = len(order) // 2
    total, right, count = torch.zeros((), device=policy.device), 0.0, 0
    for part in (order[:half], order[half:]):
        if part:
            logits, wanted = _predictions(policy, part)
            total = total + F.cross_entropy(logits, wanted, reduction="sum")
            right += float((logits.argmax(-1) == wanted).sum())
            count += len(wanted)
    return total / count, right / count


def _predictions(policy: Policy, batch: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `(M, V)` of all answer tokens of a batch, and the tokens `(M,)`."""
    embeds, positions, _ = policy.rows(batch, policy.look(batch), None, left=False)
    hidden = policy.core.model(
        inputs_embeds=embeds, position_ids=positions, use_cache=False
    ).last_hidden_state
    target = torch.zeros(embeds.shape[:2], dtype=torch.long)
    said = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    for b, e in enumerate(batch):
        target[b, : len(e)] = e.ids
        said[b, : len(e)] = policy.processor.answer_mask(e.ids)
    logits = policy.head(hidden[:, :-1][said[:, 1:].to(hidden.device)])
    return logits, target[:, 1:][said[:, 1:]].to(logits.device)
