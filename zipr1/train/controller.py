"""How much weight fewer tokens get: a PI controller per task and layer follows the target schedule, as far as the
constraint on accuracy (constraint.py) lets the task go.

Each step's greedy answers at the inference p say how many tokens are kept. They are held per task: a task that bears
sparsity well neither pays for one that does not, nor hides it. With a target each decoder layer has its own weight too,
for layers differ: those whose attention is sharp give up their tokens within tens of steps, a diffuse first layer
hardly moves, and one weight for all takes the answers from the former before it reaches the latter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zipr1.core.recipe import Efficiency
from zipr1.train.constraint import Constraint, Judged


@dataclass(frozen=True)
class Check:
    """A question's greedy sparse answer at the inference p beside the dense reference's.

    kind: `Prompt.task_kind`. gap: dense right - sparse right, in {-1, 0, 1} (or between, for graded rewards). ratios:
    share of prompt tokens in the physical cache, per layer. dense: how right the dense answer is.
    """

    task: str
    kind: str
    gap: float
    ratios: tuple[float, ...]
    dense: float = 0.0


class EfficiencyController:
    """The weights of one step. state: what is remembered between steps, JSON values by name, changed by `update`.

    Until it is updated, and for a task that the last update had no check of, every layer's weight is
    `settings.weight`, and its answers count 1. steps: of the whole run.
    """

    def __init__(
        self,
        settings: Efficiency,
        layers: int,
        state: dict[str, Any] | None = None,
        steps: int = 1,
    ) -> None:
        self.settings = settings
        self.layers = layers
        self.state = {} if state is None else state
        self.constraint = Constraint(settings, self.state, steps)
        self._progress = 0.0
        self._weights: dict[str, torch.Tensor] = {}
        self._set_points: dict[str, list[float]] = {}

    def update(
        self, checks: Sequence[Check] | None, progress: float, judged: Sequence[Judged] = ()
    ) -> None:
        """Take in a step's checks and guard answers. progress: share of the run's steps that are done, in [0, 1).
        checks: None where neither a target nor a constraint asks for them.

        The target: the ratio of layer d that is scheduled is start_d * (target / start_d) ** f, start_d what step 0
        found and f how far the task has been let: what `Constraint.fallen` says, or min(1, progress / target_at) where
        nobody judges it. With e = ratio - scheduled > 0 the weight is proportional * e plus a sum, at most
        integral_max, that grows by integral * e each step. A layer that is ahead of the schedule gets no weight at
        all, and its sum decays; but while a task's tokens are to come back, weight and sum have either sign.
        """
        self._weights, self._set_points, self._progress = {}, {}, progress
        settings = self.settings
        for check in checks or ():
            kinds = self.state.setdefault("lost", {})
            move(kinds, check.kind, check.gap, settings.controller.kind_ema_rate)
        self.constraint.update(judged, progress)
        for task, own in by_task(checks or ()).items():
            ratios = torch.tensor([check.ratios for check in own]).mean(0)
            fallen = self.penalty_scale(task)
            if settings.target is None:
                pull = torch.full((self.layers,), fallen)
            else:
                if not self.constraint.judges(task):
                    fallen = min(1.0, progress / settings.target_at)
                pull = torch.tensor(self._pulls(task, ratios.tolist(), fallen))
            self._weights[task] = settings.weight * pull

    def layer_weights(self, tasks: Iterable[str]) -> torch.Tensor:
        """`(D, B)` float32 weights of each layer's expected token ratio, for rows of these tasks."""
        return torch.stack([self._weights.get(task, self._even()) for task in tasks], 1)

    def penalty_scale(self, task: str) -> float:
        """What the constraint leaves of a task's reward for saved tokens, in [0, 1]: how far it has been let."""
        return self.constraint.fallen(task)

    def answer_weights(self, tasks: Sequence[str]) -> torch.Tensor:
        """`(B,)` float32 with mean 1: how much the answers of rows of these tasks count."""
        weights = torch.tensor([self.constraint.answer_weight(task) for task in tasks])
        return weights / weights.mean()

    def task_weights(self) -> dict[str, float]:
        """How often each task is to be drawn; empty where all are alike."""
        held = self.state.get("answers", {})
        return {t: self.constraint.answer_weight(t) for t in held} if any(held.values()) else {}

    def kind_weights(self, boost: float) -> dict[str, float]:
        """How often each kind of question is to be drawn within its task, 1 + boost * its running gap; empty where all
        are alike."""
        if not boost:
            return {}
        return {kind: 1 + boost * max(gap, 0.0) for kind, gap in self.state.get("lost", {}).items()}

    def set_points(self) -> dict[str, list[float]]:
        """The kept share that each layer is held to now, by task; empty without a target."""
        return self._set_points

    def metrics(self) -> dict[str, Any]:
        """The mean weight over tasks and layers, by task the mean set point, and what the constraint has to say."""
        weights = torch.stack(list(self._weights.values()) or [self._even()])
        return {
            "efficiency_weight": float(weights.mean()),
            "set_point": {task: sum(own) / len(own) for task, own in self._set_points.items()},
            **self.constraint.metrics(self._progress),
        }

    def _even(self) -> torch.Tensor:
        return torch.full((self.layers,), self.settings.weight)

    def _pulls(self, task: str, ratios: Sequence[float], fallen: float) -> list[float]:
        """Weight of each layer on its way to the target, before `settings.weight`."""
        settings, gains = self.settings, self.settings.controller
        assert settings.target is not None
        start = self.state.setdefault("start", {}).setdefault(task, list(ratios))
        sums = self.state.setdefault("sum", {}).setdefault(task, [0.0] * len(ratios))
        back = self.constraint.comes_back(task)
        points = [first * min(1.0, settings.target / first) ** fallen for first in start]
        self._set_points[task] = points
        out = []
        for d, (ratio, scheduled) in enumerate(zip(ratios, points, strict=True)):
            error = ratio - scheduled
            pressed = error > 0 or back
            # What had added up on the other side must not push on from there.
            if not pressed or sums[d] * error < 0:
                sums[d] *= gains.decay
            if pressed:
                moved = sums[d] + gains.integral * error
                sums[d] = min(max(moved, -gains.integral_max), gains.integral_max)
            out.append(sums[d] + gains.proportional * error if pressed else 0.0)
        return out


def by_task(checks: Sequence[Check]) -> dict[str, list[Check]]:
    """Tasks in alphabetical order."""
    tasks = sorted({check.task for check in checks})
    return {task: [check for check in checks if check.task == task] for task in tasks}


def move(means: dict[str, float], name: str, value: float, rate: float) -> None:
    """Move the running mean of that name by `rate` of its distance from the value; it starts at 0."""
    means[name] = means.get(name, 0.0) + rate * (value - means.get(name, 0.0))
