"""Held-out questions before and after training: accuracy and token ratio, dense and sparse on the same features.

Not lmms-eval: this is the run's own check on its own kind of questions, greedy, at the inference p and probes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from zipr1.core.recipe import Recipe, Sparse
from zipr1.core.statistics import confidence_interval
from zipr1.core.types import Prompt
from zipr1.models.batching import by_length
from zipr1.models.encoder import Pictures
from zipr1.models.policy import Policy
from zipr1.models.sparse.request import Request
from zipr1.rewards.registry import reward_of


@dataclass
class Result:
    """Answers to held-out questions, in their order. correct, token_ratio: float arrays `(n,)`; kept[i][d]:
    positions kept of question i at layer d, empty when dense; heldout: mean mass kept for other probes."""

    prompts: Sequence[Prompt]
    correct: np.ndarray
    token_ratio: np.ndarray
    layer_ratios: np.ndarray
    said: list[str]
    heldout: float = 1.0
    kept: list[list[torch.Tensor]] = field(default_factory=list)

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
            self.heldout,
            self.kept,
        )

    def groups(self, key: Callable[[Prompt], str]) -> dict[str, dict[str, Any]]:
        """`part` for each value of `key`, in order of appearance."""
        names = [key(p) for p in self.prompts]
        return {
            n: self.part([i for i, m in enumerate(names) if m == n]) for n in dict.fromkeys(names)
        }


def joined(prompts: Sequence[Prompt], parts: Sequence[tuple[Any, ...]]) -> Result:
    """One result for all prompts from those of the ranks (`Result.plain`), which were dealt out by `ranks.deal`."""
    if len(parts) == 1:
        return Result(prompts, *parts[0])
    order = np.argsort(
        np.concatenate([np.arange(r, len(prompts), len(parts)) for r in range(len(parts))])
    )
    arrays = [np.concatenate([part[k] for part in parts])[order] for k in range(3)]
    lists = [[one for part in parts for one in part[k]] for k in (3, 5)]
    said, kept = ([values[i] for i in order] for values in lists)
    sizes = [len(part[0]) for part in parts]
    heldout = float(np.average([part[4] for part in parts], weights=sizes))
    correct, ratio, layers = arrays
    return Result(prompts, correct, ratio, layers, said, heldout, kept)


def evaluate(
    policy: Policy,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    settings: Sequence[Sparse | None],
    tell: Callable[[int], None] = lambda done: None,
) -> list[Result]:
    """One `Result` for each of `settings` (None: the dense reference), over the same prompts.

    Prompts go in chunks whose media are decoded and seen once for all settings. tell: called with the number of
    prompts done.
    """
    results = [
        Result(prompts, np.zeros(len(prompts)), np.ones(len(prompts)), np.ones((len(prompts), policy.layers)),
               [""] * len(prompts), kept=[[] for _ in prompts])
        for _ in settings
    ]  # fmt: skip
    masses: list[list[torch.Tensor]] = [[] for _ in settings]
    size = recipe.evaluation.batch * 4
    pictures = Pictures(policy, recipe, most=0)
    for start in range(0, len(prompts), size):
        chunk = list(range(start, min(start + size, len(prompts))))
        encoded = pictures.encode([prompts[i] for i in chunk])
        features = pictures.look(encoded)
        for rows in by_length([len(e) for e in encoded], recipe.evaluation.batch):
            for setting, result, mass in zip(settings, results, masses, strict=True):
                few = [encoded[b] for b in rows]
                if setting is None:
                    with policy.reference() as model:
                        answers = policy.generate(
                            few, features.reference, None, recipe.train.max_new_tokens, model=model
                        )
                else:
                    request = Request(setting, audit=range(len(few)))
                    answers = policy.generate(
                        few, features.policy, request, recipe.train.max_new_tokens
                    )
                for row, b in enumerate(rows):
                    i = chunk[b]
                    text = policy.processor.decode(answers.tokens[row])
                    result.said[i] = text
                    result.correct[i] = reward_of(prompts[i], recipe)(text, prompts[i].answer)
                    if answers.counts is not None and answers.kept is not None:
                        result.layer_ratios[i] = answers.counts[row].numpy() / len(encoded[b])
                        result.token_ratio[i] = result.layer_ratios[i].mean()
                        result.kept[i] = answers.kept[row]
                if answers.probe_audit_mass is not None:
                    mass.append(answers.probe_audit_mass)
        tell(chunk[-1] + 1)
    for result, mass in zip(results, masses, strict=True):
        if mass:
            result.heldout = float(torch.cat(mass).mean())
    return results
