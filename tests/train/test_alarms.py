"""What stops a run, and what must not; and how a stopped run ends."""

from __future__ import annotations

import json

import pytest
import tinymodels
from commands import call
from tinyruns import steps, write

from zipr1.core.recipe import Recipe
from zipr1.train import alarms
from zipr1.train.alarms import trouble

RECIPE = Recipe(
    train={"steps": 400}, efficiency={"target": 0.2}, optim={"warmup": 0.1}, sparse={"p": 0.9}
)


def off(**changes):
    """The recipe with some alarms at another bound, or off."""
    bounds = RECIPE.alarms.model_copy(update=changes)
    return RECIPE.model_copy(update={"alarms": bounds})


def rows(count, **values):
    """Steps 0 to count - 1 of a run without trouble. values: by name, of a step's number, what is otherwise."""
    out = []
    for step in range(count):
        ratio = max(0.2, 0.9 - 0.005 * step)
        row = {
            "step": step,
            "heldout_mass": 0.95 - 0.0003 * step,
            "inference": {"a": {"token_ratio": ratio}, "b": {"token_ratio": ratio}},
            "set_point": {"a": ratio, "b": ratio},
            "guard": {"a": {"drift": 0.004, "drift_error": 0.004}},
        }
        if step % 10 == 0:
            row["diagnosis"] = {"top_token": 0.3}
        row |= {name: value(step) for name, value in values.items()}
        out.append(row)
    return out


def never(made, recipe=RECIPE):
    return all(trouble(made[:n], recipe) is None for n in range(len(made) + 1))


def first(made, recipe=RECIPE):
    """The number of steps after which the run is stopped, and the line."""
    found = ((n, trouble(made[:n], recipe)) for n in range(len(made) + 1))
    return next(((n, line) for n, line in found if line), None)


def test_a_run_without_trouble_is_never_stopped():
    assert never(rows(400))
    assert never([{"step": n, "loss": 1.0, "accuracy": 0.5} for n in range(400)])
    supervised = RECIPE.model_copy(
        update={"train": RECIPE.train.model_copy(update={"stage": "supervised"})}
    )
    assert never(rows(400, heldout_mass=lambda n: 0.1 if n > 50 else 0.9), supervised)


def guard(drift, error=0.004):
    return {"guard": lambda n: {"a": {"drift": drift(n), "drift_error": error}}}


def test_drift_that_stays_in_the_second_half_stops():
    """Three points lost, 2 * 0.4 of them noise: sure. Of 400 steps the second half begins with step 200, and a tenth
    of the run, 40 steps, must agree."""
    made = rows(400, **guard(lambda n: 0.03))
    done, line = first(made)
    assert done == 240
    assert line.startswith(
        "with all tokens (p = 1) a loses 3.0 points (standard error 0.4) against the untouched base, and "
        "alarms.max_drift (null: off) allows 1; lower optim.lr (1e-05)"
    )
    assert never(made, off(max_drift=None)) and never(made, off(max_drift=0.03))


def test_drift_that_comes_back_or_is_not_sure_stops_nothing():
    assert never(rows(400, **guard(lambda n: 0.05 if n < 230 else 0.009)))
    assert never(
        rows(400, **guard(lambda n: 0.06 - 0.0001 * n))
    )  # 2 points still, but fewer all the time
    assert never(rows(400, **guard(lambda n: 0.03, error=0.011)))
    assert never(rows(400, **guard(lambda n: 0.03 if n % 30 else 0.01)))


def test_one_token_that_takes_the_mass_stops():
    mass = {"diagnosis": lambda n: {"top_token": 0.5 if n < 100 else 0.93}}
    made = [
        row if n % 10 == 0 else {**row, "diagnosis": None}
        for n, row in enumerate(rows(200, **mass))
    ]
    for row in made:
        if row["diagnosis"] is None:
            del row["diagnosis"]
    done, line = first(made)
    assert done == 111  # the diagnoses of steps 100 and 110
    assert line.startswith("one token holds 93.0% of the score mass (50.0% at the start)")
    assert "alarms.max_token_mass (null: off) allows 90.0%; lower efficiency.weight" in line
    assert never(made, off(max_token_mass=None))
    for row in made:
        if "diagnosis" in row:
            row["diagnosis"] = {"top_token": 0.93}  # the model came like this
    assert never(made)
    assert never(rows(50, diagnosis=lambda n: {}))  # a rule that reads no scores


def test_kept_tokens_that_hold_little_for_other_probes_stop():
    made = rows(200, heldout_mass=lambda n: 0.95 if n < 100 else 0.75 + 0.01 * (n % 2))
    done, line = first(made)
    assert 100 < done <= 120
    assert (
        "of the score mass of probes that took no part in the choice (95.0% at the start)" in line
    )
    assert "alarms.min_heldout_mass (null: off) is 80.0%; raise sparse.probes.random (64)" in line
    assert never(made, off(min_heldout_mass=None))
    assert never(rows(200, heldout_mass=lambda n: 0.7))  # from the start
    assert never(rows(200, heldout_mass=lambda n: 0.95 if n < 100 else 0.6 + 0.39 * (n % 2)))
    free = RECIPE.model_copy(
        update={"efficiency": RECIPE.efficiency.model_copy(
            update={"target": None, "max_accuracy_drop": None}
        )}
    )  # fmt: skip
    assert never(made, free)  # sampled answers below the inference p hold less


def kept(start, end, points):
    return {
        "inference": lambda n: {"a": {"token_ratio": start if n < 10 else end}},
        "set_point": lambda n: {"a": points(n)},
    }


def test_a_kept_share_that_does_not_move_stops():
    """Warm-up ends with step 40 of 400, so at step 50; the schedule asks for a fifth less since step 20."""
    made = rows(80, **kept(0.9, 0.88, lambda n: 0.9 if n < 20 else 0.72))
    done, line = first(made)
    assert done == 50
    assert line == (
        "the kept share of a is 88.0% after 50 steps and was 90.0%, and alarms.min_movement (null: off) asks for 5.0% "
        "less; raise optim.lr (1e-05), or lower budgets.low (0.9375)"
    )
    late = rows(80, **kept(0.9, 0.88, lambda n: 0.9 if n < 40 else 0.72))
    assert first(late)[0] == 60
    slow = RECIPE.model_copy(update={"optim": RECIPE.optim.model_copy(update={"warmup": 0.15})})
    assert first(made, slow)[0] == 60
    assert never(made, off(min_movement=None))


def test_a_kept_share_that_need_not_move_stops_nothing():
    assert never(rows(80, **kept(0.9, 0.84, lambda n: 0.72)))  # it has moved, by 6.7 %
    assert never(
        rows(80, **kept(0.9, 0.9, lambda n: 0.82))
    )  # held back by the constraint, or a long run
    assert never(rows(80, **kept(0.2, 0.2, lambda n: 0.2)))  # sparse from the start
    assert never(rows(80, set_point=lambda n: {}))  # no target


@pytest.mark.parametrize("name", ["tiny", "tiny_base"])
def test_shipped_recipes_have_all_alarms_or_need_none(name):
    from zipr1.core.load import load

    made = load(f"recipes/{name}.yaml")
    assert all(value is not None for value in made.alarms.model_dump().values())


def test_a_stopped_run_keeps_its_last_step_and_goes_on(tmp_path, monkeypatch):
    """The rule is a stand-in, all else is real: one line, exit code 1, a checkpoint, the page, and the way to go on."""
    tinymodels.make().save(tmp_path / "model")
    recipe, run = write(tmp_path / "r.yaml", tmp_path / "model"), tmp_path / "run"
    text = "p = 1 loses 3 points, 1 allowed; lower optim.lr"
    monkeypatch.setattr(
        alarms, "trouble", lambda made, r: text if len(made) == 2 and r.alarms.max_drift else None
    )
    code, said = call("train", recipe, "train.save_every=0", "-o", run, "--device", "cpu")
    assert code == 1
    (line,) = [line for line in said.splitlines() if text in line]
    assert line.endswith(f"stopped: {text}; step 2 is saved; go on with --resume {run}")
    assert (run / "last").resolve().name == "step-000002" and len(steps(run)) == 2
    page = (run / "report.html").read_text()
    assert "Stopped at step 2 of 3" in page and f"It went wrong: {text}." in page
    assert not (run / "summary.json").exists()
    more = ("train.save_every=0", "alarms.max_drift=null")
    code, said = call("train", recipe, *more, "-o", run, "--device", "cpu")
    assert code == 0 and len(steps(run)) == 3
    assert json.loads((run / "run.json").read_text())["resumed"][0]["from_step"] == 2
