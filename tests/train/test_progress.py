"""What people see: progress with and without a terminal, the table, the pictures."""

import io
import re

import pytest
import tinymodels
import tinyruns
from commands import call
from rich.console import Console

from zipr1.train import progress as module
from zipr1.train.progress import Progress, summary_table

METRICS = {
    "reward": 1.25,
    "rewards": {"correct": 0.9, "reduction": 0.35},
    "accuracy": 0.9,
    "dense_accuracy": 0.95,
    "token_ratio": 0.284,
    "kl": 0.0123,
    "multiplier": 0.5,
    "efficiency_weight": 2.0,
    "lr": 1e-4,
}


def console(width=80, terminal=False):
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)


def text(c):
    return c.file.getvalue()


def test_without_a_terminal_about_ten_plain_lines():
    c = console()
    with Progress(c, 100) as progress:
        for step in range(100):
            progress.update(step, METRICS)
    lines = text(c).splitlines()
    assert len(lines) == 11  # the first step, then every tenth
    assert lines[-1].startswith(
        "training 100/100  accuracy 90.0%  tokens kept 28.4%  KL to dense 0.0123"
    )
    assert "\x1b" not in text(c)


def test_the_time_split_says_what_the_step_waited_for():
    seconds = {"data": 0.1, "vision": 0.4, "rollout": 0.5, "update": 1.0}
    c = console(120, terminal=True)
    with Progress(c, 2) as progress:
        progress.update(0, {**METRICS, "seconds": seconds})
    for part, share in {"data": "5.0%", "vision": "20.0%", "update": "50.0%"}.items():
        assert re.search(rf"time: {part} +{share}", text(c))
    c = console()
    with Progress(c, 1) as progress:
        progress.update(0, {**METRICS, "seconds": seconds})
    assert "data 5.0% of the time" in text(c)


def test_resumed_progress_counts_its_own_steps():
    c = console()
    with Progress(c, 20, start=16) as progress:
        progress._began -= 8
        progress.update(16, METRICS)
        assert progress.seconds_per_step == pytest.approx(8, abs=0.5)
    assert "17/20" in text(c)
    assert "24 s left" in text(c)


def test_what_came_before_the_first_step_is_not_its_time():
    with Progress(console(), 20) as progress:
        progress._began -= 100  # the rehearsal
        progress.begin()
        progress._began -= 2
        progress.update(0, METRICS)
        assert progress.seconds_per_step == pytest.approx(2, abs=0.5)


def test_the_time_runs_within_a_step(monkeypatch):
    """Two of six steps in 20 s: 40 s left, less with each second of the third one, until it is late."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    progress = Progress(console(terminal=True), 6)
    now[0] = 104
    assert progress._left() == "first step: 4 s"
    progress.done, progress._last = 2, 120.0
    said = []
    for now[0] in (120, 123, 129, 140):
        said.append(progress._left())
    assert said == ["40 s left", "37 s left", "31 s left", "30 s left"]
    progress.done, progress._last = 6, 160.0
    now[0] = 170
    assert progress._left() == "0 s left"


def test_what_is_told_within_a_long_step_has_the_form_of_the_lines(monkeypatch):
    """Each line that is printed was told word for word, so that a line a minute is no second form of it."""
    told = []
    monkeypatch.setattr(module.activity, "tell", told.append)
    c = console()
    with Progress(c, 20) as progress:
        for step in range(20):
            progress.update(step, METRICS)
    assert told[0] == "training 0/20" and told[-1] == "" and len(told) == 22
    assert [line.split("  ")[0] for line in told[1:-1]] == [
        f"training {n}/20" for n in range(1, 21)
    ]
    assert told[1].startswith(
        "training 1/20  accuracy 90.0%  tokens kept 28.4%  KL to dense 0.0123"
    )
    printed = text(c).splitlines()
    assert len(printed) == 11 and set(printed) <= set(told)


def test_a_dumb_terminal_is_told_lines_too():
    """It cannot draw a display anew: nothing would be seen before the end."""
    c = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    with Progress(c, 2) as progress:
        progress.update(0, METRICS)
        assert text(c).startswith("training 1/2")


@pytest.mark.parametrize("width", [80, 120])
def test_live_view_fits_and_shows_everything(width):
    c = console(width, terminal=True)
    progress = Progress(c, 300)
    progress.done, progress._metrics = 120, METRICS
    c.print(progress._view())
    lines = text(c).splitlines()
    assert max(map(len, lines)) <= width
    for word in ("120/300", "left", "reward: reduction", "tokens kept", "28.4%", "1.00e-04"):
        assert word in text(c)
    assert "…" not in text(c)


LOOK = {
    "guard": {"sums": {"lost": 0.012, "error": 0.004, "drift": 0.003, "drift_error": 0.002}},
    "heldout_mass": 0.91,
    "grad_clipped": 0.8,
    "sampler_mismatch": 2e-7,
    "answer_tokens": 3.5,
    "diagnosis": {
        "window": 0.15,
        "first_token": 0.4,
        "top_token": 0.5,
        "gradients": {"policy_gradient": 1.5, "kl": 7.25},
        "by_layer": {"sums": {"kept": [0.5, 0.2], "set_point": [0.4, 0.25]}},
    },
}


@pytest.mark.parametrize("width", [80, 120])
def test_a_look_inside_stays_in_the_live_view(width):
    """The step after it has none of its own. Of two layers one is 10 points off its set point, the other 5."""
    c = console(width, terminal=True)
    progress = Progress(c, 300)
    progress.update(0, {**METRICS, **LOOK})
    progress.update(1, METRICS | {"guard": LOOK["guard"]})
    c.print(progress._view())
    lines = text(c).splitlines()
    assert max(map(len, lines)) <= width and "…" not in text(c)
    for label, value in {
        "sums, lost": "1.2±0.4",
        "sums, p = 1": "0.3±0.2",
        "tokens in the window": "15.0%",
        "mass of first token": "40.0%",
        "norm: policy gradient": "1.5000",
        "norm: KL": "7.2500",
        "layers off their set point": "10.0 pts",
    }.items():
        assert re.search(rf"{re.escape(label)} +{re.escape(value)}", text(c)), label


def test_a_plain_log_has_a_line_for_each_look_inside():
    c = console()
    with Progress(c, 100) as progress:
        for step in range(100):
            progress.update(step, METRICS | (LOOK if step % 20 == 0 else {}))
    looks = [line for line in text(c).splitlines() if line.startswith("inside, step ")]
    assert [line.split(":")[0].split()[-1] for line in looks] == ["1", "21", "41", "61", "81"]
    for part in (
        "held-out mass 91.0%",
        "sums, lost 1.2±0.4",
        "norm: KL 7.2500",
        "answer tokens 3.5",
    ):
        assert part in looks[0]


def test_live_display_is_closed_by_an_error():
    c = console(terminal=True)

    def fail():
        with Progress(c, 3) as progress:
            progress.update(0, METRICS)
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        fail()
    assert "1/3" in text(c)
    assert text(c).endswith("\x1b[?25h")  # the cursor is back


def on_screen(written, width=80):
    """What stands on a terminal in the end, of what a command wrote and a keyboard echoed."""
    lines, row, column = [""], 0, 0
    for code, number, kind, char in re.findall(r"(\x1b\[([0-9;?]*)([A-Za-z]))|(.|\n)", written):
        if kind == "A":
            row = max(0, row - int(number or 1))
        elif kind == "K":
            lines[row] = "" if number == "2" else lines[row][:column]
        elif char == "\r":
            column = 0
        elif not code:
            if char == "\n" or column == width:  # a full line goes on in the next one
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            if char != "\n":
                lines[row] = f"{lines[row][:column]:{column}}{char}{lines[row][column + 1 :]}"
                column += 1
    return [line.rstrip() for line in lines]


def test_ctrl_c_leaves_the_progress_on_the_screen_once():
    c = console(terminal=True)

    def stopped():
        with Progress(c, 3) as progress:
            progress.update(0, METRICS)
            progress.update(1, METRICS)
            c.file.write("^C")  # what the terminal echoes, where the cursor is
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    c.print("error: interrupted")
    shown = on_screen(text(c))
    assert len([line for line in shown if "training" in line]) == 1 and "2/3" in shown[0]
    assert len([line for line in shown if "tokens kept" in line]) == 1
    assert shown[-2] == "error: interrupted" and shown[-1] == ""


def test_a_run_that_goes_on_says_from_which_step(tmp_path):
    tinymodels.make().save(tmp_path / "model")
    recipe, run = tinyruns.write(tmp_path / "r.yaml", tmp_path / "model"), tmp_path / "run"
    code, said = call("train", recipe, "-o", run, "--device", "cpu")
    assert code == 0 and "goes on" not in said
    code, said = call("train", recipe, "train.steps=4", "-o", run, "--device", "cpu")
    assert code == 0 and f"run: {run}, which goes on after step 3 of 4; watch it:" in said
    assert "training 4/4" in said and "training 1/4" not in said


@pytest.mark.parametrize("width", [80, 120])
def test_summary_table(width):
    block = {
        "before": {
            "accuracy": 0.973,
            "accuracy_ci": [0.961, 0.985],
            "token_ratio": 0.834,
            "n": 500,
        },
        "after": {"accuracy": 1.0, "accuracy_ci": [0.9923, 1.0], "token_ratio": 0.281, "n": 500},
        "dense_accuracy": 0.974,
    }
    summary = {
        **block,
        "by_task": {"digits": block, "moving_digits": block},
        "model": "tiny",
        "steps": 300,
        "seconds": 183.2,
        "p": 0.975,
    }
    c = console(width)
    c.print(summary_table(summary))
    out = text(c)
    assert "tiny, 300 steps, 3 min 3 s, p = 0.975" in out
    assert "97.3% (96.1-98.5)" in out
    assert "100.0% (99.2-100)" in out
    assert out.count("28.1%") == 3
    assert out.index("moving_digits") < out.index("all")
    assert "…" not in out
    c.print(summary_table({"after": {"accuracy": 0.5}}))  # a run without `before`
