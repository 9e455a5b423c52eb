"""The target's controller by hand."""

from __future__ import annotations

import json

import pytest

from zipr1.core.recipe import Controller, Efficiency
from zipr1.train.controller import Check, EfficiencyController


def checks(task: str, *gaps: float, ratios=(0.5, 0.5)) -> list[Check]:
    return [Check(task, f"{task}/k", gap, tuple(ratios)) for gap in gaps]


def weights(controller: EfficiencyController, task: str) -> list[float]:
    return controller.layer_weights([task])[:, 0].tolist()


def test_without_checks_every_layer_has_the_weight_of_the_recipe():
    free = Efficiency(weight=2.0, max_accuracy_drop=None)
    controller = EfficiencyController(free, 3)
    assert controller.layer_weights(["a"]).tolist() == [[2.0]] * 3
    controller.update(None, 0.0)
    assert controller.layer_weights(["a"]).tolist() == [[2.0]] * 3
    assert controller.metrics() == {"efficiency_weight": 2.0, "set_point": {}}
    # A loss without a constraint is remembered and changes nothing.
    controller.update(checks("a", 1.0, ratios=(0.5, 0.5, 0.5)), 0.5)
    assert weights(controller, "a") == [2.0, 2.0, 2.0] and controller.penalty_scale("a") == 1.0
    assert controller.answer_weights(["a", "b"]).tolist() == [1.0, 1.0]


def target(**more) -> Efficiency:
    return Efficiency(weight=1.0, max_accuracy_drop=None, target=0.2, target_at=0.5, **more)


def test_layers_are_pressed_by_their_distance_from_the_schedule():
    controller = EfficiencyController(target(), 2)
    controller.update(checks("a", 0.0, ratios=(0.8, 0.8)), 0.0)
    assert weights(controller, "a") == [0.0, 0.0]
    # Half of the way, in the logarithm: 0.8 -> 0.4 at a quarter of the run, 0.2 from its half on.
    controller.update(checks("a", 0.0, ratios=(0.7, 0.3)), 0.25)
    assert weights(controller, "a") == pytest.approx([0.3 * (0.5 + 10), 0.0], abs=1e-5)
    # A layer at or ahead of the schedule is not pressed, and what had added up decays.
    controller.state["sum"]["a"][1] = 2.0
    controller.update(checks("a", 0.0, ratios=(0.5, 0.19)), 0.75)
    assert controller.state["sum"]["a"][1] == pytest.approx(2.0 * 0.9)
    assert weights(controller, "a") == pytest.approx([0.3 * 0.5 + 0.3 * (0.5 + 10), 0.0], abs=1e-5)


def test_it_goes_on_from_what_a_checkpoint_holds():
    one, state = EfficiencyController(target(), 2), {}
    two = EfficiencyController(target(), 2, state)
    for step in range(4):
        now = checks("a", 0.5, ratios=(0.9 - 0.1 * step, 0.8))
        one.update(now, step / 4)
        two.update(now, step / 4)
        # The checkpoint's key `pressure`; each step makes a new controller from it.
        assert json.loads(json.dumps(state)) == state
        two = EfficiencyController(target(), 2, json.loads(json.dumps(state)))
        state = two.state
    assert one.state == two.state and one.state["sum"]["a"][0] > 0


def test_a_lasting_distance_adds_up_and_is_bounded():
    controller = EfficiencyController(target(), 2)
    for _ in range(1000):
        controller.update(checks("a", 0.0, ratios=(0.9, 0.1)), 0.9)
    assert weights(controller, "a") == pytest.approx([30 + 10 * 0.7, 0.0])


def held(**more) -> Efficiency:
    return target().model_copy(update={"max_accuracy_drop": 0.01, **more})


def test_under_a_constraint_a_layer_follows_how_far_its_task_has_been_let():
    """fallen = 0.5 of the way from 0.8 to 0.2, in the logarithm: 0.4, whatever the time."""
    state = {"fallen": {"a": 0.5}, "start": {"a": [0.8, 0.8]}, "sum": {"a": [0.0, 0.0]}}
    controller = EfficiencyController(held(), 2, state, steps=100)
    controller.update(checks("a", 0.0, ratios=(0.7, 0.3)), 0.01)
    assert weights(controller, "a") == pytest.approx([0.3 * (0.5 + 10), 0.0], abs=1e-5)
    free = EfficiencyController(held(target=None), 2, {"fallen": {"a": 0.5}}, steps=100)
    free.update(checks("a", 0.0), 0.01)
    assert weights(free, "a") == [0.5, 0.5]  # without a target the weight itself waits
    assert weights(free, "unknown") == [1.0, 1.0]


def test_a_task_that_nobody_judges_follows_the_clock():
    """At a quarter of the run, half of target_at: 0.4."""
    start = {"start": {"b": [0.8, 0.8]}, "sum": {"b": [0.0, 0.0]}, "fallen": {"a": 0.0}}
    controller = EfficiencyController(held(), 2, start, steps=100)
    controller.update(checks("b", 0.0, ratios=(0.7, 0.3)), 0.25)
    assert weights(controller, "b") == pytest.approx([0.3 * (0.5 + 10), 0.0], abs=1e-5)


def test_tokens_that_are_to_come_back_get_a_weight_of_the_other_sign():
    state = {
        "fallen": {"a": 0.5},
        "back": {"a": True},
        "start": {"a": [0.8, 0.8]},
        "sum": {"a": [2.0, 0.0]},
    }
    controller = EfficiencyController(held(), 2, state, steps=100)
    controller.update(checks("a", 0.0, ratios=(0.3, 0.5)), 0.01)
    # The sum of the layer below its schedule of 0.4 decays by a tenth first, for it pointed down.
    first = 2.0 * 0.9 + 0.5 * -0.1
    assert weights(controller, "a") == pytest.approx([first - 1.0, 0.1 * 0.5 + 1.0], abs=1e-5)
    for _ in range(2000):
        controller.update(checks("a", 0.0, ratios=(0.3, 0.5)), 0.01)
    assert weights(controller, "a") == pytest.approx([-30.0 - 1.0, 30.0 + 1.0])  # bounded alike


def test_a_start_below_the_target_is_left_alone():
    controller = EfficiencyController(target(), 2)
    controller.update(checks("a", 0.0, ratios=(0.1, 0.15)), 0.0)
    controller.update(checks("a", 0.0, ratios=(0.1, 0.15)), 0.9)
    assert weights(controller, "a") == [0.0, 0.0]


def test_kinds_that_lose_are_drawn_more_often():
    controller = EfficiencyController(Efficiency(max_accuracy_drop=None), 2)
    assert controller.kind_weights(30.0) == {}
    controller.update(checks("a", 1.0, 0.0) + checks("b", -1.0), 0.0)
    gap = 0.02 * (1 - 0.02)
    assert controller.kind_weights(30.0) == pytest.approx({"a/k": 1 + 30 * gap, "b/k": 1.0})
    assert controller.kind_weights(0.0) == {}


def test_the_gains_are_those_of_the_recipe():
    gains = Controller(
        proportional=2.0, integral=3.0, integral_max=4.0, decay=0.5, kind_ema_rate=0.25
    )
    controller = EfficiencyController(target(controller=gains), 2)
    controller.update(checks("a", 1.0, ratios=(0.7, 0.7)), 0.9)
    assert weights(controller, "a") == pytest.approx([0.5 * (3 + 2)] * 2)
    assert controller.state["lost"] == {"a/k": 0.25}
    controller.update(checks("a", 0.0, ratios=(0.7, 0.1)), 0.9)
    assert controller.state["sum"]["a"] == pytest.approx([3.0, 0.75])
    controller.update(checks("a", 0.0, ratios=(0.7, 0.1)), 0.9)
    assert weights(controller, "a") == pytest.approx([4.0 + 0.5 * 2, 0.0])
