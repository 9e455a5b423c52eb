"""`zipr1 train`: the loop, in numbered steps.

Everything random in a step is a function of (seed, step): a run that was killed and resumed gives the numbers of an
unbroken one. The mathematics lives in update.py, losses.py, efficiency.py and advantages.py.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from zipr1.core import distributed, signals
from zipr1.core.machine import describe
from zipr1.core.recipe import Recipe
from zipr1.core.rundir import RunDir, load_state, save_state
from zipr1.core.types import Prompt
from zipr1.data import sources
from zipr1.models.encoder import Pictures, effective
from zipr1.models.policy import Policy, load_policy
from zipr1.models.processors import Encoded
from zipr1.rewards.registry import check_answers
from zipr1.train import optim, supervised
from zipr1.train.controller import draw_weights, press
from zipr1.train.loggers import board
from zipr1.train.memory_check import rehearse
from zipr1.train.metrics import merit, rollout_lines, step_metrics
from zipr1.train.optim import Optimizers
from zipr1.train.progress import Progress
from zipr1.train.rollout import Batch, roll_out, together
from zipr1.train.summary import finish, measure_before
from zipr1.train.update import update
from zipr1.train.validate import FIRST, check, check_lengths, needs_prompts


def run(
    recipe: Recipe,
    output: Path | None,
    resume: str,
    device: str | None,
    command: Sequence[str],
    console: Console,
) -> dict[str, Any]:
    """Train as the recipe says and return what summary.json holds. Raises ZipError; nothing half-written stays.

    Stopped by a signal, it saves what is done and raises `Stopped` again.
    """
    check(recipe)
    # Products of float32 numbers on a GPU: eight times the speed for ten bits of mantissa. A CPU is not concerned.
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(recipe.seed)
    policy = load_policy(recipe.model, distributed.device(device), recipe.seed)
    with distributed.joined(policy.device), contextlib.ExitStack() as opened:
        try:
            return _run(policy, recipe, output, resume, command, console, opened)
        finally:
            gc.unfreeze()
            policy.parallel.close()
            signals.release()  # last: the launcher's signal may come in between, and is not the reason


def _run(
    policy: Policy,
    recipe: Recipe,
    output: Path | None,
    resume: str,
    command: Sequence[str],
    console: Console,
    opened: contextlib.ExitStack,
) -> dict[str, Any]:
    # 1. the questions, and a folder for the run
    prompts = sources.load(recipe.data, "train", recipe.seed) if needs_prompts(recipe) else []
    questions = sources.load(recipe.data, "heldout", recipe.seed)
    check_answers([*prompts, *questions], recipe)
    pictures = Pictures(policy, recipe)
    prompts, questions = pictures.fitting(prompts), pictures.fitting(questions)
    if recipe.data.on_bad_row == "skip":
        questions, _ = pictures.usable(questions)
    _, first = pictures.usable(prompts[: FIRST if recipe.sparse.dense_below else 1], least=0)
    check_lengths(recipe, [len(encoded) for encoded in first])
    deck = sources.Deck(prompts, recipe.seed, recipe.train.prompts)
    hashes = {"train": sources.identity(prompts), "heldout": sources.identity(questions)}
    about = describe(
        command, str(policy.device), recipe.seed, ranks=distributed.size(),
        recipe_sha256=recipe.sha256(), data=hashes,
    )  # fmt: skip
    folder = distributed.first(lambda: RunDir.open(recipe, output, resume, info=about))
    folder.writes = distributed.is_first()
    for line in [f"run: {folder.root}", *effective(first, policy)]:
        console.print(line, soft_wrap=True, highlight=False)
    writer = opened.enter_context(board(recipe, folder.root, folder.start_step))
    # 2. the reference and how it answers; then the weights to go on from, on all devices
    if recipe.train.stage == "rl":
        policy.keep_reference()
    before = measure_before(policy, recipe, questions, folder, console)
    state: dict[str, Any] = {
        "stage": 0,
        "skill": 0.0,
        "seconds": 0.0,
        "pressure": {},
        "right": {},
        "merit": {},
    }
    tensors = None
    if folder.checkpoint is not None:
        tensors, state = load_state(folder.checkpoint)
        policy.load_weights(folder.checkpoint / "model")
    policy.spread(recipe.train)
    named = policy.trainable()
    optimizer = optim.build(named, recipe.optim)
    if tensors is not None:
        optim.restore(optimizer, named, tensors)

    # 3. train; what is loaded stays, and Python need not walk through it again to find out, 0.2 s each time
    gc.collect()
    gc.freeze()
    done, true = folder.start_step, copy.deepcopy(state)
    with Progress(console, recipe.train.steps, start=folder.start_step) as progress:
        try:
            if recipe.train.stage == "rl" and done < recipe.train.steps:
                rehearse(policy, recipe, pictures, prompts)
            if distributed.size() > 1:
                signals.hold()  # no rank may leave alone: the others would wait for it
            for step in range(done, recipe.train.steps):
                began = time.monotonic()
                # Dropout alone uses the global generator; a resumed run must find it as an unbroken one does.
                torch.manual_seed(recipe.seed * 1_000_003 + step)
                optimizer.set_rate(optim.learning_rate(recipe.optim, step, recipe.train.steps))
                if recipe.train.stage == "supervised":
                    metrics = supervised_step(policy, recipe, deck, optimizer, state, step)
                else:
                    metrics, batch = rl_step(policy, recipe, pictures, deck, optimizer, state, step)
                    folder.append_rollouts(rollout_lines(step, batch))
                metrics["lr"] = optimizer.param_groups[0]["lr"]
                state["seconds"] += time.monotonic() - began
                remember(state, metrics)
                folder.append_metrics({"step": step, **metrics})
                done, true = step + 1, snapshot(state)
                writer(step, metrics)
                progress.update(step, metrics)
                every = recipe.train.save_every
                if done == recipe.train.steps or (every and done % every == 0):
                    save(folder, policy, optimizer, named, state, done)
                    true = snapshot(state)
                signals.check(distributed.gather)
                if distributed.size() == 1:
                    signals.release()
        except signals.Stopped as stop:
            signals.hold()  # once is enough: a second signal must not spoil what the first one saves
            if done != folder.start_step:
                save(folder, policy, optimizer, named, true, done)
            stop.note = f"step {done} is saved; go on with --resume {folder.root}"
            raise
    signals.release()
    return finish(policy, recipe, questions, before, folder, state["seconds"], console)


def rl_step(
    policy: Policy,
    recipe: Recipe,
    pictures: Pictures,
    deck: sources.Deck,
    optimizer: Optimizers,
    state: dict[str, Any],
    step: int,
) -> tuple[dict[str, Any], Batch]:
    """One step of reinforcement learning. state: `pressure`'s memory, and `right`: which questions the frozen
    reference answers right, as far as it was asked; both changed here.
    """
    clock = [time.monotonic()]
    # 1. take the step's questions and look at their pictures, once in the run
    weights = draw_weights(recipe.data.emphasis, state["pressure"])
    drawn = deck.draw(step, weights)
    asked, encoded, places = take(pictures, drawn)
    clock.append(time.monotonic())
    trained = policy.settings.train_vision
    seen = policy.parallel.apart(lambda: pictures.look(encoded), policy=trained, reference=trained)
    clock.append(time.monotonic())
    # 2. roll out every question at every budget
    known = state["right"]
    batch = roll_out(
        policy, recipe, asked, encoded, seen.policy, step, seen.reference, known, places
    )
    batch = together(batch, drawn, places)
    signals.check(distributed.gather)
    clock.append(time.monotonic())
    # 3. weigh saved tokens: toward the target, within the constraint
    pressure = press(
        recipe.efficiency,
        state["pressure"],
        batch.checks,
        policy.layers,
        step / recipe.train.steps,
    )
    # 4. rewards, advantages, and the clipped update, while threads decode the next step's media
    weights = draw_weights(recipe.data.emphasis, state["pressure"])
    following = deck.draw(step + 1, weights)
    pictures.ahead([following[i] for i in distributed.deal(len(following))])
    order = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    parts = update(policy, recipe, batch, optimizer, pressure, order)
    clock.append(time.monotonic())
    metrics = step_metrics(recipe, batch, parts) | pressure.metrics()
    names = ("data", "vision", "rollout", "update")
    metrics["seconds"] = dict(zip(names, np.diff(clock).tolist(), strict=True))
    return metrics, batch


def take(
    pictures: Pictures, drawn: Sequence[Prompt]
) -> tuple[list[Prompt], list[Encoded], list[int]]:
    """This rank's questions of the step, ready for the model, and their places in it. Every rank has one at least."""
    mine = distributed.deal(len(drawn))
    asked, encoded = pictures.usable([drawn[i] for i in mine], least=int(distributed.size() == 1))
    waiting = iter(mine)  # a bad row may be missing, the others are in order
    places = [next(i for i in waiting if drawn[i] is prompt) for prompt in asked]
    if distributed.size() > 1 and pictures.data.on_bad_row == "skip":
        even = distributed.evened(distributed.gather(places))[distributed.rank()]
        if even != places:
            asked, encoded = pictures.usable([drawn[i] for i in even])
            places = even
    return asked, encoded, places


def supervised_step(
    policy: Policy,
    recipe: Recipe,
    deck: sources.Deck,
    optimizer: Optimizers,
    state: dict[str, float],
    step: int,
) -> dict[str, Any]:
    """One step of cross-entropy on answers. state: stage of the curriculum and running accuracy, changed here."""
    stage = int(state["stage"])
    if deck.prompts:
        batch = supervised.rows(policy, recipe, deck.draw(step))
    else:
        batch = supervised.lesson(policy, recipe, step, stage)
    policy.core.train()
    optimizer.zero_grad()
    value, right = supervised.backward(policy, batch)
    norm = optim.clipped_step(optimizer, policy.trainable(), recipe.optim.max_grad_norm, value)
    policy.core.eval()
    state["skill"] += 0.05 * (right - state["skill"])
    if state["skill"] > recipe.supervised.advance_at and stage + 1 < len(
        recipe.supervised.curriculum
    ):
        state["stage"], state["skill"] = stage + 1, 0.0
    return {"loss": value, "accuracy": right, "grad_norm": norm, "stage": stage}


def remember(state: dict[str, Any], metrics: dict[str, Any]) -> None:
    """What the steps since the last checkpoint were worth: a sum and their number."""
    said = state.setdefault("merit", {})
    said["sum"] = said.get("sum", 0.0) + merit(metrics)
    said["steps"] = said.get("steps", 0) + 1


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
    said = state.get("merit", {})
    best = False
    if said.get("steps"):
        mean = said["sum"] / said["steps"]
        best = mean > said.get("best", float("-inf"))
        state["merit"] = {"best": mean if best else said["best"]}
    weights, tensors = policy.weights(), optim.state_tensors(optimizer, named)

    def write(path: Path) -> None:
        policy.save(path / "model", weights)
        save_state(path, tensors, state)

    folder.save_checkpoint(step, write, folder.recipe.train.save_total_limit, best)
