"""What a run remembers between steps, and its checkpoints: a model folder, with the optimizer and this state beside."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from zipr1.core import records
from zipr1.core.errors import InputError
from zipr1.core.recipe import Recipe
from zipr1.core.rundir import RunDir, load_state, save_state
from zipr1.models.policy import Policy
from zipr1.train import optim
from zipr1.train.metrics import merit
from zipr1.train.optim import Optimizers


def start_or_resume(
    policy: Policy, recipe: Recipe, folder: RunDir
) -> tuple[dict[str, Any], Optimizers]:
    """The state and the optimizer of a new run, or those of the folder's checkpoint, whose weights the policy gets; the
    policy is then spread over all ranks.

    The state holds JSON values: stage and skill of the curriculum, seconds of training, `pressure` (what
    EfficiencyController remembers), `right` (which questions the frozen reference answers right, as far as it was
    asked), `merit` (what names the best checkpoint).
    """
    state: dict[str, Any] = {
        "stage": 0,
        "skill": 0.0,
        "seconds": 0.0,
        "pressure": {},
        "right": {},
        "merit": {},
    }
    tensors, read_from = None, ""
    if folder.checkpoint is not None:
        read_from = str(folder.checkpoint / "state.safetensors")
        tensors, saved = load_state(folder.checkpoint)
        state |= _checked(saved, folder.checkpoint / "state.json", policy, recipe)
        policy.load_weights(folder.checkpoint / "model")
    policy.spread(recipe.train)
    named = policy.trainable()
    optimizer = optim.build(named, recipe.optim)
    if tensors is not None:
        optim.restore(optimizer, named, tensors, read_from)
    return state, optimizer


def _checked(saved: dict[str, Any], path: Path, policy: Policy, recipe: Recipe) -> dict[str, Any]:
    """What state.json holds. Raises InputError where a run of this model and recipe cannot have written it."""
    then = "bring it back from a copy, or remove this checkpoint to go on from the one before"
    records.check(saved, path, then)
    pressure = saved.get("pressure", {})
    for name in ("start", "sum"):
        for task, values in pressure.get(name, {}).items():
            if len(values) != policy.layers:
                raise InputError(
                    f"{path}: pressure.{name}.{task} has {len(values)} numbers and the model {policy.layers} "
                    f"layers; the file was changed or is damaged: {then}"
                )
    stages = len(recipe.supervised.curriculum)
    if saved.get("stage", 0) >= stages:
        raise InputError(
            f"{path}: stage {saved['stage']} and supervised.curriculum has {stages}, from 0 on; the file was "
            f"changed or is damaged: {then}"
        )
    return saved


def remember(state: dict[str, Any], metrics: dict[str, Any]) -> None:
    """What the steps since the last checkpoint were worth: a sum and their number."""
    sums = state.setdefault("merit", {})
    sums["sum"] = sums.get("sum", 0.0) + merit(metrics)
    sums["steps"] = sums.get("steps", 0) + 1


def snapshot(state: dict[str, Any]) -> dict[str, Any]:
    """The state as it is now. What is right stays right: it is shared, and grows."""
    return {k: v if k == "right" else copy.deepcopy(v) for k, v in state.items()}


def save(
    folder: RunDir,
    policy: Policy,
    optimizer: Optimizers,
    named: Any,
    state: dict[str, Any],
    step: int,
) -> None:
    """A checkpoint: a model folder, and the optimiser and constraint beside it. It is the best one if the steps since
    the one before were worth most."""
    sums = state.get("merit", {})
    best = False
    if sums.get("steps"):
        mean = sums["sum"] / sums["steps"]
        best = mean > sums.get("best", float("-inf"))
        state["merit"] = {"best": mean if best else sums["best"]}
    weights, tensors = policy.weights(), optim.state_tensors(optimizer, named)

    def write(path: Path) -> None:
        policy.save(path / "model", weights)
        save_state(path, tensors, state)

    folder.save_checkpoint(step, write, folder.recipe.train.save_total_limit, best)
