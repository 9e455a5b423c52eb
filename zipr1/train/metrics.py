"""What a step leaves in metrics.jsonl and rollouts.jsonl."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from zipr1.core.recipe import Recipe
from zipr1.train.controller import by_task
from zipr1.train.minibatch import informative
from zipr1.train.rollout import Batch


def step_metrics(recipe: Recipe, batch: Batch, parts: dict[str, float]) -> dict[str, Any]:
    """Means over the step's rollouts. `token_ratio_by_budget[n]`: of layers whose threshold lay in the n-th of
    `budgets.num_generations` equal cells of the step's [low, high] (None where none did); `gate`: share of questions
    with a right answer; `informative`: share of questions whose answers differ in reward, so that the policy gradient
    learns from them, `redrawn`: how many others were asked to find them, which `accuracy` and `gate` are not about;
    `truncated`: share of answers that had not ended; `inference`: by task, of the greedy answers at the inference p,
    how far they are behind the dense ones and what they kept; `heldout_mass`: the probe audit.
    """
    rollouts = [r for g in batch.groups for r in g.rollouts]
    budgets = recipe.budgets
    ratio = np.array([r.layer_ratios for r in rollouts])
    p = np.array([r.thresholds.numpy() for r in rollouts])
    cells = np.clip(
        (p - batch.low) / (budgets.high - batch.low) * budgets.num_generations,
        0,
        budgets.num_generations - 1e-3,
    )
    total = np.array([[r.rewards["total"] for r in g.rollouts] for g in batch.groups])
    drawn = batch.groups if batch.drawn is None else batch.drawn
    correct = np.array([[r.rewards["correct"] for r in g.rollouts] for g in drawn])
    by_cell = [ratio[cells.astype(int) == n] for n in range(budgets.num_generations)]
    return {
        "reward": float(total.mean()),
        "rewards": {
            name: float(np.mean([r.rewards[name] for r in rollouts]))
            for name in ("correct", "reduction")
        },
        "reward_std": float(total.std(1).mean()),
        "gate": float((correct > 0).any(1).mean()),
        "informative": float(np.mean(informative(batch.groups, recipe))),
        "redrawn": batch.redrawn,
        "accuracy": float(correct.mean()),
        **{f"{name}_accuracy": value for name, value in batch.accuracy.items()},
        "token_ratio": float(np.mean([r.token_ratio for r in rollouts])),
        "token_ratio_by_budget": [float(c.mean()) if c.size else None for c in by_cell],
        "token_ratio_by_layer": ratio.mean(0).tolist(),
        "inference": {
            task: {
                "gap": float(np.mean([c.gap for c in own])),
                "token_ratio": float(np.mean([c.ratios for c in own])),
            }
            for task, own in by_task(batch.checks or []).items()
        },
        "answer_tokens": float(np.mean([len(r.tokens) for r in rollouts])),
        "truncated": float(np.mean([r.truncated for r in rollouts])),
        "heldout_mass": batch.probe_audit_mass,
        **parts,
    }


def rollout_lines(step: int, batch: Batch) -> Iterator[dict[str, Any]]:
    """One line per question: budgets, sampled texts, rewards, kept tokens by layer."""
    for group in batch.groups:
        yield {
            "step": step,
            "id": group.prompt.id,
            "question": question(group.prompt.messages),
            "answer": group.prompt.answer,
            "prompt_tokens": group.rollouts[0].prompt_length,
            "budgets": [[round(x, 5) for x in r.thresholds.tolist()] for r in group.rollouts],
            "texts": [r.text for r in group.rollouts],
            "rewards": [r.rewards for r in group.rollouts],
            "kept": [[len(k) for k in r.kept] for r in group.rollouts],
            "token_ratio": [r.token_ratio for r in group.rollouts],
        }


def question(messages: Any) -> str:
    """The text of the last user turn."""
    content = messages[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part.get("type") == "text")
