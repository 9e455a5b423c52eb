"""Does an exported folder say what the run says? Logits and greedy text on a few real questions, at budget 1.

The run answers through zipr1's policy, the folder through transformers' own forward and `generate`, on inputs as
transformers' processor would make them: two paths that share no code but the model's.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from zipr1.core.recipe import Recipe
from zipr1.core.types import Prompt
from zipr1.data.embedded import SOURCES, draw_heldout
from zipr1.models.encoder import MediaEncoder
from zipr1.models.inputs import model_inputs
from zipr1.models.policy import Policy
from zipr1.models.processors import Encoded

QUESTIONS = 4

# Largest root mean square of the difference over that of the logits. Both sides compute in float32, so what is left
# is the rounding of the weights (relative steps of 2^-24, 2^-11 and 2^-8), which layers add up.
LIMITS = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 6e-2}


@dataclass
class Reference:
    """What the run says. logits: `(T, V)` for each question, over its right answer; texts: its greedy answers."""

    prompts: list[Prompt]
    encoded: list[Encoded]
    answers: list[torch.Tensor]
    logits: list[torch.Tensor]
    texts: list[str]
    origin: str


def samples(recipe: Recipe, kinds: Collection[str]) -> tuple[list[Prompt], str]:
    """A few embedded questions, of as many tasks as there are, of the family that the run was trained on or else of the
    digits; and which. kinds: of media that the model takes.

    The run's own questions are not opened: its recipe, which may have come with it, names files outside of its folder.
    """
    family = recipe.data.source if recipe.data.source in SOURCES else "digits"
    found = draw_heldout(family, {}, QUESTIONS, "test")
    by_task: dict[str, list[Prompt]] = {}
    for prompt in found:
        if all(media.kind in kinds for media in prompt.media):
            by_task.setdefault(prompt.task, []).append(prompt)
    queues = list(by_task.values())
    turns = [queue[i] for i in range(QUESTIONS) for queue in queues if i < len(queue)]
    return turns[:QUESTIONS], f"embedded {family}"


@torch.no_grad()
def reference(policy: Policy, recipe: Recipe) -> Reference:
    """The run's own answers at budget 1."""
    prompts, origin = samples(recipe, policy.processor.placeholder)
    encoded = MediaEncoder(policy, Recipe(), most=0).encode(prompts)
    answers = [policy.processor.answer_ids(prompt.answer) for prompt in prompts]
    logits, texts = [], []
    for one, answer in zip(encoded, answers, strict=True):
        features = policy.encode_vision([one])
        logits.append(policy.answer_logits([one], features, [answer])[0][0].cpu())
        said = policy.generate([one], features, None, recipe.train.max_new_tokens).tokens[0]
        texts.append(policy.processor.decode(said))
    return Reference(prompts, encoded, answers, logits, texts, origin)


@torch.no_grad()
def compare(
    wanted: Reference, model: Any, policy: Policy, new_tokens: int, dtype: str
) -> dict[str, Any]:
    """`logits_error` (relative root mean square, worst question), `limit`, `same_text` and `n`."""
    blocked = list(policy.processor.placeholder.values())
    worst, same = 0.0, 0
    for one, answer, logits, text in zip(
        wanted.encoded, wanted.answers, wanted.logits, wanted.texts, strict=True
    ):
        inputs = stock_inputs(policy, one, answer)
        got = model(**inputs).logits[0, len(one) - 1 : -1].float().cpu()
        free = [i for i in range(got.shape[-1]) if i not in blocked]
        difference = (got[:, free] - logits[:, free]).square().mean().sqrt()
        worst = max(worst, float(difference / logits[:, free].square().mean().sqrt()))
        settings = GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, suppress_tokens=blocked,
            eos_token_id=policy.processor.end_ids, pad_token_id=policy.processor.end_id,
        )  # fmt: skip
        out = model.generate(**stock_inputs(policy, one), generation_config=settings)
        same += policy.processor.decode(out[0, len(one) :].cpu()) == text
    return {
        "questions": wanted.origin,
        "n": len(wanted.prompts),
        "logits_error": worst,
        "limit": LIMITS[dtype],
        "same_text": same,
    }


def stock_inputs(
    policy: Policy, encoded: Encoded, answer: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """What transformers' processor would make of one question, and its answer: tensors of a batch of one."""
    ids = encoded.ids if answer is None else torch.cat([encoded.ids, answer])
    inputs = model_inputs(
        [(ids, encoded.visuals)], policy.processor, policy.model.config.model_type
    )
    return dict(inputs.to(policy.device))
