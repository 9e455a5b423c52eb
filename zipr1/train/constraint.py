"""What guard questions say of each task, and what follows from it.

Two things make a task lose answers. Fewer tokens: its answers are wrong at the inference p, and right with all tokens.
Drift: the weights have changed, and answers are wrong with all tokens too. Tokens give way to the first, in both
directions; the second makes the task's answers count and be drawn more often, and lowers the learning rate, for more
tokens would not help it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zipr1.core.objective import Efficiency

# How far a step moves the running means: the last 1 / RATE steps count, and a change is seen that much later.
RATE = 0.02
LAG = 1 / RATE
# How far one step moves the logarithm of the weight of a task's answers.
ANSWERS = 0.02
# The learning rate is halved after so many lags of drift above two standard errors, and never falls below this share.
PATIENCE, SLOWEST = 3, 0.125


@dataclass(frozen=True)
class Judged:
    """One guard question. lost: how right the untouched base is, less how right the sparse answer is at the inference
    p; drift: less how right the same weights are with all tokens, None where that was not asked. In {-1, 0, 1}, or
    between for graded rewards. ratio: share of the prompt's tokens that the sparse answer read."""

    task: str
    lost: float
    drift: float | None
    ratio: float = 1.0


class Constraint:
    """state: what is remembered between steps, JSON values, changed by `update`. steps: of the whole run."""

    def __init__(self, settings: Efficiency, state: dict[str, Any], steps: int) -> None:
        self.settings, self.state, self.steps = settings, state, steps

    @property
    def holds(self) -> bool:
        """Whether there is a constraint at all."""
        return self.settings.max_accuracy_drop is not None

    def update(self, judged: Sequence[Judged], progress: float) -> None:
        """Take in a step's guard answers. progress: share of the run's steps that are done, in [0, 1).

        With a the loss allowed now, t the loss by fewer tokens and d the drift of a task (running means), its tokens go
        on to fall while t < max(a - d, a / 2), stay where they are up to two standard errors above that, and come back
        beyond. Every turn makes them slower, for the evidence lags behind and a swing would never end. A task that
        loses more than a in all gets its answers weighted more.
        """
        if not self.holds:
            return
        allowed = self.allowed(progress)
        drifted = False
        for task in dict.fromkeys(one.task for one in judged):
            seen = self._take_in([one for one in judged if one.task == task])
            drift = mean(seen["drift"])
            left = max(allowed - max(drift, 0.0), allowed / 2)
            self._move(task, spare(mean(seen["tokens"]), error(seen["tokens"]), left))
            scale = max(error(seen["lost"]), allowed, 1e-6)
            over = min(max((mean(seen["lost"]) - allowed) / scale, -1.0), 1.0)
            held, most = self.state.setdefault("answers", {}), self.settings.guard.max_answer_weight
            held[task] = min(max(held.get(task, 0.0) + ANSWERS * over, 0.0), math.log(most))
            drifted |= drift - 2 * error(seen["drift"]) > allowed
        self._slow_down(drifted)

    def allowed(self, progress: float) -> float:
        """What a task may lose at this time of the run: it falls geometrically from `guard.early_drop` to
        `max_accuracy_drop`, where it is from `guard.strict_at` on."""
        strict, guard = self.settings.max_accuracy_drop or 0.0, self.settings.guard
        early = max(guard.early_drop, strict)
        done = min(1.0, progress / guard.strict_at)
        return float(early * (max(strict, 1e-4) / max(early, 1e-4)) ** done) if strict else 0.0

    def judges(self, task: str) -> bool:
        """Whether guard questions have been asked of a task; without any it is not held."""
        return self.holds and task in self.state.get("fallen", {})

    def fallen(self, task: str) -> float:
        """How far a task's tokens have been let on their way, in [0, 1]; 1 for a task that nobody judges."""
        return float(self.state["fallen"][task]) if self.judges(task) else 1.0

    def comes_back(self, task: str) -> bool:
        """Whether a task's tokens are on their way back."""
        return self.holds and bool(self.state.get("back", {}).get(task, False))

    def answer_weight(self, task: str) -> float:
        """How much a task's answers count, and how often it is drawn: in [1, guard.max_answer_weight]."""
        return math.exp(self.state.get("answers", {}).get(task, 0.0))

    @property
    def rate(self) -> float:
        """What drift has left of the learning rate, in (0, 1]."""
        return float(self.state.get("rate", 1.0))

    def portions(self, tasks: Sequence[str], number: int) -> dict[str, int]:
        """How many of `number` questions each task is asked next: a third of them is shared evenly, the rest by the
        standard deviation of what was seen, which makes the largest of the errors small (Neyman 1934). At least one."""
        deviations = {}
        for task in tasks:
            seen = self.state.get("guard", {}).get(task)
            deviations[task] = (
                error(seen["lost"]) * math.sqrt(seen["lost"]["count"]) if seen else 1.0
            )
        total = sum(deviations.values())
        return {
            task: max(1, round(number * (1 / (3 * len(tasks)) + 2 / 3 * value / total)))
            for task, value in deviations.items()
        }

    def metrics(self, progress: float) -> dict[str, Any]:
        """By task, for metrics.jsonl; nothing without a constraint."""
        if not self.holds:
            return {}
        guard = {
            task: {
                "lost": mean(seen["lost"]),
                "error": error(seen["lost"]),
                "drift": mean(seen["drift"]),
                "drift_error": error(seen["drift"]),
                "token_ratio": mean(seen["ratio"]),
                "fallen": self.fallen(task),
                "answer_weight": self.answer_weight(task),
            }
            for task, seen in self.state.get("guard", {}).items()
        }
        return {"guard": guard, "allowed": self.allowed(progress), "rate_scale": self.rate}

    def surely_violated(self) -> bool:
        """Whether a task loses more than it may at the end of a run, by more than the standard error of that."""
        strict = self.settings.max_accuracy_drop
        return strict is not None and any(
            mean(seen["lost"]) - error(seen["lost"]) > strict
            for seen in self.state.get("guard", {}).values()
        )

    def _take_in(self, own: Sequence[Judged]) -> dict[str, dict[str, float]]:
        names = ("lost", "drift", "tokens", "ratio")
        seen: dict[str, dict[str, float]] = self.state.setdefault("guard", {}).setdefault(
            own[0].task, {name: {} for name in names}
        )
        both = [(one.lost, one.drift) for one in own if one.drift is not None]
        take_in(seen["lost"], [one.lost for one in own])
        take_in(seen["drift"], [drift for _, drift in both])
        take_in(seen["tokens"], [lost - drift for lost, drift in both])
        take_in(seen["ratio"], [one.ratio for one in own])
        return seen

    def _move(self, task: str, spare: float) -> None:
        """Let a task's tokens fall or bring them back. spare: in [-1, 1], of the whole speed, which would take the task
        all the way within `target_at` of the run."""
        done, turns, back = (self.state.setdefault(k, {}) for k in ("fallen", "turns", "back"))
        if spare and bool(back.get(task, False)) != (spare < 0):
            turns[task] = turns.get(task, 0) + 1
            back[task] = spare < 0
        step = spare / (self.settings.target_at * self.steps) / (1 + turns.get(task, 0) / 2)
        done[task] = min(max(done.get(task, 0.0) + step, 0.0), 1.0)

    def _slow_down(self, drifted: bool) -> None:
        """Halve the learning rate once drift has surely been too large for PATIENCE lags on end."""
        steps = self.state.get("drifted", 0) + 1 if drifted else 0
        if steps >= PATIENCE * LAG:
            self.state["rate"], steps = max(self.rate / 2, SLOWEST), 0
        self.state["drifted"] = steps


def spare(lost: float, error: float, left: float) -> float:
    """How fast tokens may fall, in [-1, 1]; below 0 they come back. lost: by fewer tokens, with its standard error;
    left: how much of that is allowed; up to half of it they fall at full speed. Nothing moves where the loss is too
    large by no more than two errors: to bring tokens back for a loss that is not there costs more than to wait for the
    next answers."""
    if lost < left:
        return min(1.0, 2 * (left - lost) / max(left, 1e-6))
    return -min(1.0, max(lost - 2 * error - left, 0.0) / max(left, 1e-6))


def take_in(seen: dict[str, float], values: Sequence[float]) -> None:
    """Take a step's values into a running mean and mean square, both corrected for how few there were at first."""
    if not values:
        return
    seen["weight"] = (1 - RATE) * seen.get("weight", 0.0) + RATE
    for name, power in (("mean", 1), ("square", 2)):
        now = sum(value**power for value in values) / len(values)
        seen[name] = (1 - RATE) * seen.get(name, 0.0) + RATE * now
    # How many values the means are worth: of an exponential mean 2 / RATE - 1 steps.
    seen["count"] = min(len(values) * (2 / RATE - 1), seen.get("count", 0.0) + len(values))


def mean(seen: Mapping[str, float]) -> float:
    """The running mean; 0 before the first value."""
    return seen["mean"] / seen["weight"] if seen.get("weight") else 0.0


def error(seen: Mapping[str, float]) -> float:
    """Standard error of the running mean; 1 before the first value."""
    if not seen.get("weight"):
        return 1.0
    variance = max(seen["square"] / seen["weight"] - mean(seen) ** 2, 0.0)
    # As if one more value had been another: that none was seen does not mean that there is none.
    return math.sqrt((variance + 1 / seen["count"]) / seen["count"])
