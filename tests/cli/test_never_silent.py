"""Nothing is silent: while a command works, a spinner or a count stands on the screen, from before PyTorch is loaded to
the last word. No clock is asked: what takes long says what was shown when it was called."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tinymodels
import tinyruns
from commands import call
from matplotlib.figure import Figure
from PIL import Image
from rich.live import Live
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

from zipr1.core import activity
from zipr1.data import drawn


@dataclass
class Screen:
    """What stands there: `text` of the spinner or of the next line, or the display of the training loop.

    told: all texts in their order. worked: what took long, by kind, and what stood there at that moment.
    """

    text: str = ""
    display: bool = False
    told: list[str] = field(default_factory=list)
    worked: list[tuple[str, str]] = field(default_factory=list)

    def work(self, kind: str) -> None:
        if activity._open:  # within a command
            self.worked.append((kind, "the display" if self.display else self.text))

    def mute(self) -> set[str]:
        return {kind for kind, shown in self.worked if not shown}

    def __call__(self, console):
        """In place of the classes that show."""
        return self

    def show(self, what: str, count: str) -> None:
        self.text = what and what + count
        if self.text:
            self.told.append(self.text)

    def spoke(self) -> None:
        pass

    def close(self) -> None:
        self.text = ""


@pytest.fixture
def screen(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    here = Screen()
    monkeypatch.setattr(activity, "_Lines", here)
    monkeypatch.setattr(activity, "_Spinner", here)

    def watched(owner, name, kind):
        real = getattr(owner, name)

        def run(*arguments, **options):
            here.work(kind)
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, run)

    def displayed(name, on):
        real = getattr(Live, name)

        def run(live, *arguments, **options):
            here.display = on
            return real(live, *arguments, **options)

        monkeypatch.setattr(Live, name, run)

    watched(PreTrainedModel, "__init__", "building a model")
    watched(drawn, "messages", "drawing a question")
    watched(Figure, "savefig", "drawing a figure")
    watched(Image, "open", "reading a picture")
    watched(os, "fsync", "writing")
    displayed("start", True)
    displayed("stop", False)
    hook = register_module_forward_pre_hook(lambda module, inputs: here.work("a model's pass"))
    yield here
    hook.remove()


def kinds(screen):
    return {kind for kind, _ in screen.worked}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    tinymodels.make().save(folder)
    return folder


@pytest.mark.parametrize("terminal", [False, True])
def test_training(screen, base, tmp_path, monkeypatch, terminal):
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for one
    recipe = tinyruns.write(tmp_path / "r.yaml", base)
    code, said = call("train", recipe, "-o", tmp_path / "run", "--device", "cpu")
    assert code == 0, said
    assert screen.mute() == set()
    assert kinds(screen) >= {
        "building a model", "drawing a question", "a model's pass", "drawing a figure", "writing",
    }  # fmt: skip
    for counted in ("drawing digits", "held-out, before", "held-out, after"):
        assert any(re.fullmatch(rf"{counted} 0 of \d+", text) for text in screen.told), counted
    shown = {text for _, text in screen.worked}
    assert ("the display" in shown) == terminal
    assert any(text.startswith("training 1/3") for text in screen.told) != terminal


def test_a_dry_run(screen, base, tmp_path):
    recipe = tinyruns.write(tmp_path / "r.yaml", base)
    assert call("train", recipe, "--dry-run", "--device", "cpu")[0] == 0
    assert screen.mute() == set()
    assert kinds(screen) >= {"building a model", "drawing a question", "a model's pass"}


def test_an_evaluation(screen, run):
    pytest.importorskip("lmms_eval")
    code, said = call(
        "eval", "--model", run, "--tasks", "digits", "--limit", 2, "--device", "cpu", "-o", "out"
    )
    assert code == 0, said
    assert screen.mute() == set()
    assert kinds(screen) >= {"building a model", "a model's pass", "drawing a figure", "writing"}
    assert "digits: question 2 of 2" in screen.told


def test_a_profile(screen):
    asked = ["--lengths", "24,40", "--seconds", 0, "--measure-tflops"]
    code, said = call("profile", "--model", "tiny", *asked, "--device", "cpu", "-o", "out")
    assert code == 0, said
    assert screen.mute() == set()
    assert kinds(screen) >= {"building a model", "a model's pass", "drawing a figure", "writing"}
    assert "2 of 2: 40 tokens, batch 1: prefill, turn 0 of 5" in screen.told


def test_an_export(screen, run):
    code, said = call("export", run, "--to", "out", "--device", "cpu")
    assert code == 0, said
    assert screen.mute() == set()
    assert kinds(screen) >= {"building a model", "a model's pass", "writing"}
    steps = [text for text in screen.told if " of 4" in text and ": step " in text]
    assert len(steps) >= 4 and "4 of 4" in steps[-1]


def test_a_comparison(screen, base, tmp_path):
    recipe = tinyruns.write(tmp_path / "r.yaml", base)
    tinyruns.start(recipe, tmp_path / "a")
    code, said = call("compare", "a", "a", "-o", "out")
    assert code == 0, said
    assert screen.mute() == set() and kinds(screen) >= {"drawing a figure", "writing"}


@pytest.mark.parametrize(
    "command", ["train", "dry run", "eval", "profile", "export", "compare", "env"]
)
def test_the_first_word_comes_before_anything_heavy_is_loaded(command, run):
    words = {
        "train": ["train", "tiny", "-o", "out"],
        "dry run": ["train", "tiny", "--dry-run"],
        "eval": ["eval", "--model", "tiny"],
        "profile": ["profile", "--model", "tiny"],
        "export": ["export", str(run), "--to", "nowhere/out"],
        "compare": ["compare", "a", "b"],
        "env": ["env"],
    }[command]
    code = (
        "import sys; from zipr1.core import activity; from zipr1.cli import main\n"
        "def tell(what):\n"
        "    heavy = {'torch', 'transformers', 'lmms_eval', 'matplotlib'} & set(sys.modules)\n"
        "    sys.exit(f'after {heavy}' if heavy or not activity._open else 7)\n"
        "activity.tell = tell; sys.argv = ['zipr1', *sys.argv[1:]]; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert not Path("nowhere").exists()
