"""One step on a tiny model: its recipe, its rollouts, its update."""

from __future__ import annotations

from typing import Any

import tinymodels
import torch

from zipr1.core.recipe import Budgets, Efficiency, Probes, Recipe, Sparse, Train
from zipr1.models.encoder import MediaEncoder
from zipr1.models.policy import Policy
from zipr1.train import optim
from zipr1.train.controller import EfficiencyController
from zipr1.train.minibatch import Rows, flatten
from zipr1.train.reference import look_up
from zipr1.train.rollout import Batch, roll_out
from zipr1.train.update import update


def recipe(**changes: Any) -> Recipe:
    values = {
        "sparse": Sparse(probes=Probes(recent=3, random=6), dense_below=0),
        "budgets": Budgets(low=0.6, high=0.9, num_generations=4),
        "train": Train(prompts_per_step=4, max_new_tokens=5),
    }
    return Recipe(**(values | changes))


def with_train(settings: Recipe, **changes: Any) -> Recipe:
    """The recipe with other values in its section `train`."""
    return settings.model_copy(update={"train": settings.train.model_copy(update=changes)})


def roll(settings: Recipe, prompts: Any, step: int = 3, **options: bool) -> tuple[Policy, Batch]:
    """Rollouts of a new policy. options: of `tinymodels.settings`."""
    policy = tinymodels.make(**options)
    policy.keep_reference()
    pictures = MediaEncoder(policy, settings)
    encoded = pictures.encode(prompts)
    seen = pictures.encode_vision(encoded)
    return policy, roll_out(policy, settings, prompts, encoded, seen.policy, step, seen.reference)


def even(weight: float, layers: int) -> EfficiencyController:
    """The same weight for every task and layer."""
    return EfficiencyController(Efficiency(weight=weight), layers)


def rows_of(batch: Batch, settings: Recipe, policy: Policy) -> Rows:
    return flatten(batch, settings, even(1.0, policy.layers))


def one_update(
    settings: Recipe, batch: Batch, policy: Policy, weight: float = 1.0, optimizer: Any = None
) -> dict[str, float]:
    """optimizer: one to go on with, or to leave the weights alone; by default the recipe's, new."""
    optimizer = optimizer or optim.build(policy.trainable(), settings.optim)
    order = torch.Generator().manual_seed(0)
    return update(policy, settings, batch, optimizer, even(weight, policy.layers), order)


def gradients(
    settings: Recipe, policy: Policy, batch: Batch, weight: float = 1.0
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """What an update says, and its gradients; the weights stay."""
    optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.0)
    stats = one_update(settings, batch, policy, weight, optimizer)
    return stats, {n: p.grad.clone() for n, p in policy.trainable() if p.grad is not None}


def close(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float, rtol: float
) -> None:
    """The same names, and tensors that agree."""
    assert one.keys() == other.keys() and one
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=atol, rtol=rtol, msg=name)


def moved(settings: Recipe) -> tuple[Policy, Batch]:
    """A policy that is no longer its reference, and rollouts of it."""
    policy, batch = roll(settings, tinymodels.mixed())
    generator = torch.Generator().manual_seed(5)
    for _, parameter in policy.trainable():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy, batch


def reference_logits(policy: Policy, batch: Batch, rows: Rows, chosen: list[int]) -> torch.Tensor:
    """`(B, T, V)` of the dense reference."""
    found = look_up(policy, batch, rows, chosen)
    width = max(len(rows.tokens[b]) for b in chosen)
    logits = found.logits(policy, slice(0, len(chosen) * width))
    return logits.view(len(chosen), width, -1)
