"""The multiplier by hand."""

from __future__ import annotations

import pytest

from zipr1.constraint import FORGET, constrain
from zipr1.recipe import Efficiency


def test_by_hand():
    settings = Efficiency(weight=3.0, max_accuracy_drop=0.005, step=10.0, max_multiplier=0.1)
    state: dict[str, float] = {}
    # Two questions of `a`, one lost: 0.01 * 1, then 0.01 * (0 - 0.01) on top.
    weight = constrain(settings, state, [("a", 1.0), ("a", 0.0)])
    gap = FORGET * 1.0 * (1 - FORGET)
    assert state["gap/a"] == pytest.approx(gap)
    mu = 10 * (gap - 0.005)
    assert state["multiplier"] == pytest.approx(mu) and weight == pytest.approx(3 / (1 + mu))
    for _ in range(100):
        weight = constrain(settings, state, [("a", 1.0)])
    assert state["multiplier"] == 0.1 and weight == pytest.approx(3 / 1.1)
    for _ in range(2000):
        weight = constrain(settings, state, [("a", 0.0)])
    assert state["multiplier"] == 0.0 and weight == 3.0


def test_a_task_that_gains_does_not_pay_for_one_that_loses():
    settings = Efficiency(weight=1.0, max_accuracy_drop=0.0, step=1.0)
    state: dict[str, float] = {}
    for _ in range(50):
        weight = constrain(settings, state, [("hard", -1.0), ("easy", 1.0)])
    assert state["gap/hard"] < 0 < state["gap/easy"]
    assert weight < 0.2


def test_off():
    assert constrain(Efficiency(weight=2.0, max_accuracy_drop=None), {}, [("a", 1.0)]) == 2.0
    assert constrain(Efficiency(weight=2.0), {}, None) == 2.0
