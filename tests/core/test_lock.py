"""One process for each folder, whatever becomes of it; and new folders that nobody else has."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from zipr1 import cli
from zipr1.core import folders, lock
from zipr1.core.errors import InputError
from zipr1.core.folders import claimed, new_folder
from zipr1.evaluate import compare

# Claims a folder, starts a process of its own that outlives it, and says so.
HOLDER = """
import subprocess, sys, time
from pathlib import Path
from zipr1.core.folders import claimed
with claimed(Path(sys.argv[1])):
    child = subprocess.Popen(["sleep", "60"])
    print(child.pid, flush=True)
    time.sleep(60)
"""


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def held(tmp_path):
    """A folder that another process has claimed, and that process."""
    root = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(root)], stdout=subprocess.PIPE, text=True
    ) as process:
        child = int(process.stdout.readline())
        yield root, process
        process.kill()
    os.kill(child, signal.SIGKILL)


def test_the_second_process_is_told_of_the_first_and_death_lets_go(held):
    root, process = held
    with pytest.raises(InputError) as told, claimed(root):
        pass
    where = f"{root}: another zipr1 writes here (process {process.pid} on {socket.gethostname()}"
    assert str(told.value).startswith(where) and "\n" not in str(told.value)
    process.send_signal(signal.SIGKILL)  # no word of farewell, and a child that lives on
    process.wait()
    with claimed(root) as folder:
        assert folder == root and names(root) == [".lock"]
        assert json.loads((root / ".lock").read_text())["pid"] == os.getpid()
    assert root.is_dir() and names(root) == []


@pytest.mark.parametrize("command", ["train", "eval", "profile", "export", "compare"])
def test_every_command_that_writes_is_refused_in_one_line(
    run, tmp_path, monkeypatch, capsys, command
):
    if command == "eval":
        pytest.importorskip("lmms_eval")
    root = tmp_path / "out"
    # A handler that a command before has left would write to that test's screen.
    monkeypatch.setattr(logging.getLogger("zipr1"), "handlers", [])
    options = {
        "train": ["recipes/tiny.yaml", "--output", str(root)],
        "eval": ["--model", "tiny", "--limit", "1", "--output", str(root)],
        "profile": ["--model", "tiny", "--lengths", "40", "--output", str(root)],
        "export": [str(run), "--to", str(root)],
        "compare": [str(run), str(run), "--output", str(root)],
    }[command]
    device = ["--device", "cpu"]
    if command == "compare":
        device = []
        monkeypatch.setattr(compare, "read", lambda folder: None)
        monkeypatch.setattr(compare, "compare", lambda a, b: [])
    monkeypatch.setattr("sys.argv", ["zipr1", command, *options, *device])
    file = tmp_path / ".tmp-out.lock" if command == "export" else root / ".lock"
    file.parent.mkdir(exist_ok=True)
    with lock.locked(file, root), pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr().err
    assert left.value.code == 2
    line = next(x for x in said.splitlines() if x.startswith("error: "))
    assert f"another zipr1 writes here (process {os.getpid()} on " in line
    assert "Traceback" not in said and names(tmp_path) in ([], ["out"])
    assert not root.exists() or names(root) == []


def test_a_lock_that_was_removed_while_it_was_waited_for_is_not_taken_for_one(
    tmp_path, monkeypatch
):
    """The first holder leaves between the second one's open and flock: the file that the second has locked is gone
    from its name, and a third process could lock a new one."""
    real, opened = fcntl.flock, []

    def flock(descriptor, how):
        if not opened:
            (tmp_path / ".lock").unlink()
        opened.append(os.fstat(descriptor).st_ino)
        real(descriptor, how)

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with lock.locked(tmp_path / ".lock", tmp_path):
        assert len(opened) == 2 and (tmp_path / ".lock").stat().st_ino == opened[1]


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, caplog):
    def flock(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with claimed(tmp_path / "run") as folder:
        assert folder.is_dir()
    (line,) = caplog.messages
    assert line.startswith(
        f"{folder}: no lock on this file system (No locks available): start noth"
    )


def test_a_lock_without_a_readable_holder_is_told_all_the_same(held):
    root, _ = held
    for text in ("", "{", '{"pid": "x"}', "[1]"):
        (root / ".lock").write_text(text)
        with pytest.raises(InputError, match=r"another zipr1 writes here \(it has only just begun"):
            lock._acquire(root / ".lock", root)


def test_a_folder_made_for_nothing_goes_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refused(*arguments, **options):
        with claimed(*arguments, **options) as folder:
            assert folder.is_dir()
            raise InputError("no")

    (tmp_path / "mine").mkdir()
    for output in (None, tmp_path / "a", tmp_path / "mine"):
        with pytest.raises(InputError, match="no"):
            refused(output, name="tiny")
    assert names(tmp_path) == ["mine", "runs"] and names(tmp_path / "runs") == []


def test_commands_that_start_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(folders.time, "strftime", lambda form: "now")
    made = [new_folder("tiny", tmp_path) for _ in range(3)]
    assert [p.name for p in made] == ["tiny-now", "tiny-now-2", "tiny-now-3"]
    # Both have looked before either has made one.
    real = folders.Path.exists
    monkeypatch.setattr(folders.Path, "exists", lambda path: False)
    again = {new_folder("tiny", tmp_path) for _ in range(2)}
    monkeypatch.setattr(folders.Path, "exists", real)
    assert {p.name for p in again} == {"tiny-now-4", "tiny-now-5"}


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be made \(Not a directory\); name a folder"):
        new_folder("tiny", tmp_path / "file")
    with (
        pytest.raises(InputError, match=r"cannot be written \(Not a directory\)"),
        claimed(tmp_path / "file" / "run"),
    ):
        pass


def test_waiting_is_short(held):
    root, _ = held
    began = time.monotonic()
    with pytest.raises(InputError), claimed(root):
        pass
    assert time.monotonic() - began < 20
