"""From rewards of a group of rollouts to advantages. Shapes: P prompts, N rollouts of each, A of them at each budget.

An answer and the number of tokens that it was given are two actions. An answer is compared with those that saw the same
tokens (`of_answers`), what a budget kept with what the others kept (`of_budgets`).
"""

from __future__ import annotations

from typing import Literal

import torch

# Added to the group's standard deviation: a group of equal rewards gets 0, not 0 / 0.
EPSILON = 1e-6


def advantages(
    rewards: torch.Tensor,
    baseline: Literal["leave_one_out", "mean"],
    scale: Literal["none", "std"],
) -> torch.Tensor:
    """`(P, N)` rewards -> `(P, N)` float32 advantages within each prompt's group.

    baseline `leave_one_out`: r_i - mean of the others (RLOO, arXiv 2402.14740), unbiased also when
    the rollouts' budgets differ; a lone rollout gets 0. `mean`: r_i - mean of all.
    scale `std`: divided by the group's population standard deviation + 1e-6 (with `mean`: GRPO,
    arXiv 2402.03300, used by arXiv 2504.18579, which does not say which deviation).
    """
    # float64: the rounding of a mean of equal rewards, divided by 1e-6, would not be small.
    r = rewards.to(torch.float64)
    count = r.shape[1]
    out = r - r.mean(1, keepdim=True)
    if baseline == "leave_one_out" and count > 1:
        out = out * (count / (count - 1))
    if scale == "std":
        out = out / (r.std(1, keepdim=True, correction=0) + EPSILON)
    return out.to(torch.float32)


def of_answers(
    rewards: torch.Tensor,
    answers: int,
    baseline: Literal["leave_one_out", "mean"],
    scale: Literal["none", "std"],
) -> torch.Tensor:
    """`(P, N)` rewards, A = `answers` of a budget after each other -> `(P, N)` advantages of the answers.

    Each budget's answers are a group, so what a budget is worth is in the baseline and not in the advantage. With one
    answer at each budget there is no such group, and the prompt's rollouts are one.
    """
    groups = rewards.reshape(-1, answers) if answers > 1 else rewards
    return advantages(groups, baseline, scale).reshape(rewards.shape)


def of_budgets(
    rewards: torch.Tensor,
    answers: int,
    baseline: Literal["leave_one_out", "mean"],
    scale: Literal["none", "std"],
) -> torch.Tensor:
    """`(P, N)` rewards, A = `answers` of a budget after each other -> `(P, N)` advantages of what the budgets kept: the
    mean reward of a budget's answers among the means of the prompt's budgets, the same for all of its answers."""
    means = rewards.to(torch.float64).unflatten(1, (-1, answers)).mean(2)
    return advantages(means, baseline, scale).repeat_interleave(answers, 1)


def gate(correct: torch.Tensor) -> torch.Tensor:
    """C: `(P, N)` bool -> `(P,)` float32, 1 where any rollout of the prompt is right, else 0."""
    return correct.any(1).to(torch.float32)


def group_reward(correct: torch.Tensor, saved: torch.Tensor, weight: float) -> torch.Tensor:
    """r = weight * correct + C * saved, arXiv 2504.18579.

    correct: `(P, N)`, 0 for wrong; saved: `(P, N)`, what the saved tokens are worth: 1 - token ratio, times its own
    weight. Returns `(P, N)` float32. Without C the model learns to save tokens on questions it cannot answer.
    """
    saved = gate(correct > 0)[:, None] * saved.to(torch.float32)
    return weight * correct.to(torch.float32) + saved
