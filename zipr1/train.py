"""`zipr1 train`: the loop, in numbered steps.

Everything random in a step is a function of (seed, step): a run that was killed and resumed gives the numbers of an
unbroken one. The mathematics lives in update.py, losses.py, efficiency.py and advantages.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from zipr1 import data, heldout, optim, supervised
from zipr1.checkpoint import RunDir, load_state, save_state
from zipr1.dryrun import dry_run
from zipr1.efficiency import parse
from zipr1.episode import Prompt
from zipr1.errors import InputError, RunError
from zipr1.machine import describe
from zipr1.metrics import rollout_lines, step_metrics
from zipr1.models import Policy, load_policy
from zipr1.optim import Optimizers
from zipr1.recipe import Recipe
from zipr1.report import Progress
from zipr1.rewards import find
from zipr1.rollout import Batch, roll_out
from zipr1.summary import board, finish, measure_before
from zipr1.update import update

__all__ = ["dry_run", "run"]


def run(
    recipe: Recipe,
    output: Path | None,
    resume: str,
    device: str | None,
    command: Sequence[str],
    console: Console,
) -> dict[str, Any]:
    """Train as the recipe says and return what summary.json holds. Raises ZipError; nothing half-written stays."""
    check(recipe)
    torch.manual_seed(recipe.seed)
    policy = load_policy(recipe.model, device, recipe.seed)
    prompts = data.load(recipe.data, "train", recipe.seed) if needs_prompts(recipe) else []
    questions = data.load(recipe.data, "heldout", recipe.seed)
    heldout.encode(policy, recipe, [*prompts[:1], *questions[:1]])
    folder = RunDir.open(
        recipe, output, resume, info=describe(command, str(policy.device), recipe.seed)
    )
    console.print(f"run: {folder.root}", soft_wrap=True, highlight=False)
    if recipe.train.stage == "rl":
        policy.keep_reference()
    named = policy.trainable()
    optimizer = optim.build(named, recipe.optim)
    before = measure_before(policy, recipe, questions, folder, console)
    state = {"multiplier": 0.0, "gap": 0.0, "stage": 0, "skill": 0.0, "seconds": 0.0}
    if folder.checkpoint is not None:
        tensors, state = load_state(folder.checkpoint)
        policy.load_weights(folder.checkpoint / "model")
        optim.restore(optimizer, named, tensors)

    with (
        Progress(console, recipe.train.steps, start=folder.start_step) as progress,
        board(recipe, folder) as writer,
    ):
        for step in range(folder.start_step, recipe.train.steps):
            began = time.monotonic()
            optimizer.set_rate(optim.learning_rate(recipe.optim, step, recipe.train.steps))
            if recipe.train.stage == "supervised":
                metrics = supervised_step(policy, recipe, prompts, optimizer, state, step)
            else:
                metrics, batch = rl_step(policy, recipe, prompts, optimizer, state, step)
                folder.append_rollouts(rollout_lines(step, batch))
            metrics["lr"] = optimizer.param_groups[0]["lr"]
            state["seconds"] += time.monotonic() - began
            folder.append_metrics({"step": step, **metrics})
            writer(step, metrics)
            progress.update(step, metrics)
            last = step + 1 == recipe.train.steps
            if last or (recipe.train.save_every and (step + 1) % recipe.train.save_every == 0):
                save(
                    folder, policy, optimizer, named, state, step + 1, recipe.train.keep_checkpoints
                )
    return finish(policy, recipe, questions, before, folder, state["seconds"], console)


def rl_step(
    policy: Policy,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    optimizer: Optimizers,
    state: dict[str, float],
    step: int,
) -> tuple[dict[str, Any], Batch]:
    """One step of reinforcement learning. state: the constraint's multiplier and running gap, changed here."""
    clock = [time.monotonic()]
    # 1. take the step's questions and look at their pictures, once
    asked = draw(prompts, recipe, step)
    encoded = heldout.encode(policy, recipe, asked)
    features = policy.look(encoded)
    clock.append(time.monotonic())
    # 2. roll out every question at every budget
    batch = roll_out(policy, recipe, asked, encoded, features, step)
    clock.append(time.monotonic())
    # 3. let the constraint move the weight of saved tokens
    weight = constrain(recipe, state, batch.gap)
    # 4. rewards, advantages, and the clipped update
    order = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    parts = update(policy, recipe, batch, optimizer, weight, order)
    clock.append(time.monotonic())
    metrics = step_metrics(recipe, batch, parts)
    metrics |= {"efficiency_weight": weight, "multiplier": state["multiplier"], "gap": state["gap"]}
    names = ("vision", "rollout", "update")
    metrics["seconds"] = dict(zip(names, np.diff(clock).tolist(), strict=True))
    return metrics, batch


def constrain(recipe: Recipe, state: dict[str, float], gap: float | None) -> float:
    """The efficiency weight under the constraint gap <= max_accuracy_drop.

    mu <- clip(mu + step * (gap - allowed), 0, max_multiplier) on a running mean of the paired gap, since a step's
    own gap is a few questions' worth; the weight is divided by 1 + mu.
    """
    settings = recipe.efficiency
    if settings.max_accuracy_drop is None or gap is None:
        return settings.weight
    state["gap"] += 0.05 * (gap - state["gap"])
    moved = state["multiplier"] + settings.step * (state["gap"] - settings.max_accuracy_drop)
    state["multiplier"] = min(max(moved, 0.0), settings.max_multiplier)
    return settings.weight / (1 + state["multiplier"])


def supervised_step(
    policy: Policy,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    optimizer: Optimizers,
    state: dict[str, float],
    step: int,
) -> dict[str, Any]:
    """One step of cross-entropy on answers. state: stage of the curriculum and running accuracy, changed here."""
    stage = int(state["stage"])
    if prompts:
        batch = supervised.rows(policy, recipe, prompts, step)
    else:
        batch = supervised.lesson(policy, recipe, step, stage)
    policy.core.train()
    loss, right = supervised.loss(policy, batch)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise RunError(f"the loss is {value} at step {step}; resume with a lower optim.lr")
    optimizer.zero_grad()
    loss.backward()
    parameters = [p for _, p in policy.trainable()]
    norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.optim.max_grad_norm)
    optimizer.step()
    policy.core.eval()
    state["skill"] += 0.05 * (right - state["skill"])
    if state["skill"] > recipe.supervised.advance_at and stage + 1 < len(
        recipe.supervised.curriculum
    ):
        state["stage"], state["skill"] = stage + 1, 0.0
    return {"loss": value, "accuracy": right, "grad_norm": float(norm), "stage": stage}


def draw(prompts: Sequence[Prompt], recipe: Recipe, step: int) -> list[Prompt]:
    """The questions of a step: epochs without replacement, shuffled by (seed, epoch)."""
    count, per_step = len(prompts), recipe.train.prompts
    chosen = []
    for place in range(step * per_step, (step + 1) * per_step):
        order = np.random.default_rng([recipe.seed, 1, place // count]).permutation(count)
        chosen.append(prompts[int(order[place % count])])
    return chosen


def save(
    folder: RunDir,
    policy: Policy,
    optimizer: Optimizers,
    named: Any,
    state: dict[str, float],
    step: int,
    keep: int,
) -> None:
    """A checkpoint: a model folder, and the optimiser and constraint beside it."""

    def write(path: Path) -> None:
        policy.save(path / "model")
        save_state(path, optim.state_tensors(optimizer, named), state)

    folder.save_checkpoint(step, write, keep)


def check(recipe: Recipe) -> None:
    """What can be known wrong before anything is loaded. Raises InputError."""
    methods = parse(recipe.efficiency.method)
    find(recipe.rewards.correct)
    if recipe.train.stage == "rl":
        if recipe.model.path == "scratch":
            raise InputError(
                "train.stage rl needs a trained model and model.path is scratch; name a model"
            )
        if methods & {"cut", "pathwise"} and recipe.sparse.rule != "top_p":
            raise InputError(
                f"efficiency.method {recipe.efficiency.method} differentiates top_p and sparse.rule is "
                f"{recipe.sparse.rule}; use rule top_p or method answers"
            )


def needs_prompts(recipe: Recipe) -> bool:
    """Embedded lessons of the supervised stage are made step by step."""
    return recipe.train.stage == "rl" or recipe.data.source != "digits"
