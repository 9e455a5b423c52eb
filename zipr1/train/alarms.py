"""What stops a run that goes wrong, before it has cost hours: rules over the lines of metrics.jsonl, nothing else.

A rule judges only what training has changed: a model that comes with a mass in one token, or whose kept tokens hold
little of other probes' mass from the start, is not stopped for it. And only what is sure: noise of a few steps, a
schedule that asks for little yet, or a drift that is on its way back stop nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from zipr1.core.errors import RunError
from zipr1.core.recipe import Recipe

Rows = Sequence[Mapping[str, Any]]

FIRST, RECENT = 10, 20  # steps that "at the start" and "now" are means of
SURE = 2  # standard errors
EARLIEST = 50  # steps before a kept share must have moved


class Alarm(RunError):
    """A run that goes wrong. why: in one line; note: what is saved, and how to go on."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why, self.note = why, ""

    def __str__(self) -> str:
        return f"stopped: {self.why}; {self.note}"


def check(line: str | None) -> None:
    """Raise Alarm where `trouble` found something."""
    if line is not None:
        raise Alarm(line)


def trouble(rows: Rows, recipe: Recipe) -> str | None:
    """What is wrong with a run after the step of the last row: what, by how much, which key to change, and which sets
    the rule off. None while nothing is. rows: all lines of metrics.jsonl so far."""
    if recipe.train.stage != "rl" or not rows:
        return None
    for rule in (drift, one_token, heldout, movement):
        if line := rule(rows, recipe):
            return line
    return None


def drift(rows: Rows, recipe: Recipe) -> str | None:
    """A task loses more than `max_drift` with all tokens (p = 1), by its guard questions: surely so in each step of a
    whole tenth of the run, within the second half, and at its end no less than at its beginning. Weights wander while
    the learning rate is high, and come back: that is no reason to stop."""
    bound, steps = recipe.alarms.max_drift, recipe.train.steps
    window = rows[-max(RECENT, steps // 10) :]
    if bound is None or len(window) < max(RECENT, steps // 10) or window[0]["step"] < steps // 2:
        return None
    for task in window[-1].get("guard") or {}:
        seen = [one for row in window if (one := (row.get("guard") or {}).get(task))]
        sure = [one["drift"] - SURE * one["drift_error"] > bound for one in seen]
        if len(seen) < len(window) or not all(sure):
            continue
        if seen[-1]["drift"] >= seen[0]["drift"]:
            lost, error = 100 * seen[-1]["drift"], 100 * seen[-1]["drift_error"]
            return (
                f"with all tokens (p = 1) {task} loses {lost:.1f} points (standard error {error:.1f}) against the "
                f"untouched base, and alarms.max_drift (null: off) allows {100 * bound:g}; lower optim.lr "
                f"({recipe.optim.lr:g}), or raise ppo.dense_kl_fraction ({recipe.ppo.dense_kl_fraction:g})"
            )
    return None


def one_token(rows: Rows, recipe: Recipe) -> str | None:
    """One token holds more than `max_token_mass` of the score mass, mean over layers, in two diagnoses on end, and did
    not in the first one: few tokens are kept because the scores have nothing to say, not because few are needed."""
    bound = recipe.alarms.max_token_mass
    if bound is None or "diagnosis" not in rows[-1]:
        return None
    seen = [row["diagnosis"].get("top_token") for row in rows if "diagnosis" in row]
    if len(seen) < 3 or None in seen or seen[0] > bound or min(seen[-2:]) <= bound:
        return None
    return (
        f"one token holds {seen[-1]:.1%} of the score mass ({seen[0]:.1%} at the start), and alarms.max_token_mass "
        f"(null: off) allows {bound:.1%}; lower efficiency.weight ({recipe.efficiency.weight:g})"
    )


def heldout(rows: Rows, recipe: Recipe) -> str | None:
    """Kept tokens hold less than `min_heldout_mass` of the score mass of other probes, surely so over RECENT steps, and
    did not at the start. Only greedy answers at the inference p are judged, which a target or a constraint asks for."""
    bound, wanted = recipe.alarms.min_heldout_mass, recipe.efficiency
    if bound is None or (wanted.target is None and wanted.max_accuracy_drop is None):
        return None
    if len(rows) < FIRST + RECENT:
        return None
    masses = [row.get("heldout_mass") for row in (*rows[:FIRST], *rows[-RECENT:])]
    start, now = (np.array(part, dtype=float) for part in (masses[:FIRST], masses[FIRST:]))
    if not start.mean() >= bound:
        return None
    if not now.mean() + SURE * now.std(ddof=1) / np.sqrt(len(now)) < bound:
        return None
    return (
        f"the kept tokens hold {now.mean():.1%} of the score mass of probes that took no part in the choice "
        f"({start.mean():.1%} at the start), and alarms.min_heldout_mass (null: off) is {bound:.1%}; raise "
        f"sparse.probes.random ({recipe.sparse.probes.random})"
    )


def movement(rows: Rows, recipe: Recipe) -> str | None:
    """The kept share has not fallen by `min_movement` of itself, EARLIEST steps and the warm-up of the learning rate
    over, in any task that was asked for twice as much in each of the last RECENT steps. Without a target nothing is."""
    bound, steps = recipe.alarms.min_movement, recipe.train.steps
    done = rows[-1]["step"] + 1
    if bound is None or done < max(EARLIEST, round(recipe.optim.warmup * steps)):
        return None
    asked: dict[str, tuple[float, float]] = {}
    for task in rows[-1].get("set_point") or {}:
        kept = _kept(rows[:FIRST], task), _kept(rows[-RECENT:], task)
        if not kept[0] or not kept[1]:
            continue
        start, now = float(np.mean(kept[0])), float(np.mean(kept[1]))
        points = [row["set_point"].get(task, start) for row in rows[-RECENT:] if "set_point" in row]
        if max(points) < (1 - 2 * bound) * start:
            asked[task] = start, now
    if not asked or any(now < (1 - bound) * start for start, now in asked.values()):
        return None
    task, (start, now) = next(iter(asked.items()))
    return (
        f"the kept share of {task} is {now:.1%} after {done} steps and was {start:.1%}, and alarms.min_movement (null: "
        f"off) asks for {bound:.1%} less; raise optim.lr ({recipe.optim.lr:g}), or lower budgets.low "
        f"({recipe.budgets.low:g})"
    )


def _kept(rows: Rows, task: str) -> list[float]:
    """Of a task, in the steps that asked about it."""
    found = [(row.get("inference") or {}).get(task) for row in rows]
    return [one["token_ratio"] for one in found if one]
