"""The accuracy constraint: how hard to push for fewer tokens, given what it has cost so far."""

from __future__ import annotations

from collections.abc import Sequence

from zipr1.recipe import Efficiency

# One question moves the running gap of its task by this share: about the last hundred questions count.
FORGET = 0.01


def constrain(
    settings: Efficiency, state: dict[str, float], gaps: Sequence[tuple[str, float]] | None
) -> float:
    """The efficiency weight under gap <= max_accuracy_drop, for minimising E[token ratio].

    gaps: (task, dense right - sparse right) of the step's questions, both greedy, the sparse one at the inference p;
    None turns the constraint off. state: `multiplier` and a running `gap/<task>` each, changed here.

    mu <- clip(mu + step * (gap - allowed), 0, max_multiplier), gap that of the worst task: an average would let a
    task that sparse training improves pay for one that it harms. The weight is divided by 1 + mu.
    """
    if settings.max_accuracy_drop is None or gaps is None:
        return settings.weight
    for task, gap in gaps:
        key = f"gap/{task}"
        state[key] = state.get(key, 0.0) + FORGET * (gap - state.get(key, 0.0))
    worst = max((v for k, v in state.items() if k.startswith("gap/")), default=0.0)
    moved = state.get("multiplier", 0.0) + settings.step * (worst - settings.max_accuracy_drop)
    state["multiplier"] = min(max(moved, 0.0), settings.max_multiplier)
    return settings.weight / (1 + state["multiplier"])
