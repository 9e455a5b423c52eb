"""What a run remembers between steps, and its checkpoints: a model folder, with the optimizer and this state beside."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

from zipr1.core import records
from zipr1.core.errors import InputError
from zipr1.core.recipe import Recipe
from zipr1.core.rundir import RunDir, load_state, save_state
from zipr1.models.policy import Policy
from zipr1.train import optim
from zipr1.train.average import Average
from zipr1.train.constraint import Constraint
from zipr1.train.optim import Optimizers

log = logging.getLogger("zipr1")


def start_or_resume(
    policy: Policy, recipe: Recipe, folder: RunDir
) -> tuple[dict[str, Any], Optimizers, Average]:
    """The state, the optimizer and the average of a new run, or those of the folder's checkpoint, whose weights the
    policy gets; the policy is then spread over all ranks.

    The state holds JSON values: stage and skill of the curriculum, seconds of training, `pressure` (what
    EfficiencyController and Constraint remember), `right` (which questions the untouched base answers right, as far as
    it was asked), `merit` (what names the best checkpoint), `averaged` (steps that the average has taken in).
    """
    state: dict[str, Any] = {
        "stage": 0,
        "skill": 0.0,
        "seconds": 0.0,
        "pressure": {},
        "right": {},
        "merit": {},
        "averaged": 0,
    }
    tensors, read_from = None, ""
    if folder.checkpoint is not None:
        read_from = str(folder.checkpoint / "state.safetensors")
        tensors, saved = load_state(folder.checkpoint)
        state |= _checked(saved, folder.checkpoint / "state.json", policy, recipe)
        policy.load_weights(folder.checkpoint / "model")
    policy.spread(recipe.train)
    named = policy.trainable()
    average = Average(named, recipe.train.average, state["averaged"])
    optimizer = optim.build(named, recipe.optim)
    if tensors is not None:
        newest = optim.restore(optimizer, named, tensors, read_from, bool(recipe.train.average))
        average.restore(newest)
    return state, optimizer, average


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


def snapshot(state: dict[str, Any]) -> dict[str, Any]:
    """The state as it is now. What is right stays right: it is shared, and grows."""
    return {k: v if k == "right" else copy.deepcopy(v) for k, v in state.items()}


def save(
    folder: RunDir,
    policy: Policy,
    optimizer: Optimizers,
    average: Average,
    state: dict[str, Any],
    step: int,
) -> None:
    """A checkpoint: a model folder of the averaged weights, and beside it what training goes on from: the newest ones,
    the optimizer's state and this state."""
    with average.used() as newest:
        weights = policy.weights()
        tensors = optim.state_tensors(optimizer, policy.trainable(), newest)

        def write(path: Path) -> None:
            policy.save(path / "model", weights)
            save_state(path, tensors, state)

        best = is_best(folder.recipe, state, step)
        folder.save_checkpoint(step, write, folder.recipe.train.save_total_limit, best)


def surely_violated(recipe: Recipe, state: dict[str, Any]) -> bool:
    """`Constraint.surely_violated` of what a run remembers."""
    constraint = Constraint(recipe.efficiency, state["pressure"], recipe.train.steps)
    return constraint.surely_violated()


def is_best(recipe: Recipe, state: dict[str, Any], step: int) -> bool:
    """Whether this checkpoint is the best one so far; remembered in the state. Of two, that is the newer one, unless
    the guard says of it alone that a task surely loses more than it may: tokens fall to the target and no further, so
    the newest that holds is the one with fewest."""
    holds = not surely_violated(recipe, state)
    if holds or not state["merit"].get("holds"):
        state["merit"] = {"holds": holds, "step": step}
    return bool(state["merit"]["step"] == step)


def settle(policy: Policy, average: Average, folder: RunDir, state: dict[str, Any]) -> None:
    """Before the last checkpoint: where the guard says for sure that a task loses more than it may, and an earlier
    checkpoint held, the run ends with that one's weights. Sharded weights are not brought back: `best` has them."""
    merit = state["merit"]
    if not merit.get("holds") or not surely_violated(folder.recipe, state):
        return
    if policy.parallel.sharded:
        return
    with average.used():
        policy.load_weights(folder.root / "best" / "model")
    log.warning(
        "the newest weights lose too many answers: the run ends with those of step %d",
        merit["step"],
    )
