"""`zipr1 train`: the loop, in numbered steps.

Everything random in a step is a function of (seed, step): a run that was killed and resumed gives the numbers of an
unbroken one. The mathematics lives in update.py, losses.py, controller.py and advantages.py.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from zipr1.core import activity, distributed, signals, watch
from zipr1.core.errors import Missing, RunError
from zipr1.core.folders import claimed
from zipr1.core.machine import describe
from zipr1.core.recipe import Recipe
from zipr1.core.rundir import RunDir
from zipr1.core.types import Prompt
from zipr1.data import sources
from zipr1.data.sampler import PromptSampler
from zipr1.models.encoder import MediaEncoder, effective
from zipr1.models.loading import choose_device, without_plans
from zipr1.models.policy import Policy, load_policy
from zipr1.models.processors import Encoded
from zipr1.models.sampling import OUTGROWN
from zipr1.models.sparse.hybrid import check_skip
from zipr1.models.sparse.request import dense_below, settled
from zipr1.rewards.registry import check_answers
from zipr1.train import alarms, chunks, guard, optim, supervised
from zipr1.train.average import Average
from zipr1.train.checkpoints import save, settle, snapshot, start_or_resume
from zipr1.train.constraint import Constraint, Judged
from zipr1.train.controller import EfficiencyController
from zipr1.train.diagnosis import diagnose
from zipr1.train.guard import Guard
from zipr1.train.loggers import board
from zipr1.train.memory_check import rehearse
from zipr1.train.metrics import rollout_lines, step_metrics
from zipr1.train.optim import Optimizers
from zipr1.train.page import RunPage
from zipr1.train.progress import Progress
from zipr1.train.redraw import redraw
from zipr1.train.rollout import Batch, roll_out, together
from zipr1.train.summary import finish, measure_before
from zipr1.train.update import update
from zipr1.train.validate import FIRST, check, check_lengths, check_positions, needs_prompts


def run(
    recipe: Recipe,
    output: Path | None,
    resume: str,
    device: str | None,
    command: Sequence[str],
    console: Console,
    name: str = "run",
) -> dict[str, Any]:
    """Train as the recipe says and return what summary.json holds. Raises ZipError; nothing half-written stays.

    output, resume: as of `folders.claimed`; name: what a new folder under runs/ is called by. Stopped by a signal, it
    saves what is done and raises `Stopped` again. The state of signals is then as it was.
    """

    def begin() -> torch.device:
        check(recipe)
        return choose_device(distributed.device(device))

    # Products of float32 numbers on a GPU: eight times the speed for ten bits of mantissa. A CPU is not concerned.
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(recipe.seed)
    # The scope of signals is the outermost: a launcher's may come while the ranks part, and is not the reason.
    with signals.scope(), contextlib.ExitStack() as owned:
        minutes = recipe.train.stall_minutes
        with distributed.joined(begin, minutes) as where, contextlib.ExitStack() as opened:
            # The folder is ours before minutes of loading, and to the very end.
            output = distributed.first(lambda: owned.enter_context(claimed(output, resume, name)))
            activity.tell(f"opening {recipe.model.path}")
            try:
                policy = load_policy(recipe.model, where, recipe.seed)
            except Missing as error:  # all that has to be brought here, at once
                raise Missing("; ".join([str(error), *sources.missing(recipe.data)])) from None
            without_plans(policy.device)
            recipe = recipe.model_copy(update={"sparse": settled(recipe.sparse, policy.weight)})
            try:
                return _run(policy, recipe, output, resume, command, console, opened)
            finally:
                gc.unfreeze()
                policy.parallel.close()


def _run(
    policy: Policy,
    recipe: Recipe,
    output: Path | None,
    resume: str,
    command: Sequence[str],
    console: Console,
    opened: contextlib.ExitStack,
) -> dict[str, Any]:
    # 1. the questions: those to train on, and those to be judged by
    pictures = MediaEncoder(policy, recipe)
    prompts, questions, first = load_questions(recipe, pictures)
    guards: dict[str, Sequence[Prompt]] = {}
    if recipe.train.stage == "rl" and recipe.efficiency.max_accuracy_drop is not None:
        prompts, guards = guard.part(prompts, recipe)
    activity.tell("preparing the run")
    # 2. a folder for the run, and where else its numbers go
    about = describe(
        command, str(policy.device), recipe.seed, ranks=distributed.size(), recipe_sha256=recipe.sha256(),
        data={"train": sources.identity(prompts), "heldout": sources.identity(questions)},
    )  # fmt: skip
    folder = distributed.first(lambda: RunDir.open(recipe, output, resume, info=about))
    folder.writes = distributed.is_first()
    start = folder.start_step
    on = f", which goes on after step {start} of {recipe.train.steps}" if start else ""
    where = f"run: {folder.root}{on}; watch it: {folder.root / 'report.html'}"
    for line in [where, *effective(first, policy)]:
        console.print(line, soft_wrap=True, highlight=False)
    writer = opened.enter_context(board(recipe, folder.root, folder.start_step))
    # 3. the reference, and how it answers
    if recipe.train.stage == "rl":
        policy.keep_reference()
    page = RunPage(folder, recipe)
    page.open()
    try:
        before = measure_before(policy, recipe, questions, folder)
    except signals.Stopped:
        page.stopped(start)
        raise
    activity.tell("preparing to train")
    page.begin(policy, questions, before)
    # 4. the weights to go on from, on all devices, and the optimizer
    state, optimizer, average = start_or_resume(policy, recipe, folder)
    # 5. train; what is loaded stays, and Python need not walk through it again to find out, 0.2 s each time
    gc.collect()
    gc.freeze()
    judges = Guard(policy, recipe, pictures, guards)
    train(
        policy,
        recipe,
        pictures,
        prompts,
        judges,
        optimizer,
        average,
        state,
        folder,
        page,
        writer,
        console,
    )
    # 6. what it was worth
    try:
        return finish(policy, recipe, questions, before, folder, state["seconds"], page, console)
    except signals.Stopped:
        page.stopped(recipe.train.steps)
        raise


def load_questions(
    recipe: Recipe, pictures: MediaEncoder
) -> tuple[list[Prompt], list[Prompt], list[Encoded]]:
    """Prompts to train on, held-out questions, and the first prompts made ready. Raises InputError for rows that cannot
    be used, unless the recipe skips them."""
    check_positions(recipe, pictures.policy.positions)
    check_skip(recipe.sparse, pictures.policy.decoder)
    activity.tell("reading the questions")
    prompts = sources.load(recipe.data, "train", recipe.seed) if needs_prompts(recipe) else []
    questions = sources.load(recipe.data, "heldout", recipe.seed)
    prompts, questions = check_answers(prompts, recipe), check_answers(questions, recipe)
    prompts, questions = pictures.fitting(prompts), pictures.fitting(questions)
    if recipe.data.on_bad_row == "skip":
        questions = chunks.readable(pictures, questions)
    weight = pictures.policy.weight
    limit = dense_below(recipe.sparse, weight.device, weight.dtype)
    _, first = pictures.usable(prompts[: FIRST if limit else 1], least=0)
    check_lengths(recipe, [len(encoded) for encoded in first], limit)
    return prompts, questions, first


def train(
    policy: Policy,
    recipe: Recipe,
    pictures: MediaEncoder,
    prompts: Sequence[Prompt],
    judges: Guard,
    optimizer: Optimizers,
    average: Average,
    state: dict[str, Any],
    folder: RunDir,
    page: RunPage,
    writer: Callable[[int, Mapping[str, Any]], None],
    console: Console,
) -> None:
    """All steps from `folder.start_step` on; the policy then has the weights that the run ends with. state: changed
    here. Stopped by a signal, it saves the last whole step."""
    deck = PromptSampler(prompts, recipe.seed, recipe.train.prompts_per_step)
    steps, every = recipe.train.steps, recipe.train.save_every
    done, true = folder.start_step, copy.deepcopy(state)
    with Progress(console, steps, start=folder.start_step) as progress:
        try:
            # 1. does the longest question fit?
            if recipe.train.stage == "rl" and done < steps:
                rehearse(policy, recipe, pictures, prompts)
            if distributed.size() > 1:
                signals.hold()  # no rank may leave alone: the others would wait for it
            progress.begin()
            for step in range(done, steps):
                began = time.monotonic()
                watch.at(f"step {step + 1}: data")
                # 2. a step. Dropout alone uses the global generator; a resumed run must find it as an unbroken one does
                torch.manual_seed(recipe.seed * 1_000_003 + step)
                optimizer.set_rate(optim.learning_rate(recipe.optim, step, steps))
                if recipe.train.stage == "supervised":
                    metrics, batch = supervised_step(
                        policy, recipe, pictures, deck, optimizer, state, step
                    )
                else:
                    metrics, batch = rl_step(
                        policy, recipe, pictures, deck, judges, optimizer, average, state, step
                    )
                average.update()
                state["averaged"] = average.steps
                # 3. its numbers
                watch.at(f"step {step + 1}: numbers")
                metrics["lr"] = optimizer.param_groups[0]["lr"]
                state["seconds"] += time.monotonic() - began
                if batch is not None:
                    folder.append_rollouts(rollout_lines(step, batch))
                folder.append_metrics({"step": step, **metrics})
                done, true = step + 1, snapshot(state)
                writer(step, metrics)
                progress.update(step, metrics)
                # Anew: the progress has told of the next step.
                watch.at(f"step {done}: page and checkpoint")
                page.update(metrics, batch)
                # 4. a checkpoint
                if done == steps:
                    settle(policy, average, folder, state)
                if done == steps or (every and done % every == 0):
                    save(folder, policy, optimizer, average, state, done)
                    true = snapshot(state)
                # 5. the end, if the run goes wrong or a signal asked for it
                if done < steps:
                    alarms.check(distributed.first(lambda: alarms.trouble(page.rows, recipe)))
                signals.check(distributed.gather)
                if distributed.size() == 1:
                    signals.release()
        except (signals.Stopped, alarms.Alarm) as stop:
            signals.hold()  # once is enough: a second signal must not spoil what the first one saves
            if done != folder.start_step:
                save(folder, policy, optimizer, average, true, done)
            page.stopped(done, stop.why if isinstance(stop, alarms.Alarm) else "")
            stop.note = f"step {done} is saved; go on with --resume {folder.root}"
            raise
    average.take_over()
    signals.release()


def rl_step(
    policy: Policy,
    recipe: Recipe,
    pictures: MediaEncoder,
    deck: PromptSampler,
    judges: Guard,
    optimizer: Optimizers,
    average: Average,
    state: dict[str, Any],
    step: int,
) -> tuple[dict[str, Any], Batch]:
    """One step of reinforcement learning. state: `pressure` and `right` are changed here."""
    clock = [time.monotonic()]
    settings, steps, boost = recipe.efficiency, recipe.train.steps, recipe.data.hard_kind_boost
    controller = EfficiencyController(settings, policy.layers, state["pressure"], steps)
    # 1. the guard says what the average of the weights has lost
    watch.at(f"step {step + 1}: guard")
    judged = guarded(judges, average, controller.constraint, state["right"])
    clock.append(time.monotonic())
    # 2. take the step's questions and look at their pictures, once in the run
    kinds = controller.kind_weights(boost)
    drawn = deck.draw(step, kinds, controller.task_weights())
    asked, encoded, places = take(pictures, drawn)
    clock.append(time.monotonic())
    watch.at(f"step {step + 1}: vision")
    seen = pictures.look(encoded)
    clock.append(time.monotonic())
    # 3. roll out every question at every budget
    watch.at(f"step {step + 1}: rollout")
    known = state["right"]
    batch = roll_out(
        policy, recipe, asked, encoded, seen.policy, step, seen.reference, known, places
    )
    batch = together(batch, drawn, places)
    checks = batch.checks  # before questions are chosen by what was answered
    batch = redraw(policy, recipe, pictures, deck, batch, drawn, step, known, kinds)
    signals.check(distributed.gather)
    clock.append(time.monotonic())
    # 4. weigh saved tokens: toward the target, within the constraint
    controller.update(checks, step / steps, judged)
    optimizer.scale_rate(controller.constraint.rate)
    # 5. rewards, advantages, and the clipped update, while threads decode the next step's media
    watch.at(f"step {step + 1}: update")
    following = deck.draw(step + 1, controller.kind_weights(boost), controller.task_weights())
    pictures.ahead([following[i] for i in distributed.deal(len(following))])
    looked: dict[str, Any] = {}
    if recipe.train.diagnose_every and step % recipe.train.diagnose_every == 0:
        looked["diagnosis"] = diagnose(policy, recipe, batch, controller)
    order = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    parts = update(policy, recipe, batch, optimizer, controller, order)
    clock.append(time.monotonic())
    metrics = step_metrics(recipe, batch, parts) | controller.metrics() | looked
    names = ("guard", "data", "vision", "rollout", "update")
    metrics["seconds"] = dict(zip(names, np.diff(clock).tolist(), strict=True))
    return metrics, batch


def guarded(
    judges: Guard, average: Average, constraint: Constraint, known: dict[str, float]
) -> list[Judged]:
    """The guard's answers of a step, by the average of the weights; none without a constraint."""
    if not judges.by_task:
        return []
    with average.used():
        judged = judges.ask(constraint, known)
    signals.check(distributed.gather)
    if distributed.size() == 1:
        signals.release()
    return judged


def take(
    pictures: MediaEncoder, drawn: Sequence[Prompt]
) -> tuple[list[Prompt], list[Encoded], list[int]]:
    """This rank's questions of the step, ready for the model, and their places in it. Every rank has one at least."""
    mine = distributed.deal(len(drawn))
    numbered = dict(enumerate(drawn))
    least = int(distributed.size() == 1)
    asked, encoded, places = pictures.usable_at(numbered, mine, least)
    if distributed.size() > 1 and pictures.data.on_bad_row == "skip":
        even = distributed.evened(distributed.gather(places))[distributed.rank()]
        if even != places:
            asked, encoded = pictures.usable([drawn[i] for i in even])
            places = even
    return asked, encoded, places


def supervised_step(
    policy: Policy,
    recipe: Recipe,
    pictures: MediaEncoder,
    deck: PromptSampler,
    optimizer: Optimizers,
    state: dict[str, Any],
    step: int,
) -> tuple[dict[str, Any], None]:
    """One step of cross-entropy on answers. state: stage of the curriculum and running accuracy, changed here."""
    # 1. this rank's rows
    stage = int(state["stage"])
    if deck.prompts:
        portion = supervised.own_rows(pictures, deck.draw(step))
    else:
        portion = supervised.own_lessons(policy, recipe, step, stage)
    # 2. the gradient and the step
    watch.at(f"step {step + 1}: update")
    policy.model.train()
    optimizer.zero_grad()
    value, right = supervised.backward(policy, recipe, portion)
    if step == 0 and not math.isfinite(value):  # of the weights as they came: no rate would help
        raise RunError(f"the first step's loss is {value}: {OUTGROWN}")
    norm = optim.clipped_step(
        optimizer, policy.trainable(), recipe.optim.max_grad_norm, torch.tensor(value)
    )
    policy.model.eval()
    # 3. the next stage of the curriculum
    state["skill"] += 0.05 * (right - state["skill"])
    if state["skill"] > recipe.supervised.advance_at and stage + 1 < len(
        recipe.supervised.curriculum
    ):
        state["stage"], state["skill"] = stage + 1, 0.0
    return {"loss": value, "accuracy": right, "grad_norm": norm, "stage": stage}, None
