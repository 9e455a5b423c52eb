"""A run's curves: the numbers that they show, what is wanted, and held-out questions."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from zipr1.core import curves
from zipr1.core.curves import Panel, panels, smooth
from zipr1.core.recipe import Efficiency, Recipe, Sparse, Train

RECIPE = Recipe(
    sparse=Sparse(p=0.9),
    train=Train(steps=4),
    efficiency=Efficiency(target=0.2, target_at=0.5, max_accuracy_drop=0.01),
)


def rows(count, **values):
    base = {
        "token_ratio": 0.6,
        "accuracy": 0.7,
        "dense_accuracy": 0.9,
        "sparse_accuracy": 0.8,
        "kl": 0.1,
        "loss": 1.0,
    }
    inference = {"a": {"token_ratio": 0.9, "gap": 0.0}, "b": {"token_ratio": 0.7, "gap": 0.1}}
    return [{"step": i, **base, "inference": inference, **values} for i in range(count)]


def test_smooth_is_a_running_mean():
    assert smooth(np.array([0.0, 3.0, 6.0, 9.0]), 3) == pytest.approx([1.5, 3.0, 6.0, 7.5])
    assert smooth(np.array([1.0, np.nan, 3.0]), 3) == pytest.approx([1.0, 2.0, 3.0])


def test_a_curve_shows_each_step_and_a_running_mean():
    """Of 60 steps: a window of 60 / 20 = 3, cut at the ends; a step without the value is a gap. Steps count from 1."""
    some = [{"step": i, "kl": 3.0 * i} for i in range(60)]
    del some[30]["kl"]
    (panel,) = panels(some, Recipe(), {})
    ax = curves._figure([panel], curves._steps(some)).axes[0]
    pale, strong = ax.lines
    assert list(pale.get_xdata()) == list(strong.get_xdata()) == list(range(1, 61))
    assert np.isnan(pale.get_ydata()[30]) and pale.get_ydata()[29] == 87
    assert list(strong.get_ydata()[[0, 1, 30, 59]]) == [1.5, 3, 90, 175.5]
    assert strong.get_ydata()[31] == (93 + 96) / 2
    assert ax.get_legend() is None


def test_the_target_of_a_very_long_run_is_drawn_by_few_points():
    """As many as a recipe may have: they would be 8 GB."""
    long = RECIPE.model_copy(update={"train": Train(steps=10**9)})
    tokens, *_ = panels(rows(2), long, {})
    ((x, y, _),) = tokens.guides
    assert len(x) <= 500 and (x[0], x[-1]) == (1, 10**9)
    assert y[0] == pytest.approx(0.8) and y[-1] == pytest.approx(0.2)


def test_what_is_wanted_and_what_is_held_out():
    """Two tasks that keep 0.9 and 0.7 start at 0.8; half of the four steps lead to a quarter of it, 0.2. One point may
    be lost."""
    heldout = {"dense": {"accuracy": 0.95}, "before": {"accuracy": 0.94, "token_ratio": 0.85}}
    tokens, right, *_ = panels(rows(2), RECIPE, heldout)
    ((x, y, label),) = tokens.guides
    assert list(x) == [1, 2, 3, 4] and y == pytest.approx([0.8, 0.4, 0.2, 0.2])
    assert label == "target 20%"
    assert tokens.marks == [(0, 0.85, "held-out")] and right.marks == [(0, 0.94, "held-out")]
    ((x, y, label),) = right.guides
    assert list(x) == [1, 2] and y == pytest.approx([0.89, 0.89])
    assert label == "dense less the 1 points allowed"
    after = heldout | {"after": {"accuracy": 0.9, "token_ratio": 0.3}}
    assert panels(rows(2), RECIPE, after)[0].marks[1] == (4, 0.3, "held-out")
    free = Recipe(efficiency=Efficiency(max_accuracy_drop=None))
    assert not any(panel.guides for panel in panels(rows(2), free, {}))


def test_no_panel_is_empty_and_a_lonely_one_is_wide(tmp_path):
    figure = curves._figure(panels(rows(3, reward=1.0), RECIPE, {}), np.arange(1, 4))
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == ["Tokens kept", "Right answers", "KL to the dense model", "Loss", "Reward"]
    widths = [ax.get_subplotspec().colspan for ax in figure.axes]
    assert [len(w) for w in widths] == [1, 1, 1, 1, 2]
    assert all(ax.lines for ax in figure.axes)
    path = curves.curves(rows(3), RECIPE, {}, tmp_path / "curves.png")
    assert Image.open(path).width == 1196  # two panels of 4.6 inches at 130 dots
    assert curves.curves([], RECIPE, {}, tmp_path / "none.png") is None
    assert curves.curves([{"step": 0, "loss": None}], RECIPE, {}, tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("count", [2, 5])
def test_steps_are_whole(count):
    figure = curves._figure(panels(rows(count), RECIPE, {}), np.arange(1, count + 1))
    for ax in figure.axes:
        figure.canvas.draw()
        assert all(float(tick).is_integer() for tick in ax.get_xticks())


def test_a_single_step_is_no_curve():
    assert panels(rows(1), RECIPE, {}) == [] and curves.drawings(rows(1), RECIPE, {}) == []


def test_half_a_point_is_no_cliff():
    panel = Panel("Right answers", [(np.array([0.99, 0.985]), "a", "C0")], share=True)
    ax = Figure().subplots()
    curves._draw(ax, panel, np.array([1, 2]))
    low, high = ax.get_ylim()
    assert high - low >= 0.2 and high < 1.02


def test_layers_before_and_now():
    assert curves.layers([0.9], [0.3], "now") is None  # a single layer is a single point
    assert curves.layers(None, None, "now") is None
    assert curves.layers([0.9, 0.8], [0.3, 0.2], "now").startswith("<svg")
    assert curves.layers(None, [0.3, 0.2], "now").startswith("<svg")


def test_what_guard_questions_and_looks_inside_say():
    """Two tasks, and a look at steps 0, 2 and 4: a straight line between them. Of three layers the first is 10 points
    above its set point and the last 20 below, in the mean of two tasks."""
    some = rows(5, allowed=0.01, informative=0.25, truncated=0.5)
    for n, row in enumerate(some):
        row["guard"] = {
            "a": {"lost": 0.01 * n, "error": 0.1, "drift": 0.02},
            "b": {"lost": 0.0, "error": 0.1, "drift": -0.01},
        }
        if n % 2 == 0:
            layers = {
                "a": {"kept": [0.6, 0.5, 0.2], "set_point": [0.5, 0.5, 0.5]},
                "b": {"kept": [0.6, 0.5, 0.4], "set_point": [0.5, 0.5, 0.5]},
                "c": {"kept": [0.9, 0.9, 0.9]},
            }
            row["diagnosis"] = {"window": 0.1 * n, "gradients": {"kl": 3.0 + n}, "by_layer": layers}
    found = {panel.title: panel for panel in panels(some, RECIPE, {})}

    def drawn(title):
        return {label: values.tolist() for values, label, _ in found[title].lines}

    assert drawn("Points lost on guard questions") == {
        "a": pytest.approx([0, 1, 2, 3, 4]), "b": [0] * 5
    }  # fmt: skip
    ((_, allowed, label),) = found["Points lost on guard questions"].guides
    assert label == "allowed" and allowed == pytest.approx([1] * 5)
    assert drawn("Points lost with all tokens (p = 1)")["b"] == pytest.approx([-1] * 5)
    assert drawn("Gradient of each loss alone, norm") == {"kl": [3, 4, 5, 6, 7]}
    assert drawn("Where the scores lie") == {
        "tokens in the window": pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    }
    gaps = drawn("Layers off their set point, in points")
    assert gaps["most above"] == pytest.approx([10] * 5)
    assert gaps["most below"] == pytest.approx([-20] * 5)
    assert drawn("Groups and answers")["truncated answers"] == [0.5] * 5
    assert all(text.startswith("<svg") for text in curves.drawings(some, RECIPE, {}))
