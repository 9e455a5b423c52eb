"""The constraint's multiplier and the target's controller by hand."""

from __future__ import annotations

import json

import pytest
import torch

from zipr1.core.recipe import Efficiency
from zipr1.train.controller import (
    AT_ONCE,
    EACH_STEP,
    FADE,
    FORGET,
    FORGET_KIND,
    MOST,
    Check,
    draw_weights,
    press,
)


def checks(task: str, *gaps: float, ratios=(0.5, 0.5)) -> list[Check]:
    return [Check(task, f"{task}/k", gap, tuple(ratios)) for gap in gaps]


def test_multiplier_by_hand():
    settings = Efficiency(weight=3.0, max_accuracy_drop=0.005, step=10.0, max_multiplier=0.1)
    state: dict = {}
    # Two questions of `a`, one lost: 0.01 * 1, then 0.01 * (0 - 0.01) on top.
    pressure = press(settings, state, checks("a", 1.0, 0.0), 2, 0.0)
    gap = FORGET * 1.0 * (1 - FORGET)
    assert state["gap"]["a"] == pytest.approx(gap)
    mu = 10 * (gap - 0.005)
    assert pressure.weights["a"].tolist() == pytest.approx([3 / (1 + mu)] * 2)
    assert pressure.relief["a"] == pytest.approx(1 / (1 + mu))
    assert pressure.metrics()["multiplier"] == pytest.approx(mu)
    for _ in range(100):
        pressure = press(settings, state, checks("a", 1.0), 2, 0.0)
    assert state["mu"]["a"] == 0.1 and pressure.relief["a"] == pytest.approx(1 / 1.1)
    for _ in range(2000):
        pressure = press(settings, state, checks("a", 0.0), 2, 0.0)
    assert state["mu"]["a"] == 0.0 and pressure.weights["a"].tolist() == [3.0, 3.0]


def test_a_task_is_held_back_by_its_own_loss_alone():
    settings = Efficiency(weight=1.0, max_accuracy_drop=0.0, step=1.0)
    state: dict = {}
    for _ in range(50):
        pressure = press(settings, state, checks("gains", -1.0) + checks("loses", 1.0), 2, 0.0)
    assert state["gap"]["gains"] < 0 < state["gap"]["loses"]
    assert pressure.relief["gains"] == 1.0 and pressure.relief["loses"] < 0.2
    rows = pressure.rows(["loses", "gains", "loses"])
    assert rows.shape == (2, 3) and rows[0, 1] == 1.0 and rows[0, 0] == rows[0, 2] < 0.2


def test_off():
    free = Efficiency(weight=2.0, max_accuracy_drop=None)
    assert press(free, {}, None, 3, 0.0).rows(["a"]).tolist() == [[2.0]] * 3
    # A loss without a constraint is remembered and changes nothing.
    assert press(free, {}, checks("a", 1.0), 2, 0.5).weights["a"].tolist() == [2.0, 2.0]


def target(**more) -> Efficiency:
    return Efficiency(weight=1.0, max_accuracy_drop=None, target=0.2, reach=0.5, **more)


def test_layers_are_pressed_by_their_distance_from_the_pace():
    settings, state = target(), {}
    start = press(settings, state, checks("a", 0.0, ratios=(0.8, 0.8)), 2, 0.0)
    assert start.weights["a"].tolist() == [0.0, 0.0]
    # Half of the way, in the logarithm: 0.8 -> 0.4 at a quarter of the run, 0.2 from its half on.
    got = press(settings, state, checks("a", 0.0, ratios=(0.7, 0.3)), 2, 0.25)
    assert got.weights["a"].tolist() == pytest.approx([0.3 * (EACH_STEP + AT_ONCE), 0.0], abs=1e-5)
    # A layer at or ahead of the pace is not pressed, and what had added up fades.
    state["sum"]["a"][1] = 2.0
    got = press(settings, state, checks("a", 0.0, ratios=(0.5, 0.19)), 2, 0.75)
    assert state["sum"]["a"][1] == pytest.approx(2.0 * FADE)
    assert got.weights["a"].tolist() == pytest.approx(
        [0.3 * EACH_STEP + 0.3 * (EACH_STEP + AT_ONCE), 0.0], abs=1e-5
    )
    assert json.loads(json.dumps(state)) == state  # it goes into checkpoints


def test_a_lasting_distance_adds_up_and_is_bounded():
    settings, state = target(), {}
    for _ in range(1000):
        got = press(settings, state, checks("a", 0.0, ratios=(0.9, 0.1)), 2, 0.9)
    assert got.weights["a"][0] == pytest.approx(MOST + AT_ONCE * 0.7)
    assert got.weights["a"][1] == 0.0


def test_the_sum_waits_while_answers_are_lost():
    held = target().model_copy(
        update={"max_accuracy_drop": 0.0, "step": 1e9, "max_multiplier": 9.0}
    )
    state: dict = {}
    for _ in range(3):
        got = press(held, state, checks("a", 1.0, ratios=(0.9, 0.9)), 2, 0.9)
    # 3 * 0.7 * EACH_STEP * 0.1, and all of it divided by 1 + 9 once more.
    want = 0.1 * (3 * 0.7 * EACH_STEP * 0.1 + 0.7 * AT_ONCE)
    torch.testing.assert_close(got.weights["a"], torch.full((2,), want))


def test_a_start_below_the_target_is_left_alone():
    state: dict = {}
    press(target(), state, checks("a", 0.0, ratios=(0.1, 0.15)), 2, 0.0)
    got = press(target(), state, checks("a", 0.0, ratios=(0.1, 0.15)), 2, 0.9)
    assert got.weights["a"].tolist() == [0.0, 0.0]


def test_kinds_that_lose_are_drawn_more_often():
    settings, state = Efficiency(max_accuracy_drop=None), {}
    assert draw_weights(30.0, state) == {}
    press(settings, state, checks("a", 1.0, 0.0) + checks("b", -1.0), 2, 0.0)
    gap = FORGET_KIND * (1 - FORGET_KIND)
    assert draw_weights(30.0, state) == pytest.approx({"a/k": 1 + 30 * gap, "b/k": 1.0})
    assert draw_weights(0.0, state) == {}
