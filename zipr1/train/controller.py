"""How hard to press for fewer tokens: toward a target, on a pace, and no harder than the answers bear.

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

# One question moves the running gap of its task by this share: about the last hundred questions count.
FORGET = 0.01
# A kind of question is rarer than its task: about the last fifty count.
FORGET_KIND = 0.02

# A layer's weight follows its distance from the pace: so much at once, and so much more with every step that it lasts.
AT_ONCE = 10.0
EACH_STEP = 0.5
MOST = 30.0
FADE = 0.9


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


@dataclass
class Pressure:
    """weights[task]: `(D,)` float32, of each layer's expected token ratio. relief[task]: 1 / (1 + mu), in (0, 1].

    A task not heard of yet is pressed like an unconstrained one.
    """

    weights: dict[str, torch.Tensor]
    relief: dict[str, float]
    otherwise: torch.Tensor

    def rows(self, tasks: Iterable[str]) -> torch.Tensor:
        """`(D, B)` weights for rows of these tasks."""
        return torch.stack([self.weights.get(task, self.otherwise) for task in tasks], 1)

    def metrics(self) -> dict[str, float]:
        weights = list(self.weights.values()) or [self.otherwise]
        worst = min(self.relief.values(), default=1.0)
        return {
            "efficiency_weight": float(torch.stack(weights).mean()),
            "multiplier": 1 / worst - 1,
        }


def press(
    settings: Efficiency,
    state: dict[str, Any],
    checks: Sequence[Check] | None,
    layers: int,
    progress: float,
) -> Pressure:
    """The weights of this step. state: what is remembered between steps, JSON numbers by name, changed here.

    progress: share of the run's steps that are done, in [0, 1). checks: None where neither a target nor a constraint
    asks for them; every weight is then `settings.weight`.

    The constraint: mu <- clip(mu + step * (gap - max_accuracy_drop), 0, max_multiplier) for each task, gap its running
    mean; weights are divided by 1 + mu.

    The target: the ratio of layer d wanted at progress t is start_d * (target / start_d) ** min(1, t / reach), a
    geometric fall from what step 0 found. While e = ratio - wanted > 0, the weight is AT_ONCE * e plus a sum, at most
    MOST, that grows by EACH_STEP * e / (1 + mu) each step: a proportional-integral controller. Nothing brings tokens
    back, so a layer that is ahead of the pace is not pressed at all, and its sum fades.
    """
    even = torch.full((layers,), settings.weight)
    if checks is None:
        return Pressure({}, {}, even)
    for check in checks:
        follow(state.setdefault("lost", {}), check.kind, check.gap, FORGET_KIND)
    weights, relief = {}, {}
    for task, own in by_task(checks).items():
        relief[task] = 1 / (1 + multiplier(settings, state, task, [check.gap for check in own]))
        ratios = torch.tensor([check.ratios for check in own]).mean(0)
        pull = torch.ones(layers)
        if settings.target is not None:
            pull = torch.tensor(
                pulls(settings, state, task, ratios.tolist(), relief[task], progress)
            )
        weights[task] = settings.weight * relief[task] * pull
    return Pressure(weights, relief, even)


def by_task(checks: Sequence[Check]) -> dict[str, list[Check]]:
    """Tasks in alphabetical order."""
    tasks = sorted({check.task for check in checks})
    return {task: [check for check in checks if check.task == task] for task in tasks}


def follow(means: dict[str, float], name: str, value: float, share: float) -> None:
    """Move the running mean of that name by `share` of its distance from the value; it starts at 0."""
    means[name] = means.get(name, 0.0) + share * (value - means.get(name, 0.0))


def draw_weights(emphasis: float, state: dict[str, Any]) -> dict[str, float]:
    """How often each kind is to be drawn within its task, 1 + emphasis * its running gap; empty where all are alike."""
    if not emphasis:
        return {}
    return {kind: 1 + emphasis * max(gap, 0.0) for kind, gap in state.get("lost", {}).items()}


def multiplier(
    settings: Efficiency, state: dict[str, Any], task: str, gaps: Sequence[float]
) -> float:
    """mu of a task after this step's gaps; 0 without a constraint."""
    running = state.setdefault("gap", {})
    for gap in gaps:
        follow(running, task, gap, FORGET)
    if settings.max_accuracy_drop is None:
        return 0.0
    held = state.setdefault("mu", {})
    moved = held.get(task, 0.0) + settings.step * (running[task] - settings.max_accuracy_drop)
    held[task] = min(max(moved, 0.0), settings.max_multiplier)
    return float(held[task])


def pulls(
    settings: Efficiency,
    state: dict[str, Any],
    task: str,
    ratios: Sequence[float],
    relief: float,
    progress: float,
) -> list[float]:
    """Weight of each layer on its way to the target, before `settings.weight` and the constraint."""
    assert settings.target is not None
    start = state.setdefault("start", {}).setdefault(task, list(ratios))
    sums = state.setdefault("sum", {}).setdefault(task, [0.0] * len(ratios))
    done = min(1.0, progress / settings.reach)
    out = []
    for d, ratio in enumerate(ratios):
        wanted = start[d] * min(1.0, settings.target / start[d]) ** done
        error = ratio - wanted
        if error > 0:
            sums[d] = min(sums[d] + EACH_STEP * relief * error, MOST)
            out.append(sums[d] + AT_ONCE * error)
        else:
            sums[d] *= FADE
            out.append(0.0)
    return out
