"""Which run and which checkpoint is meant, and what is said of a run that did not finish."""

import os
from pathlib import Path

import pytest

from zipr1.core.errors import InputError
from zipr1.core.load import validate
from zipr1.core.rundir import RunDir
from zipr1.core.runs import checkpoint_of, find_model, how_it_stopped, run_of


def write(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_text("x")


def make(root: Path, steps: int, done: int, age: int) -> Path:
    run = RunDir.open(validate({"train": {"steps": steps}}), root)
    run.save_checkpoint(done - 1, write, best=True)
    run.save_checkpoint(done, write)
    if done == steps:
        run.write_summary({"steps": steps})
    os.utime(root / "last", (age, age))
    return root


def test_the_last_run_is_a_finished_one_or_it_is_said_that_it_is_not(tmp_path):
    assert find_model("x", tmp_path) == ("x", "model: x")
    assert find_model(None, tmp_path)[0] == "tiny"
    stopped = make(tmp_path / "stopped", 60, 9, 300)
    model, said = find_model(None, tmp_path)
    assert model == str(stopped) and "the last run, which stopped at step 9 of 60" in said
    assert find_model(str(stopped), tmp_path)[1].endswith("this run stopped at step 9 of 60")
    old, new = make(tmp_path / "old", 5, 5, 100), make(tmp_path / "new", 5, 5, 200)
    model, said = find_model(None, tmp_path)
    assert model == str(new) and f"{stopped} is newer and stopped at step 9 of 60" in said
    os.utime(old / "checkpoints/step-000005", (400, 400))
    assert find_model(None, tmp_path) == (
        str(old), f"model: {old}, the last run (choose with --model)"
    )  # fmt: skip


def test_a_finished_run_with_more_steps_to_go_is_not_finished(tmp_path):
    run = make(tmp_path / "run", 5, 5, 100)
    assert how_it_stopped(run) == ""
    RunDir.open(validate({"train": {"steps": 8}}), run)
    assert how_it_stopped(run) == "stopped at step 5 of 8"


def test_checkpoints_by_name(tmp_path):
    run = make(tmp_path / "run", 5, 5, 100)
    assert checkpoint_of(run, "best").resolve().name == "step-000004"
    assert checkpoint_of(run, "last").resolve().name == "step-000005"
    assert checkpoint_of(run, "4") == run / "checkpoints/step-000004"
    for path in (run, run / "best", run / "last", run / "checkpoints/step-000004"):
        assert run_of(path).resolve() == run
    assert run_of(tmp_path) is None and run_of(run / "checkpoints") is None
    with pytest.raises(InputError, match=r"--checkpoint 3: not in .*; there: best, last, 4, 5"):
        checkpoint_of(run, "3")
    with pytest.raises(InputError, match="give best, last, or the number of a step"):
        checkpoint_of(run, "newest")
    with pytest.raises(InputError, match="is no run"):
        checkpoint_of(tmp_path, "best")
