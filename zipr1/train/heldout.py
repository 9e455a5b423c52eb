"""Held-out questions before and after training: accuracy and token ratio, dense and sparse on the same features.

Not lmms-eval: this is the run's own check on its own kind of questions, greedy, at the inference p and probes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from zipr1.core import watch
from zipr1.core.recipe import Recipe, Sparse
from zipr1.core.statistics import confidence_interval
from zipr1.core.types import Prompt
from zipr1.models.batching import by_length
from zipr1.models.encoder import Looked, MediaEncoder
from zipr1.models.policy import Policy
from zipr1.models.processors import Encoded
from zipr1.models.sampling import Answers
from zipr1.models.sparse.request import Request
from zipr1.models.token_budget import token_budget
from zipr1.rewards.registry import reward_of
from zipr1.train import chunks


@dataclass
class Result:
    """Answers to held-out questions, in their order. correct, token_ratio: float arrays `(n,)`; layer_ratios `(n, D)`;
    said: the answers' texts; kept[i][d]: positions kept of question i at layer d, empty when dense; probe_audit_mass:
    mean score mass of other, held-out probes that the kept tokens hold; first_token_ms: a question's share of its
    batch's prefill; kv_bytes: of a prompt, after its prefill. Both are means, 0 where nobody knows."""

    prompts: Sequence[Prompt]
    correct: np.ndarray
    token_ratio: np.ndarray
    layer_ratios: np.ndarray
    said: list[str]
    probe_audit_mass: float = 1.0
    kept: list[list[torch.Tensor]] = field(default_factory=list)
    first_token_ms: float = 0.0
    kv_bytes: float = 0.0

    def part(self, rows: Sequence[int]) -> dict[str, Any]:
        """Accuracy with its 95 % interval, clustered by picture, and token ratio of some questions."""
        index = np.asarray(rows)
        pictures = [self.prompts[i].picture or self.prompts[i].id for i in rows]
        return {
            "accuracy": float(self.correct[index].mean()),
            "accuracy_ci": list(confidence_interval(self.correct[index], pictures)),
            "token_ratio": float(self.token_ratio[index].mean()),
            "n": len(rows),
        }

    def plain(self) -> tuple[Any, ...]:
        """All but the prompts, which every rank has."""
        return (
            self.correct,
            self.token_ratio,
            self.layer_ratios,
            self.said,
            self.probe_audit_mass,
            self.kept,
            self.first_token_ms,
            self.kv_bytes,
        )

    def groups(self, key: Callable[[Prompt], str]) -> dict[str, dict[str, Any]]:
        """`part` for each value of `key`, in order of appearance."""
        names = [key(p) for p in self.prompts]
        return {
            n: self.part([i for i, m in enumerate(names) if m == n]) for n in dict.fromkeys(names)
        }


def joined(prompts: Sequence[Prompt], parts: Sequence[tuple[Any, ...]]) -> Result:
    """One result for all prompts from those of the ranks (`Result.plain`), dealt out by `distributed.deal`."""
    if len(parts) == 1:
        return Result(prompts, *parts[0])
    order = np.argsort(
        np.concatenate([np.arange(r, len(prompts), len(parts)) for r in range(len(parts))])
    )
    arrays = [np.concatenate([part[k] for part in parts])[order] for k in range(3)]
    lists = [[one for part in parts for one in part[k]] for k in (3, 5)]
    said, kept = ([values[i] for i in order] for values in lists)
    sizes = [len(part[0]) for part in parts]
    mass, *costs = (float(np.average([p[k] for p in parts], weights=sizes)) for k in (4, 6, 7))
    correct, ratio, layers = arrays
    return Result(prompts, correct, ratio, layers, said, mass, kept, *costs)


def evaluate(
    policy: Policy,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    settings: Sequence[Sparse | None],
    tell: Callable[[int], None] = lambda done: None,
) -> list[Result]:
    """One `Result` for each of `settings` (None: the dense reference), over the same prompts.

    Prompts go in chunks (zipr1/train/chunks.py) whose media are seen once for all settings; one pass has at most
    `evaluation.batch` rows, and no more tokens than a pass of training's rollouts. tell: called with the number of
    prompts done.
    """
    results = [
        Result(prompts, np.zeros(len(prompts)), np.ones(len(prompts)), np.ones((len(prompts), policy.layers)),
               [""] * len(prompts), kept=[[] for _ in prompts])
        for _ in settings
    ]  # fmt: skip
    masses: list[list[torch.Tensor]] = [[] for _ in settings]
    pictures, batch = MediaEncoder(policy, recipe, most=0), recipe.evaluation.batch
    for chunk in chunks.seen(pictures, prompts, batch * 4):
        lengths = [len(e) + recipe.train.max_new_tokens for e in chunk.encoded]
        for rows in by_length(lengths, batch, token_budget(policy, recipe, update=False)):
            encoded = [chunk.encoded[b] for b in rows]
            places = [chunk.places[b] for b in rows]
            for setting, result, mass in zip(settings, results, masses, strict=True):
                answers = _answers(policy, recipe, encoded, chunk.features, setting)
                _note(policy, recipe, result, places, encoded, answers)
                if answers.probe_audit_mass is not None:
                    mass.append(answers.probe_audit_mass)
        tell(chunk.places[-1] + 1)
    for result, mass in zip(results, masses, strict=True):
        result.first_token_ms /= max(1, len(prompts))
        result.kv_bytes /= max(1, len(prompts))
        if mass:
            result.probe_audit_mass = float(torch.cat(mass).mean())
    return results


def _answers(
    policy: Policy,
    recipe: Recipe,
    encoded: Sequence[Encoded],
    features: Looked,
    setting: Sparse | None,
) -> Answers:
    """Greedy answers of one pass. setting: None for the dense reference."""
    length = recipe.train.max_new_tokens
    if setting is None:
        with policy.reference() as model:
            return policy.generate(
                encoded, features.reference, None, length, model=model, timed=True
            )
    request = Request(setting, audit=range(len(encoded)))
    return policy.generate(encoded, features.policy, request, length, timed=True)


def _note(
    policy: Policy,
    recipe: Recipe,
    result: Result,
    places: Sequence[int],
    encoded: Sequence[Encoded],
    answers: Answers,
) -> None:
    """Put the answers of one pass into the result, sums in place of means. places: of its rows among all prompts."""
    result.first_token_ms += 1e3 * (answers.prefill_seconds or 0.0)
    for row, i in enumerate(places):
        prompt, text = result.prompts[i], policy.processor.decode(answers.tokens[row])
        result.said[i] = text
        result.correct[i] = reward_of(prompt, recipe)(text, prompt.answer)
        watch.alive()
        if answers.counts is not None and answers.kept is not None:
            result.layer_ratios[i] = answers.counts[row].numpy() / len(encoded[row])
            result.token_ratio[i] = result.layer_ratios[i].mean()
            result.kept[i] = answers.kept[row]
        shares = result.layer_ratios[i].sum()
        result.kv_bytes += float(shares) * len(encoded[row]) * policy.token_bytes
