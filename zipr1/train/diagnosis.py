"""What a run looks like from inside, every `train.diagnose_every` steps: how hard each loss pulls, where the scores
lie, and how far each layer is from its set point.

A few of the step's rows are run again, before the update learns from them, once for each loss. Nothing of that stays:
gradients are forgotten, and no random number is drawn. What a step knows anyway (held-out mass, sampler beside trainer,
share clipped) is in every line of metrics.jsonl.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from zipr1.core import distributed
from zipr1.core.methods import parse
from zipr1.core.recipe import Recipe
from zipr1.models.batching import by_length
from zipr1.models.policy import Policy
from zipr1.models.sparse.patch import sparse_attention
from zipr1.models.sparse.record import Record
from zipr1.models.token_budget import token_budget
from zipr1.train.controller import EfficiencyController, by_task
from zipr1.train.minibatch import Rows, flatten
from zipr1.train.rollout import Batch
from zipr1.train.update import backward, backward_dense, replaying

# Rows that are run again: enough to tell the losses apart, at a small part of a step's cost.
ROWS = 8


def diagnose(
    policy: Policy, recipe: Recipe, batch: Batch, controller: EfficiencyController
) -> dict[str, Any]:
    """`diagnosis` of metrics.jsonl. Several ranks look at rows of their own, and tell their mean.

    gradients: the norm of the gradient of each loss with its weight, alone, of ROWS rows of the step; before clipping.
    window: share of prompt tokens whose cut point lies between `low` and `high`, which alone feel `pathwise` and `cut`.
    first_token, top_token: share of the score mass on the first token, and on the one that has most, mean over rows and
    layers; by layer too. by_layer: of each task the kept share of greedy answers at the inference p, mean over the
    step's questions, and where there is a target, the set point that the controller holds it to.
    """
    rows = flatten(batch, recipe, controller)
    chosen = some_rows(rows, batch, policy, recipe)
    found: dict[str, Any] = {"gradients": gradients(policy, recipe, batch, rows, chosen)}
    if recipe.sparse.rule != "random":  # which reads no scores
        record = policy.parallel.run_unsharded(
            lambda: scored(policy, recipe, batch, rows, chosen), policy=True
        )
        found |= masses(record, batch.low, recipe.budgets.high)
    found = _mean(distributed.gather(found))
    found["by_layer"] = {
        task: {"kept": np.mean([one.ratios for one in own], axis=0).tolist()}
        for task, own in by_task(batch.checks or []).items()
    }
    for task, points in controller.set_points().items():
        found["by_layer"].setdefault(task, {})["set_point"] = points
    return found


def some_rows(rows: Rows, batch: Batch, policy: Policy, recipe: Recipe) -> list[int]:
    """At most ROWS of this rank's rows that fit into one pass, drawn by the step's own seed."""
    own = [b for b, i in enumerate(rows.prompt) if batch.encoded[i] is not None]
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(batch.probe_seed))
    drawn = sorted(own[i] for i in order[: min(ROWS, recipe.train.micro_batch)].tolist())
    room = token_budget(policy, recipe, update=True)
    return [drawn[i] for i in by_length([rows.lengths[b] for b in drawn], ROWS, room)[0]]


def gradients(
    policy: Policy, recipe: Recipe, batch: Batch, rows: Rows, chosen: list[int]
) -> dict[str, float]:
    """The norm of each loss's gradient over the rows `chosen`, by name; of a loss that the recipe has not, none. The
    gradients that the parameters have are forgotten. Replicated ranks tell the mean of their norms, sharded ones the
    norm of their mean."""
    ppo, methods = recipe.ppo, parse(recipe.efficiency.method)
    idle = {"policy_gradient": 0.0, "kl_coef": 0.0}
    still = rows.cut_advantage * 0
    silent = replace(rows, weights=rows.weights * 0, cut_advantage=still)
    # Of each loss, the settings and rows with which all others are 0; which tokens carry a gradient stays as it is.
    alone: dict[str, tuple[dict[str, float], Rows]] = {}
    if ppo.policy_gradient:
        pulls = idle | {"policy_gradient": ppo.policy_gradient}
        alone["policy_gradient"] = pulls, silent
    if ppo.kl_coef:
        alone["kl"] = idle | {"kl_coef": ppo.kl_coef}, silent
    if "pathwise" in methods:
        alone["pathwise"] = idle, replace(rows, cut_advantage=still)
    if "cut" in methods:
        alone["cut"] = idle, replace(rows, weights=silent.weights)
    share, each = 1 / distributed.size(), rows.tokens_each(chosen, recipe)
    norms = {}
    for name, (pulls, own) in alone.items():
        asked = recipe.model_copy(update={"ppo": ppo.model_copy(update=pulls)})
        _forget(policy)
        backward(policy, asked, batch, own, chosen, share, False, each)
        norms[name] = _norm(policy)
    if ppo.dense_kl:
        _forget(policy)
        backward_dense(policy, recipe, batch, rows, chosen, share, each)
        norms["dense_kl"] = _norm(policy)
    _forget(policy)
    return norms


@torch.no_grad()
def scored(policy: Policy, recipe: Recipe, batch: Batch, rows: Rows, chosen: list[int]) -> Record:
    """What a pass over these rows records, with scores and cut points."""
    request = replace(replaying(policy, recipe, batch, rows, chosen), scores=True, through=None)
    encoded = [batch.encoded[rows.prompt[b]] for b in chosen]
    tokens = [rows.tokens[b] for b in chosen]
    with sparse_attention(policy.model, request) as run:
        policy.answer_states(encoded, batch.features, tokens, run)
    assert run.record is not None
    return run.record


def masses(record: Record, low: float, high: float) -> dict[str, Any]:
    """Where the scores of a pass lie: `window`, `first_token` and `top_token` of `diagnose`."""
    real = record.candidates
    scores = torch.stack([layer.scores for layer in record.layers if layer.scores is not None])
    cuts = torch.stack([layer.cut for layer in record.layers if layer.cut is not None])
    inside = ((cuts > low) & (cuts < high) & real).sum(2) / real.sum(1)
    shares = scores.masked_fill(~real, 0)
    shares = shares / shares.sum(2, keepdim=True).clamp_min(1e-12)
    first = real.int().argmax(1).expand(len(scores), 1, -1).transpose(1, 2)
    by_layer = {
        "first_token": shares.gather(2, first)[..., 0].mean(1).tolist(),
        "top_token": shares.amax(2).mean(1).tolist(),
    }
    return {
        "window": float(inside.mean()),
        **{name: float(np.mean(values)) for name, values in by_layer.items()},
        **{f"{name}_by_layer": values for name, values in by_layer.items()},
    }


def _forget(policy: Policy) -> None:
    for _, parameter in policy.trainable():
        parameter.grad = None


def _norm(policy: Policy) -> float:
    pulled = [p.grad for _, p in policy.trainable() if p.grad is not None]
    return float(distributed.whole(torch.nn.utils.get_total_norm(pulled))) if pulled else 0.0


def _mean(parts: list[Any]) -> Any:
    """Of several ranks' findings of one form, number by number."""
    if isinstance(parts[0], dict):
        return {name: _mean([part[name] for part in parts]) for name in parts[0]}
    return np.mean(parts, axis=0).tolist()
