"""What a summary says of the accuracy constraint."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from zipr1.core import activity
from zipr1.core.recipe import Data, Efficiency, Recipe
from zipr1.data.digits.tasks import MIX
from zipr1.train.progress import constraint_lines
from zipr1.train.summary import judge, measure


def block(difference: float, half: float, n: int) -> dict:
    return {
        "difference": difference,
        "difference_ci": [difference - half, difference + half],
        "after": {"n": n},
    }


def test_each_task_is_judged_and_all_by_their_shares():
    recipe = Recipe(
        data=Data(mix={"digits": 0.75, "moving_digits": 0.25}),
        efficiency=Efficiency(max_accuracy_drop=0.005),
    )
    tasks = {"digits": block(0.001, 0.00196, 2000), "moving_digits": block(-0.03, 0.0196, 500)}
    summary: dict = {"by_task": tasks, "constraint": {}}
    judge(summary, recipe)
    held, lost = (tasks[name]["constraint"] for name in recipe.data.mix)
    assert (held["verdict"], held["lost"], held["n"]) == ("held", -0.001, 2000)
    assert held["error"] == pytest.approx(0.001, rel=1e-4) and held["allowed"] == 0.005
    # Lost for sure: 0.03 - 1.645 * 0.01 is above 0.005.
    assert lost["verdict"] == "violated" and lost["questions"] is None
    # Three quarters and one quarter of the losses and errors.
    both = summary["constraint"]
    assert both["lost"] == pytest.approx(0.75 * -0.001 + 0.25 * 0.03) and both["n"] == 2500
    assert both["error"] == pytest.approx(math.hypot(0.75 * 0.001, 0.25 * 0.01), rel=1e-4)
    assert both["verdict"] == "not shown" and both["questions"] is None


def test_without_a_constraint_nothing_is_said():
    summary: dict = {"by_task": {"digits": block(0.0, 0.01, 10)}, "constraint": {}}
    judge(summary, Recipe(efficiency=Efficiency(max_accuracy_drop=None)))
    assert summary["constraint"] == {} and "constraint" not in summary["by_task"]["digits"]


def test_a_line_says_it():
    summary: dict = {"by_task": {"digits": block(-0.001, 0.0098, 400)}, "constraint": {}}
    judge(summary, Recipe())
    # 400 * (1.64485 * 0.00500009 / 0.004)^2 = 1691.03
    want = (
        "digits: not shown, 0.10 points lost (standard error 0.50), 0.5 allowed; "
        "1,692 questions would show it"
    )
    assert constraint_lines(summary)[0] == want and len(constraint_lines(summary)) == 2
    assert constraint_lines({"by_task": {"digits": {}}}) == []
    for difference, said in ((-0.0, "0.00 points lost"), (0.012, "1.20 points gained")):
        judge(summary := {"by_task": {"a": block(difference, 0.0098, 400)}}, Recipe())
        assert said in constraint_lines(summary)[0]


def test_without_a_mix_the_shares_are_those_of_the_family():
    recipe = Recipe(data=Data(source="digits"))
    tasks = {name: block(-0.01 * i, 0.0, 100 * i) for i, name in enumerate(MIX, start=1)}
    summary: dict = {"by_task": tasks, "constraint": {}}
    judge(summary, recipe)
    want = sum(0.01 * i * share for i, share in enumerate(MIX.values(), start=1))
    assert sum(MIX.values()) == pytest.approx(1) and summary["constraint"]["lost"] == pytest.approx(
        want
    )
    # Rows of one's own count by their number.
    judge(summary, Recipe(data=Data(source="rows.jsonl", heldout="more.jsonl")))
    by_number = sum(0.01 * i * 100 * i for i in (1, 2, 3)) / 600
    assert summary["constraint"]["lost"] == pytest.approx(by_number)


def test_what_comes_after_the_last_question_is_told_too(monkeypatch):
    """Intervals of thousands of questions take seconds."""
    told: list[str] = []
    monkeypatch.setattr(activity, "tell", lambda what, *count: told.append(what))
    policy = SimpleNamespace(parallel=SimpleNamespace(run_unsharded=lambda work, **named: []))
    assert measure(policy, Recipe(), [], [], "held-out, after") == []
    assert told == ["held-out, after", "held-out, after: summing up"]
