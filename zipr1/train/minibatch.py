"""A step's rollouts as rows of minibatches: rewards to advantages, groups to rows.

The mathematics is in zipr1/train/advantages.py; the losses that read the rows are in zipr1/train/update.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from zipr1.core.methods import parse
from zipr1.core.recipe import Recipe
from zipr1.core.types import Group
from zipr1.train import advantages
from zipr1.train.controller import EfficiencyController
from zipr1.train.rollout import Batch, gates_kl


@dataclass
class Rows:
    """The rollouts of a step, flat: row b is rollout `b % N` of prompt `b // N`; B rows in all.

    prompt: the place of each row's prompt in the batch. tokens: `(T,)` int64 of each answer. kept: by row and layer,
    ascending int32 positions. old: `(T,)` log-probabilities of the sampler. advantage `(B,)`: of the answers' tokens.
    cut_old, cut_advantage `(B,)`: of the kept counts. opened `(B,)`: 1 where the prompt can be answered, else 0: by a
    rollout, by the greedy answer at the inference p or by the dense reference, for two rollouts may both be unlucky.
    weights `(D, B)`: of each layer's expected token ratio. counts `(B,)`, mean 1: how much an answer counts. held
    `(B,)`: 1 where it is held to the reference, else 0. lengths: tokens of prompt and answer.
    """

    prompt: list[int]
    tokens: list[torch.Tensor]
    kept: list[list[torch.Tensor]]
    old: list[torch.Tensor]
    advantage: torch.Tensor
    cut_old: torch.Tensor | None
    cut_advantage: torch.Tensor
    opened: torch.Tensor
    weights: torch.Tensor
    counts: torch.Tensor
    held: torch.Tensor
    lengths: list[int]

    def tokens_each(self, some: Collection[int], recipe: Recipe) -> float | None:
        """Answer tokens of a row in the mean over a minibatch, by which an answer's own number of tokens is divided to
        weigh it; None where each answer counts alike (`ppo.loss_per`)."""
        if recipe.ppo.loss_per == "answer" or not some:
            return None
        return sum(len(self.tokens[b]) for b in some) / len(some)


def flatten(batch: Batch, recipe: Recipe, controller: EfficiencyController) -> Rows:
    """Rewards to advantages, groups to rows. controller: what saved tokens are worth by task and layer."""
    settings = recipe.ppo
    total = score(batch.groups, recipe, controller.penalty_scale)
    correct = torch.tensor([[r.rewards["correct"] for r in g.rollouts] for g in batch.groups])
    count = total.shape[1]
    rollouts = [r for g in batch.groups for r in g.rollouts]
    prompt = [i for i in range(len(batch.groups)) for _ in range(count)]
    tasks = [batch.groups[i].prompt.task for i in prompt]
    weights, counts = controller.layer_weights(tasks), controller.answer_weights(tasks)
    ratios = torch.tensor([r.layer_ratios for r in rollouts])
    saved = (weights.T * (1 - ratios)).mean(1).reshape(total.shape)
    worth = advantages.group_reward(correct, saved, recipe.rewards.weight)
    kind = (recipe.budgets.answers_per_budget, settings.baseline, settings.scale_rewards)
    return Rows(
        prompt=prompt,
        tokens=[r.tokens for r in rollouts],
        kept=[r.kept for r in rollouts],
        old=[r.logprobs for r in rollouts],
        advantage=(learned(batch.groups, recipe) * advantages.of_answers(total, *kind)).flatten(),
        cut_old=None if batch.cut_logprobs is None else torch.cat(batch.cut_logprobs),
        cut_advantage=advantages.of_budgets(worth, *kind).flatten(),
        opened=torch.maximum(advantages.gate(correct > 0), answerable(batch)).repeat_interleave(
            count
        ),
        weights=weights,
        counts=counts,
        held=held(batch, recipe).repeat_interleave(count),
        lengths=[r.prompt_length + len(r.tokens) for r in rollouts],
    )


def answerable(batch: Batch) -> torch.Tensor:
    """`(P,)` float32: 1 for prompts that the dense reference or the greedy answer at the inference p has right; 0 where
    nobody asked."""
    if batch.checks is None:
        return torch.tensor(
            [float(right > 0) for right in batch.dense or [0.0] * len(batch.groups)]
        )
    return torch.tensor([float(max(c.dense, c.dense - c.gap) > 0) for c in batch.checks])


def held(batch: Batch, recipe: Recipe) -> torch.Tensor:
    """`(P,)` float32: 1 for prompts whose answers are held to the reference (`ppo.kl_gate`), else 0."""
    if not gates_kl(recipe):
        return torch.ones(len(batch.groups))
    assert batch.dense is not None
    return torch.tensor([float(right > 0) for right in batch.dense])


def learned(groups: Sequence[Group], recipe: Recipe) -> torch.Tensor:
    """`(P, N)` float32: 0 for answers that `rewards.truncated: mask` takes out of the policy gradient, else 1."""
    masks = recipe.rewards.truncated == "mask"
    return torch.tensor([[float(not (masks and r.truncated)) for r in g.rollouts] for g in groups])


def score(
    groups: Sequence[Group],
    recipe: Recipe,
    penalty_scale: Callable[[str], float] = lambda task: 1.0,
) -> torch.Tensor:
    """Rewards `(P, N)` that multiply answers' log-probabilities; each rollout's parts are kept in `rewards`.

    The part for saved tokens counts only if the method says that answers are paid for it; penalty_scale: what the
    constraint leaves of it for each task, in (0, 1].
    """
    correct, ratio = _outcomes(groups)
    left = torch.tensor([[penalty_scale(g.prompt.task)] for g in groups])
    total = _total(correct, left * (1 - ratio), recipe)
    saved = advantages.gate(correct > 0)[:, None] * (1 - ratio)
    for group, parts, totals in zip(groups, saved.tolist(), total.tolist(), strict=True):
        for rollout, part, value in zip(group.rollouts, parts, totals, strict=True):
            rollout.rewards["reduction"], rollout.rewards["total"] = part, value
    return total


def _outcomes(groups: Sequence[Group]) -> tuple[torch.Tensor, torch.Tensor]:
    """How right each answer is, and its token ratio: both `(P, N)`."""
    correct = torch.tensor([[r.rewards["correct"] for r in g.rollouts] for g in groups])
    return correct, torch.tensor([[r.token_ratio for r in g.rollouts] for g in groups])


def _total(correct: torch.Tensor, saved: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    paid = recipe.rewards.reduction if "answers" in parse(recipe.efficiency.method) else 0.0
    return advantages.group_reward(correct, paid * saved, recipe.rewards.weight)


def informative(groups: Sequence[Group], recipe: Recipe) -> list[bool]:
    """Whether the policy gradient learns anything from each group: rewards differ among answers that are compared,
    those of one budget where it has several (but for `cut`, which compares budgets too)."""
    answers = 1 if "cut" in parse(recipe.efficiency.method) else recipe.budgets.answers_per_budget
    correct, ratio = _outcomes(groups)
    total = _total(correct, 1 - ratio, recipe)
    found = learned(groups, recipe) * advantages.of_answers(total, answers, "mean", "none")
    return (found.abs() > advantages.EPSILON).any(1).tolist()


def pad(values: Sequence[torch.Tensor], width: int) -> torch.Tensor:
    """`(T,)` tensors -> `(B, width)`, zeros on the right."""
    out = values[0].new_zeros(len(values), width)
    for b, v in enumerate(values):
        out[b, : len(v)] = v
    return out
