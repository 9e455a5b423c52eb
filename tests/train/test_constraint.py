"""What guard answers do to tokens, answers and the learning rate: by hand, and on a simulated model."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from zipr1.core.recipe import Efficiency, Guard
from zipr1.train.constraint import RATE, Constraint, Judged, error, mean, spare, take_in
from zipr1.train.controller import Check, EfficiencyController


def settings(**more) -> Efficiency:
    plain = {"weight": 1.0, "max_accuracy_drop": 0.01, "target": 0.2, "target_at": 0.5}
    return Efficiency(**{**plain, **more})


def judged(task: str, lost: float, drift: float | None = 0.0, ratio: float = 0.5) -> Judged:
    return Judged(task, lost, drift, ratio)


def test_running_means_by_hand():
    seen: dict[str, float] = {}
    assert mean(seen) == 0.0 and error(seen) == 1.0
    take_in(seen, [1.0, 0.0])
    # Corrected for how few there were: the mean of one step is that step's.
    assert mean(seen) == pytest.approx(0.5)
    assert error(seen) == pytest.approx(math.sqrt((0.25 + 1 / 2) / 2))
    take_in(seen, [0.0, 0.0])
    old, new = (1 - RATE) * RATE, RATE
    assert mean(seen) == pytest.approx(0.5 * old / (old + new))
    assert seen["count"] == 4
    take_in(seen, [])
    assert seen["count"] == 4
    for _ in range(1000):
        take_in(seen, [1.0, 1.0])
    assert mean(seen) == pytest.approx(1.0) and seen["count"] == pytest.approx(2 * (2 / RATE - 1))


def test_what_is_allowed_falls_to_the_promise():
    guard = Guard(early_drop=0.04, strict_at=0.5)
    constraint = Constraint(settings(guard=guard), {}, 100)
    assert constraint.allowed(0.0) == pytest.approx(0.04)
    assert constraint.allowed(0.25) == pytest.approx(0.02)  # halfway, in the logarithm
    assert constraint.allowed(0.5) == constraint.allowed(0.99) == pytest.approx(0.01)
    wide = Constraint(settings(max_accuracy_drop=0.2, guard=guard), {}, 100)
    assert wide.allowed(0.0) == wide.allowed(1.0) == pytest.approx(0.2)
    none = Constraint(settings(max_accuracy_drop=0.0, guard=guard), {}, 100)
    assert none.allowed(0.0) == none.allowed(1.0) == 0.0


@pytest.mark.parametrize(
    ("lost", "error", "left", "want"),
    [
        (0.0, 0.5, 0.01, 1.0),
        (-0.3, 0.0, 0.01, 1.0),  # answers are gained: no faster than the schedule
        (0.005, 0.5, 0.01, 1.0),  # half of what is left
        (0.0075, 0.5, 0.01, 0.5),
        (
            0.025,
            0.01,
            0.01,
            0.0,
        ),  # too much by less than two of its errors: not sure, nothing moves
        (0.035, 0.01, 0.01, -0.5),
        (0.9, 0.01, 0.01, -1.0),
    ],
)
def test_how_fast_tokens_may_fall(lost, error, left, want):
    assert spare(lost, error, left) == pytest.approx(want)


def test_only_what_fewer_tokens_cost_brings_tokens_back():
    """`few` is wrong at the inference p alone, `drifts` with all tokens too, `holds` is right."""
    state: dict = {}
    constraint = Constraint(settings(), state, 1000)
    for _ in range(300):
        constraint.update(
            [judged("few", 0.2, 0.0), judged("drifts", 0.2, 0.2), judged("holds", 0.0)], 0.9
        )
    assert constraint.comes_back("few") and constraint.fallen("few") == 0.0
    assert not constraint.comes_back("drifts") and constraint.fallen("drifts") > 0.2
    assert constraint.fallen("holds") == pytest.approx(300 / 500)
    # Both lose too much: their answers count more; and drift slows learning.
    assert constraint.answer_weight("few") == pytest.approx(2.0)
    assert constraint.answer_weight("drifts") == pytest.approx(2.0)
    assert constraint.answer_weight("holds") == 1.0
    assert constraint.rate == 0.5
    assert json.loads(json.dumps(state)) == state


def test_the_rate_is_halved_after_three_lags_of_sure_drift_and_has_a_floor():
    constraint = Constraint(settings(), {}, 10_000)
    for step in range(1, 1001):
        constraint.update([judged("a", 0.5, 0.5)] * 8, 0.9)
        assert constraint.rate == {0: 1.0, 1: 0.5, 2: 0.25}.get(step // 150, 0.125)
    assert constraint.rate == 0.125
    calm = Constraint(settings(), {}, 10_000)
    for step in range(1000):  # never for so long on end
        calm.update([judged("a", 1.0, 1.0 if step % 90 < 45 else -1.0)] * 4, 0.9)
    assert calm.rate == 1.0


def test_every_turn_makes_tokens_slower():
    constraint = Constraint(settings(target_at=0.5), {}, 100)
    constraint._move("a", 1.0)
    assert constraint.fallen("a") == pytest.approx(1 / 50)
    constraint._move("a", -0.5)  # the first turn
    assert constraint.fallen("a") == pytest.approx(1 / 50 - 0.5 / 50 / 1.5)
    constraint._move("a", 0.0)  # none
    constraint._move("a", 1.0)  # the second
    assert constraint.fallen("a") == pytest.approx(1 / 50 - 0.5 / 50 / 1.5 + 1 / 50 / 2)


def test_without_a_constraint_nothing_is_held():
    constraint = Constraint(settings(max_accuracy_drop=None), {}, 100)
    constraint.update([judged("a", 1.0)], 0.5)
    assert (
        constraint.state == {} and constraint.fallen("a") == 1.0 and constraint.metrics(0.5) == {}
    )
    assert not constraint.surely_violated() and constraint.rate == 1.0


def test_questions_go_where_answers_vary():
    state: dict = {}
    constraint = Constraint(settings(), state, 100)
    assert constraint.portions(["a", "b"], 12) == {"a": 6, "b": 6}
    for step in range(400):
        flip = 1.0 if step % 2 else -1.0
        constraint.update([judged("a", 0.0)] * 8 + [judged("b", flip)] * 8, 0.5)
    portions = constraint.portions(["a", "b"], 12)
    # A third is shared evenly, two each; `a` never varies, and as good as all of the rest goes to `b`.
    assert portions["a"] == 2 and portions["b"] == 10
    assert constraint.portions(["a", "b"], 1) == {"a": 1, "b": 1}


def test_a_run_is_surely_violated_by_more_than_the_error_of_what_is_seen():
    state: dict = {}
    constraint = Constraint(settings(max_accuracy_drop=0.01), state, 100)
    constraint.update([judged("a", 1.0), judged("a", 0.0)], 0.9)
    assert mean(state["guard"]["a"]["lost"]) == 0.5 and not constraint.surely_violated()
    for _ in range(100):
        constraint.update([judged("a", 1.0), judged("a", 0.0)], 0.9)
    assert constraint.surely_violated()


class Model:
    """A model of so many layers under a controller. A layer's share of tokens falls, in its logarithm, by the weight it
    gets times its own ease, which differ 15-fold, and by its neighbours' a little; a step later. The task loses `cost`
    times what the mean share is below `needs`. Guard answers are drawn with that probability, from an average of the
    state over 50 steps, as of averaged weights."""

    def __init__(self, layers: int, needs: float, cost: float, steps: int) -> None:
        self.random = np.random.default_rng(layers)
        self.logs = np.log(np.linspace(0.95, 0.8, layers))
        self.averaged = self.logs.copy()
        self.ease = 0.004 * np.geomspace(1 / 15, 1, layers)[::-1]
        self.needs, self.cost, self.steps = needs, cost, steps
        self.weights = np.zeros(layers)
        self.controller = EfficiencyController(
            settings(weight=1.0, max_accuracy_drop=0.005, target=0.18, target_at=0.35), layers, {}, steps
        )  # fmt: skip

    def step(self, number: int) -> float:
        delayed, noise = self.weights, self.random.normal(0, 0.01, len(self.logs))
        push = self.ease * delayed
        self.logs = np.minimum(self.logs - push - 0.1 * push.mean() + noise * 0.3, 0.0)
        self.averaged += 0.02 * (self.logs - self.averaged)
        kept = float(np.exp(self.averaged).mean())
        probability = min(max(self.cost * (self.needs - kept), 0.0), 1.0)
        lost = self.random.random(10) < probability + 0.01
        gained = (
            self.random.random(10) < 0.01
        )  # answers that come out otherwise both ways, as they do
        answers = [Judged("a", float(x) - float(y), 0.0, kept) for x, y in zip(lost, gained, strict=True)]  # fmt: skip
        check = Check("a", "a/k", 0.0, tuple(np.exp(self.logs + noise).clip(0.001, 1).tolist()))
        self.controller.update([check], number / self.steps, answers)
        self.weights = self.controller.layer_weights(["a"])[:, 0].numpy()
        return float(np.exp(self.logs).mean())


@pytest.mark.parametrize("layers", [4, 28, 36])
def test_tokens_fall_to_the_target_where_nothing_is_lost(layers):
    model = Model(layers, needs=0.0, cost=0.0, steps=1000)
    kept = [model.step(n) for n in range(1000)]
    assert np.mean(kept[700:]) == pytest.approx(0.18, abs=0.02)
    assert max(kept[700:]) - min(kept[700:]) < 0.04
    assert np.exp(model.logs).max() < 0.25  # no layer is left behind


@pytest.mark.parametrize("layers", [4, 28, 36])
@pytest.mark.parametrize("needs", [0.4, 0.7])
def test_tokens_come_to_rest_where_the_promise_is_held(layers, needs):
    """The task loses half a point where it keeps `needs` - 0.005 / 0.5 of its tokens."""
    model = Model(layers, needs=needs, cost=0.5, steps=2000)
    kept = [model.step(n) for n in range(2000)]
    end = kept[1400:]
    assert np.mean(end) == pytest.approx(needs, abs=0.07)
    assert max(end) - min(end) < 0.15  # it does not swing
