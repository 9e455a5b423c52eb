"""A disk that is full, at every place where something is written: one line, and nothing half-written stays."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinymodels
import tinyruns
import torch
from commands import call
from matplotlib.figure import Figure
from rich.console import Console
from tinyruns import hashes

from zipr1.core.plots import save
from zipr1.evaluate import compared, session
from zipr1.evaluate import folder as evaluation
from zipr1.export import merged
from zipr1.export import session as exports
from zipr1.models.open import open_model as really_open
from zipr1.profiling import report
from zipr1.train.heldout import Result

ROOT = Path(__file__).resolve().parents[2]

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def full_at(number: int) -> Iterator[list[str]]:
    """Inside, the `number`-th call that changes the disk fails (0: none does); what was called is listed. Calls of
    Python's own: what libraries write in other languages is tried by `limited`."""
    calls: list[str] = []

    def failing(name: str, real: Any, changes: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            if changes(*arguments, **options):
                calls.append(name)
                if len(calls) == number:
                    raise OSError(FULL.errno, FULL.strerror)
            return real(*arguments, **options)

        return run

    def writes(path: Any, mode: str = "r", *more: Any, **options: Any) -> bool:
        return any(letter in mode for letter in "wax+")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "fsync", "mkdir", "rename"):
            patch.setattr(os, name, failing(name, getattr(os, name), lambda *a, **b: True))
        opened = failing("open", builtins.open, writes)
        patch.setattr(builtins, "open", opened)
        patch.setattr(io, "open", opened)
        yield calls


@contextlib.contextmanager
def limited(size: int) -> Iterator[None]:
    """Inside, no file can grow beyond `size` bytes, whoever writes it: the kernel refuses."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def opened(run):
    from zipr1.core.recipe import Model

    path = str((run / "last" / "model").resolve())
    return really_open(Model(path=path, dtype="float32"), "cpu", merge_adapter=False)


@pytest.fixture
def brief(monkeypatch, opened):
    """Opening and comparing models is left out, writing is not."""
    monkeypatch.setattr(exports, "open_model", lambda *a, **b: opened)
    monkeypatch.setattr(exports, "reference", lambda *a: None)
    monkeypatch.setattr(merged, "reload", lambda *a: None)
    checked = {"questions": "", "n": 0, "logits_error": 0.0, "limit": 1.0, "same_text": 0}
    monkeypatch.setattr(exports, "compare", lambda *a: checked)


def assert_nothing_left(root: Path, code: int, said: str) -> None:
    assert code in (1, 2), said
    assert said.startswith("error: ") and "cannot be written" in said, said
    left = [path.name for path in root.iterdir() if not path.name.endswith(".lock")]
    assert left == [], left


def test_an_export_fails_at_every_call_and_leaves_nothing(run, brief, tmp_path):
    with full_at(0) as calls:
        assert call("export", run, "--to", tmp_path / "all" / "out", "--device", "cpu")[0] == 0
    whole, unharmed = hashes(tmp_path / "all" / "out"), []
    assert len(calls) > 15 and {"open", "fsync", "replace", "mkdir"} <= set(calls)
    for number in range(1, len(calls) + 1):
        root = tmp_path / str(number)
        root.mkdir()
        with full_at(number) as reached:
            code, said = call("export", run, "--to", root / "out", "--device", "cpu")
        if code == 0:  # nothing was lost with that call, such as making a folder that is there
            assert hashes(root / "out") == whole and number <= len(reached) + 1
            unharmed.append(reached[number - 1 :][:1])
        else:
            assert_nothing_left(root, code, said)
        shutil.rmtree(root)
    assert all(names in ([], ["mkdir"]) for names in unharmed), unharmed


def test_an_export_fails_at_every_size_and_leaves_nothing(run, brief, tmp_path):
    """Files that Rust writes, too: weights and tokenizer."""
    assert call("export", run, "--to", tmp_path / "out", "--device", "cpu")[0] == 0
    sizes = sorted({p.stat().st_size for p in (tmp_path / "out").iterdir()})
    assert len(sizes) > 6
    for size in sizes:
        root = tmp_path / str(size)
        root.mkdir()
        with limited(size - 1):
            code, said = call("export", run, "--to", root / "out", "--device", "cpu")
        assert_nothing_left(root, code, said)


def test_what_an_evaluation_writes_is_whole_or_not_there(tmp_path):
    """benchmarks/<name>.json, results.json and the reports all go through Folder.write."""
    text = "x" * 5000
    with full_at(0) as calls:
        (tmp_path / "a").mkdir()
        evaluation.Folder(tmp_path / "a").save("digits", {"text": text})
    for number in range(1, len(calls) + 1):
        root = tmp_path / str(number)
        root.mkdir()
        said = ""
        with full_at(number):
            try:
                evaluation.Folder(root).save("digits", {"text": text})
            except exports.RunError as error:
                said = str(error)
        there = [p.name for p in root.rglob("*") if p.is_file()]
        if said:
            assert "cannot be written" in said and there == []
        else:  # making a folder that is there
            assert there == ["digits.json"]
    (tmp_path / "limit").mkdir()
    with limited(4000), pytest.raises(exports.RunError, match="cannot be written"):
        evaluation.Folder(tmp_path / "limit").save("digits", {"text": text})
    assert [p for p in (tmp_path / "limit").rglob("*") if p.is_file()] == []


RESULT: dict[str, Any] = {"model": {"name": "x"}, "rows": []}


def figure(text: str = "") -> Figure:
    made = Figure(figsize=(1, 1))
    made.text(0, 0, text)
    return made


def test_a_figure_is_the_new_one_or_the_old_one(tmp_path):
    """Every figure of every command is saved by one function."""
    saving = [p for p in (ROOT / "zipr1").rglob("*.py") if ".savefig(" in p.read_text()]
    assert [p.name for p in saving] == ["plots.py"]
    path = tmp_path / "a" / "x.png"
    with full_at(0) as calls:
        save(figure("old"), path)
    old = path.read_bytes()
    for number in range(1, len(calls) + 1):
        with full_at(number), contextlib.suppress(OSError):
            save(figure("new"), path)
            path.write_bytes(
                old
            )  # nothing was lost with that call, such as making a folder that is there
        assert [p.name for p in path.parent.iterdir()] == ["x.png"] and path.read_bytes() == old
    with limited(len(old) // 2), pytest.raises(OSError, match="too large"):
        save(figure("new"), path)
    assert [p.name for p in path.parent.iterdir()] == ["x.png"] and path.read_bytes() == old


def test_a_profile_is_whole_or_not_there(tmp_path, monkeypatch):
    """One figure stands for all; the files fail in turn, and the command says so in one line."""
    monkeypatch.setattr(report, "page", lambda *a: "page")
    monkeypatch.setattr(report.plots, "draw", lambda *a: save(figure(), a[2] / "phases.png") and [])
    monkeypatch.setattr(report, "show", lambda *a: None)
    monkeypatch.setattr("zipr1.profiling.session.profile", lambda request: RESULT)
    assert_whole_or_not_there("profile", ["--model", "tiny"], tmp_path, "profile.json")


def test_a_comparison_is_whole_or_not_there(tmp_path, monkeypatch):
    root = tmp_path / "run"
    tinymodels.make().save(tmp_path / "model")
    tinyruns.start(tinyruns.write(tmp_path / "r.yaml", tmp_path / "model"), root)
    monkeypatch.setattr(compared.curves, "overlay", lambda *a: [])
    assert_whole_or_not_there("compare", [root, root], tmp_path / "made", "comparison.json")


def assert_whole_or_not_there(name: str, arguments: list[Any], root: Path, first: str) -> None:
    """The command, with each call failing in turn that changes the disk: one line, and of its files each is as it
    should be or is not there. first: what is written before the page."""
    with full_at(0) as calls:
        assert call(name, *arguments, "-o", root / "all")[0] == 0
    whole = hashes(root / "all")
    assert {first, "report.html"} <= whole.keys() and len(calls) > 6
    failed = 0
    for number in range(1, len(calls) + 1):
        folder = root / str(number)
        with full_at(number):
            code, said = call(name, *arguments, "-o", folder)
        there = hashes(folder) if folder.is_dir() else {}
        assert there.items() <= whole.items(), there.keys()
        if code:
            failed += 1
            assert code in (1, 2) and said.startswith("error: ") and "cannot be written" in said
        else:
            assert there == whole
    assert failed > 3


def test_figures_of_a_run_and_of_an_evaluation_say_where(run, tmp_path, monkeypatch):
    """The disk is full when the last thing is drawn: what it was stands in the line."""
    full = OSError(FULL.errno, FULL.strerror)

    def draw(*arguments: Any, **options: Any) -> Any:
        raise full

    from zipr1.evaluate import plots
    from zipr1.train import summary

    monkeypatch.setattr(plots, "draw", draw)
    (tmp_path / "eval").mkdir()
    folder = evaluation.Folder(tmp_path / "eval")
    monkeypatch.setattr(evaluation.Folder, "read", lambda self, name: {"task": name})
    with pytest.raises(exports.RunError, match=r"eval: cannot be written .* then run again"):
        session.write(folder, {"rows": [{"task": "digits"}]}, Console(quiet=True))
    monkeypatch.setattr(summary, "kept_picture", draw)
    policy = tinymodels.make()
    prompts = tinyruns.questions()[:1]
    settings = tinyruns.recipe()
    with pytest.raises(
        exports.RunError, match=r"kept-digits.png: cannot be written .* then resume"
    ):
        summary.pictures(policy, settings, prompts, {"after": kept_all(policy, prompts)}, tmp_path)


def kept_all(policy: Any, prompts: Any) -> Result:
    """A result that kept the first token in every layer."""
    n, layers = len(prompts), policy.layers
    kept = [[torch.tensor([0])] * layers for _ in prompts]
    ones = np.ones(n)
    return Result(prompts, ones, ones, np.ones((n, layers)), ["x"] * n, kept=kept)
