"""The page of a run: what it says while the run trains, when it was stopped and at the end; how often it is made."""

import html
import itertools
import re
import shlex
import signal
from typing import Any

import numpy as np
import pytest
import tinymodels
import tinyruns
from commands import call

from zipr1.core import signals
from zipr1.core.recipe import Efficiency, Recipe, Sparse, Train
from zipr1.core.rundir import RunDir
from zipr1.core.types import Prompt
from zipr1.train import loop
from zipr1.train import page as module
from zipr1.train.heldout import Result
from zipr1.train.page import RunPage

RECIPE = Recipe(
    sparse=Sparse(p=0.9), train=Train(steps=4), efficiency=Efficiency(target=0.2, target_at=0.5)
)
NAME = "<b>what</b> [red]is[/red] :eye: 3?"


def prompt(number):
    messages = [{"role": "user", "content": [{"type": "text", "text": f"{NAME} {number}"}]}]
    return Prompt(id=str(number), task="a", messages=messages, media=(), answer=f"right {number}")


PROMPTS = [prompt(i) for i in range(4)]


def result(correct, ratio, said, **more):
    layers = np.tile([ratio + 0.1, ratio - 0.1], (4, 1))
    return Result(
        PROMPTS, np.array(correct, float), np.full(4, ratio), layers, said, kept=[[]] * 4, **more
    )


DENSE = result([1, 1, 1, 0], 1.0, list("abcd"), first_token_ms=30.0, kv_bytes=4096.0)
BEFORE = result([1, 1, 1, 0], 0.9, list("abcd"))
AFTER = result([1, 0, 0, 1], 0.25, list("axyz"), first_token_ms=20.0, kv_bytes=1024.0)


def metrics(ratio):
    return {
        "loss": 1.0, "token_ratio": ratio, "accuracy": 0.5, "dense_accuracy": 1.0, "sparse_accuracy": 0.75,
        "inference": {"a": {"token_ratio": ratio, "gap": 0.0}}, "token_ratio_by_layer": [ratio, ratio],
    }  # fmt: skip


def tiles(text):
    found = re.findall(r'<div class="tile">(.*?)</div>', text)
    clean = [re.sub(r"<[^>]+>", "|", tile).replace("&rarr;", "") for tile in found]
    return [[part.strip() for part in tile.split("|") if part.strip()] for tile in clean]


@pytest.fixture
def page(tmp_path):
    made = RunPage(RunDir.open(RECIPE, tmp_path / "run"), RECIPE)
    made.begin(None, PROMPTS, {"dense": DENSE, "before": BEFORE})
    return made


def test_the_page_is_there_before_anything_is_measured(tmp_path, monkeypatch):
    """What the run prints is where it can be watched, from then on; a signal within the measurement is told too."""
    seen = []

    def measure(policy, recipe, questions, folder):
        seen.append((folder.root / "report.html").read_text())
        raise signals.Stopped(signal.SIGINT)

    monkeypatch.setattr(loop, "measure_before", measure)
    tinymodels.make().save(tmp_path / "model")
    recipe = tinyruns.write(tmp_path / "r.yaml", tmp_path / "model")
    with pytest.raises(signals.Stopped):
        tinyruns.start(recipe, tmp_path / "run")
    (text,) = seen
    assert "<h1>Step 0 of 3</h1>" in text and "renews itself" in text and tiles(text) == []
    text = (tmp_path / "run" / "report.html").read_text()
    assert "<h1>Stopped at step 0 of 3</h1>" in text and 'http-equiv="refresh"' not in text
    monkeypatch.setattr(loop, "measure_before", lambda *a: {})
    monkeypatch.setattr(loop, "finish", lambda *a: measure(*a[:3], a[4]))
    with pytest.raises(signals.Stopped):
        tinyruns.start(recipe, tmp_path / "run")
    assert "renews itself" in seen[1]
    text = (tmp_path / "run" / "report.html").read_text()
    assert "<h1>Stopped at step 3 of 3</h1>" in text and 'http-equiv="refresh"' not in text


def test_before_the_first_step(page):
    text = page.path.read_text()
    assert "<h1>Step 0 of 4</h1>" in text and '<meta http-equiv="refresh"' in text
    assert tiles(text) == [
        ["tokens kept", "90.0%", "before training"],
        ["right answers", "75.0%", "dense, before training"],
    ]
    assert f"zipr1 train --resume {page.path.parent}" in text


def test_the_command_that_goes_on_repeats_what_the_user_has_to_say(tmp_path, monkeypatch):
    """Code, and files of rows: `train --resume` does not take the run's own recipe's word for them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows of mine.jsonl").write_text("")
    (tmp_path / "mine.py").write_text("def f(prediction, reference): return 1.0\n")
    data = {"source": "rows of mine.jsonl:[5:]", "heldout": "run/kept.jsonl"}
    recipe = tinyruns.recipe(rewards={"check": "mine.py:f"}, data=data)
    made = RunPage(RunDir.open(recipe, tmp_path / "run"), recipe)
    (tmp_path / "run" / "kept.jsonl").write_text("")  # its rows may name pictures anywhere
    made.begin(None, PROMPTS, {"dense": DENSE, "before": BEFORE})
    (command,) = re.findall(r"zipr1 train --resume [^<]*", made.path.read_text())
    _, _, _, folder, *again = shlex.split(html.unescape(command))
    assert folder == str(tmp_path / "run")
    assert again == [
        "rewards.check=mine.py:f",
        "data.source=rows of mine.jsonl:[5:]",
        "data.heldout=run/kept.jsonl",
    ]
    found: list[Any] = []
    monkeypatch.setattr("zipr1.train.loop.run", lambda recipe, *more: found.append(recipe) or {})
    code, said = call("train", "--resume", "run", *again)
    assert code == 0 and found == [recipe], said
    code, said = call("train", "--resume", "run", *again[:1])
    assert code == 2 and len(found) == 1 and "'data.source=rows of mine.jsonl:[5:]'" in said


def test_while_it_trains_the_newest_steps_are_shown(page, monkeypatch):
    monkeypatch.setattr(module, "EVERY", 0.0)
    monkeypatch.setattr(module, "SHARE", 0)
    page._due = 0.0
    page.update(metrics(0.8), None)
    page.update(metrics(0.6), None)
    text = page.path.read_text()
    assert "<h1>Step 2 of 4</h1>" in text and " left. Sparse at p = 0.9" in text
    assert tiles(text) == [
        ["tokens kept", "90.0%", "70.0%", "mean of the last 2 steps; target 20%"],
        ["right answers, dense and sparse", "100.0%", "75.0%", "mean of the last 2 steps"],
        ["loss", "1.0000", "mean of the last 2 steps"],
    ]
    assert text.index("Curves") < text.index("Next") and "<script" not in text


def test_pages_take_a_fiftieth_of_the_time_at_most(page, monkeypatch):
    """One that took 2 s is followed by the next after 100 s, a quick one after 30."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    page._due = 0.0
    written = []

    def write(path, text):
        written.append(now[0])
        now[0] += 2.0 if len(written) == 1 else 0.1

    monkeypatch.setattr(module, "write_whole", write)
    for _ in range(300):
        page.update(metrics(0.5), None)
        now[0] += 1.0
    # A step each second: the first at which the time is up.
    gaps = [b - a for a, b in itertools.pairwise(written)]
    assert written[0] == 1000 and gaps[0] == pytest.approx(102, abs=1.1) and len(gaps) > 4
    assert gaps[1:] == pytest.approx([31] * (len(gaps) - 1), abs=1.1)


def test_a_stopped_run_says_how_to_go_on(page):
    for ratio in (0.8, 0.6, 0.4):
        page.update(metrics(ratio), None)
    page.stopped(2)
    text = page.path.read_text()
    assert "<h1>Stopped at step 2 of 4</h1>" in text and "refresh" not in text
    assert tiles(text)[0] == [
        "tokens kept",
        "90.0%",
        "70.0%",
        "mean of the last 2 steps; target 20%",
    ]
    assert (page.path.parent / "curves.png").is_file()


def test_the_end_says_what_was_gained_and_lost(page):
    """One answer of four is won and two are lost: 25 points less. 30 ms over 20 ms is 1.50 times faster."""
    summary = {
        "steps": 4, "seconds": 75.0, "p": 0.9, "model": "tiny", "dense_accuracy": 0.75, "difference": -0.25,
        "difference_ci": [-0.9, 0.4], "by_task": {}, "before": {"accuracy": 0.75, "token_ratio": 0.9, "n": 4},
        "after": {"accuracy": 0.5, "token_ratio": 0.25, "n": 4, "token_ratio_by_layer": [0.35, 0.15]},
        "costs": {"dense": {"first_token_ms": 30.0, "kv_bytes": 4096.0},
                  "after": {"first_token_ms": 20.0, "kv_bytes": 1024.0}},
    }  # fmt: skip
    results = {"dense": DENSE, "before": BEFORE, "after": AFTER}
    page.update(metrics(0.8), None)
    page.finished(None, PROMPTS, results, summary)
    text = page.path.read_text()
    assert "<h1>25.0% of the tokens, -25.00 points</h1>" in text and "refresh" not in text
    assert tiles(text) == [
        ["tokens kept", "90.0%", "25.0%", "of the prompt, mean over layers, at the same p"],
        ["right answers", "75.0%", "50.0%", "-25.00 points (-90.00 to +40.00) to dense"],
        ["to the first token, a question", "30 ms", "20 ms", "1.50x faster than dense, in the language model"],
        ["keys and values", "4.0 KiB", "1.0 KiB", "75.0% saved after a prefill"],
    ]  # fmt: skip
    titles = ("Lost: 2 of 4", "Won: 1 of 4", "Held-out questions", "Curves", "Next")
    order = [text.index(f"<h2>{title}</h2>") for title in titles]
    assert order == sorted(order)
    questions = re.findall(r'<div class="question">(.*?)</div>', text)
    escaped = "&lt;b&gt;what&lt;/b&gt; [red]is[/red] :eye: 3?"
    assert questions == [f"{escaped} {i}" for i in (1, 2, 3)]  # lost, lost, won
    for command in ("eval --model", "profile --model", "export", "compare"):
        assert f"zipr1 {command} {page.path.parent}" in text


def test_other_ranks_write_nothing(tmp_path):
    folder = RunDir.open(RECIPE, tmp_path / "run")
    folder.writes = False
    silent = RunPage(folder, RECIPE)
    silent.begin(None, PROMPTS, {"dense": DENSE, "before": BEFORE})
    silent.update(metrics(0.5), None)
    silent.stopped(1)
    assert not silent.path.exists() and not (tmp_path / "run" / "curves.png").exists()
