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

import pytest
from commands import call
from tinyruns import hashes

from zipr1.evaluate import folder as evaluation
from zipr1.export import merged
from zipr1.export import session as exports
from zipr1.models.open import open_model as really_open
from zipr1.profiling import report

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


def test_a_profile_is_whole_or_not_there(tmp_path, monkeypatch):
    """The figures are left out; the files around them fail in turn, and the command says so in one line."""
    monkeypatch.setattr(report, "page", lambda *a: "page")
    monkeypatch.setattr(report.plots, "draw", lambda *a: [])
    monkeypatch.setattr(report, "show", lambda *a: None)
    monkeypatch.setattr("zipr1.profiling.session.profile", lambda request: RESULT)
    with full_at(0) as calls:
        assert call("profile", "--model", "tiny", "-o", tmp_path / "all")[0] == 0
    for number in range(1, len(calls) + 1):
        folder = tmp_path / str(number)
        with full_at(number):
            code, said = call("profile", "--model", "tiny", "-o", folder)
        assert code in (0, 1, 2) and said.startswith("error: " if code else "report: "), said
        assert not list(folder.glob(".tmp-*"))
        made = ["profile.json", "report.html"] if code == 0 else ["profile.json"]
        assert {p.name for p in folder.glob("*.*")} <= {*made, ".zipr1.lock"}
