"""How much weight fewer tokens get: a PI controller per task and layer follows the target schedule, a constraint on
accuracy holds it back.

Each step's greedy answers at the inference p say what was saved and what it cost. Both are held per task: a task that
bears sparsity well neither pays for one that does not, nor hides it. With a target each decoder layer has its own
weight too, for layers differ: those whose attention is sharp give up their tokens within tens of steps, a diffuse
first layer hardly moves, and one weight for all takes the answers from the former before it reaches the latter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zipr1.core.recipe import Efficiency


@dataclass(frozen=True)
class Check:
    """A question's greedy sparse answer at the inference p beside the dense reference's.

    kind: `Prompt.task_kind`. gap: dense right - sparse right, in {-1, 0, 1} (or between, for graded rewards). ratios:
    share of prompt tokens in the physical cache, per layer.
    """

    task: str
    kind: str
    gap: float
    ratios: tuple[float, ...]


class EfficiencyController:
    """The weights of one step. state: what is remembered between steps, JSON numbers by name, changed by `update`.

    Until it is updated, and for a task that the last update had no check of, every layer's weight is
    `settings.weight`, and nothing is held back.
    """

    def __init__(
        self, settings: Efficiency, layers: int, state: dict[str, Any] | None = None
    ) -> None:
        self.settings = settings
        self.layers = layers
        self.state = {} if state is None else state
        self._weights: dict[str, torch.Tensor] = {}
        self._scales: dict[str, float] = {}

    def update(self, checks: Sequence[Check] | None, progress: float) -> None:
        """Take in a step's checks. progress: share of the run's steps that are done, in [0, 1). checks: None where
        neither a target nor a constraint asks for them.

        The constraint: mu <- clip(mu + step * (gap - max_accuracy_drop), 0, max_multiplier) for each task, gap its
        running mean; weights are divided by 1 + mu.

        The target: the ratio of layer d scheduled for progress t is start_d * (target / start_d) ** min(1, t /
        target_at), a geometric fall from what step 0 found. While e = ratio - scheduled > 0, the weight is
        proportional * e plus a sum, at most integral_max, that grows by integral * e / (1 + mu) each step. Nothing
        brings tokens back, so a layer that is ahead of the schedule gets no weight at all, and its sum decays.
        """
        self._weights, self._scales = {}, {}
        gains = self.settings.controller
        for check in checks or ():
            _move(self.state.setdefault("lost", {}), check.kind, check.gap, gains.kind_ema_rate)
        for task, own in by_task(checks or ()).items():
            scale = 1 / (1 + self._multiplier(task, [check.gap for check in own]))
            ratios = torch.tensor([check.ratios for check in own]).mean(0)
            pull = torch.ones(self.layers)
            if self.settings.target is not None:
                pull = torch.tensor(self._pulls(task, ratios.tolist(), scale, progress))
            self._scales[task] = scale
            self._weights[task] = self.settings.weight * scale * pull

    def layer_weights(self, tasks: Iterable[str]) -> torch.Tensor:
        """`(D, B)` float32 weights of each layer's expected token ratio, for rows of these tasks."""
        return torch.stack([self._weights.get(task, self._even()) for task in tasks], 1)

    def penalty_scale(self, task: str) -> float:
        """What the constraint leaves of a task's reward for saved tokens: 1 / (1 + mu), in (0, 1]."""
        return self._scales.get(task, 1.0)

    def kind_weights(self, boost: float) -> dict[str, float]:
        """How often each kind of question is to be drawn within its task, 1 + boost * its running gap; empty where all
        are alike."""
        if not boost:
            return {}
        return {kind: 1 + boost * max(gap, 0.0) for kind, gap in self.state.get("lost", {}).items()}

    def metrics(self) -> dict[str, float]:
        """The mean weight over tasks and layers, and the largest mu."""
        weights = torch.stack(list(self._weights.values()) or [self._even()])
        worst = min(self._scales.values(), default=1.0)
        return {"efficiency_weight": float(weights.mean()), "multiplier": 1 / worst - 1}

    def _even(self) -> torch.Tensor:
        return torch.full((self.layers,), self.settings.weight)

    def _multiplier(self, task: str, gaps: Sequence[float]) -> float:
        """mu of a task after this step's gaps; 0 without a constraint."""
        settings, running = self.settings, self.state.setdefault("gap", {})
        for gap in gaps:
            _move(running, task, gap, settings.controller.task_ema_rate)
        if settings.max_accuracy_drop is None:
            return 0.0
        held = self.state.setdefault("mu", {})
        moved = held.get(task, 0.0) + settings.step * (running[task] - settings.max_accuracy_drop)
        held[task] = min(max(moved, 0.0), settings.max_multiplier)
        return float(held[task])

    def _pulls(
        self, task: str, ratios: Sequence[float], scale: float, progress: float
    ) -> list[float]:
        """Weight of each layer on its way to the target, before `settings.weight` and the constraint."""
        settings, gains = self.settings, self.settings.controller
        assert settings.target is not None
        start = self.state.setdefault("start", {}).setdefault(task, list(ratios))
        sums = self.state.setdefault("sum", {}).setdefault(task, [0.0] * len(ratios))
        done = min(1.0, progress / settings.target_at)
        out = []
        for d, ratio in enumerate(ratios):
            scheduled = start[d] * min(1.0, settings.target / start[d]) ** done
            error = ratio - scheduled
            if error > 0:
                sums[d] = min(sums[d] + gains.integral * scale * error, gains.integral_max)
                out.append(sums[d] + gains.proportional * error)
            else:
                sums[d] *= gains.decay
                out.append(0.0)
        return out


def by_task(checks: Sequence[Check]) -> dict[str, list[Check]]:
    """Tasks in alphabetical order."""
    tasks = sorted({check.task for check in checks})
    return {task: [check for check in checks if check.task == task] for task in tasks}


def _move(means: dict[str, float], name: str, value: float, rate: float) -> None:
    """Move the running mean of that name by `rate` of its distance from the value; it starts at 0."""
    means[name] = means.get(name, 0.0) + rate * (value - means.get(name, 0.0))
