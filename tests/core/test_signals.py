"""A signal ends a run at once, or waits until the weights are those of a whole step; nothing of it outlasts the run."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from zipr1 import cli
from zipr1.core import distributed, signals
from zipr1.core.errors import InputError

BOTH = (signal.SIGTERM, signal.SIGINT)


def waits() -> bool:
    """Whether a signal that comes now waits."""
    try:
        signals.handle(signal.SIGTERM)
    except signals.Stopped:
        return False
    return True


def test_at_once_unless_it_is_held():
    with signals.scope():
        with pytest.raises(signals.Stopped) as stop:
            signals.handle(signal.SIGTERM)
        assert stop.value.number == 15
        signals.hold()
        signals.handle(signal.SIGTERM)  # waits
        with pytest.raises(signals.Stopped) as stop:
            signals.check(distributed.gather)
        assert stop.value.number == 15
        signals.check(distributed.gather)  # and is raised once
        signals.hold()
        signals.check(distributed.gather)


def test_no_exception_handler_takes_it_for_a_failure():
    assert not issubclass(signals.Stopped, Exception)


def test_what_is_held_and_what_waits_ends_with_its_scope():
    signals.hold()
    assert not waits()  # nobody would let it go
    with signals.scope():
        signals.hold()
        with signals.scope():
            assert not waits()
            signals.hold()
            assert waits()
        signals.check(distributed.gather)  # what waited inside is not this scope's
        assert waits()
        with pytest.raises(RuntimeError), signals.scope():
            raise RuntimeError
    assert not waits()


def sent(number: int):
    def command(**_) -> None:
        signals.hold()
        signal.raise_signal(number)  # waits
        signals.check(distributed.gather)

    return command


def refused(**_) -> None:
    signals.hold()
    raise InputError("no")


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (lambda **_: sys.exit(0), 0),
        (refused, 2),
        (sent(signal.SIGTERM), 143),
        (sent(signal.SIGINT), 130),
        (lambda **_: signal.raise_signal(signal.SIGTERM), 143),
    ],
    ids=["well", "refused", "sigterm", "sigint", "at-once"],
)
def test_main_leaves_the_signals_as_they_were(monkeypatch, capsys, command, code):
    def mine(number, frame):
        raise AssertionError("a signal came late")

    before = [signal.getsignal(number) for number in BOTH]
    monkeypatch.setattr(cli, "app", command)
    signal.signal(signal.SIGTERM, mine)
    try:
        for _ in range(2):
            with pytest.raises(SystemExit) as left:
                cli.main()
            assert left.value.code == code
            assert [signal.getsignal(n) for n in BOTH] == [mine, before[1]]
            assert not waits()
    finally:
        signal.signal(signal.SIGTERM, before[0])


def test_a_signal_that_was_ignored_stays_so(monkeypatch):
    """As under nohup: the command goes on."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    monkeypatch.setattr(cli, "app", lambda **_: signal.raise_signal(signal.SIGINT) or sys.exit(0))
    try:
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 0 and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_signal_while_leaving_changes_nothing(monkeypatch, capsys):
    """Ctrl-C twice: the message of the first is not cut off by a traceback of the second."""
    leave = cli._leave

    def slowly(message, code):
        signal.raise_signal(signal.SIGINT)
        leave(message, code)

    monkeypatch.setattr(cli, "_leave", slowly)
    monkeypatch.setattr(cli, "app", lambda **_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 130 and "error: interrupted" in capsys.readouterr().err


def cleaned(done: list[str]):
    """Cleans up in two places, at each of which another signal comes."""

    @contextlib.contextmanager
    def folder():
        try:
            yield
        finally:
            signals.handle(signal.SIGINT)
            done.append("folder")

    with folder():
        try:
            signals.handle(signal.SIGTERM)
        finally:
            try:
                raise OSError("in the way")
            except OSError:
                signals.handle(signal.SIGTERM)
            done.append("file")


def test_a_second_signal_does_not_disturb_what_is_cleaned_up_on_the_way_out():
    done: list[str] = []
    with pytest.raises(signals.Stopped) as stop:
        cleaned(done)
    assert done == ["file", "folder"] and stop.value.number == signal.SIGTERM


def test_a_signal_that_foreign_code_has_swallowed_can_be_sent_again():
    with contextlib.suppress(signals.Stopped):
        signals.handle(signal.SIGINT)
    with pytest.raises(signals.Stopped):
        signals.handle(signal.SIGINT)


# Writes beside its folder, is stopped, and takes a while to clean up; so does a thread, after the last line.
SLOW = """
import signal, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.default_int_handler)  # ignored, where a shell has put it into the background
from zipr1 import cli
threads = ThreadPoolExecutor(1)
def command(**_):
    root = Path(sys.argv[2])
    root.mkdir()
    (root / "part").write_text("half of it")
    try:
        print("writing", flush=True)
        time.sleep(60)
    finally:
        print("cleaning", flush=True)
        time.sleep(0.5)
        (root / "part").unlink()
        root.rmdir()
        threads.submit(lambda: (print("ending", flush=True), time.sleep(0.5)))
cli.app = command
cli.program()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_again_and_again_is_one_line(tmp_path, number, code):
    """While it works, while it cleans up, and while Python ends."""
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, "export", str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        for word in ("writing", "cleaning", "ending"):
            assert process.stdout.readline() == f"{word}\n"
            process.send_signal(number)
        said = process.stderr.read()
        assert process.wait() == code
    name = "interrupted" if code == 130 else "stopped by SIGTERM"
    assert said == f"error: {name}; nothing was written: the folder is made whole or not at all\n"
    assert not list(tmp_path.iterdir())


# Interrupted while the first of its libraries is imported.
EARLY = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where a shell has put it into the background
class Press:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Press())
from zipr1.__main__ import program
program()
"""


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_ctrl_c_while_python_still_imports_is_one_line(options):
    done = subprocess.run(
        [sys.executable, "-c", EARLY, "env", *options], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, "error: interrupted; nothing was done\n")
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert said == ([{"error": "interrupted", "exit_code": 130}] if options else [])


def test_the_command_is_what_says_so():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"zipr1": "zipr1.__main__:program"}
