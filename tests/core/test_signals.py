"""A signal ends a run at once, or waits until the weights are those of a whole step; nothing of it outlasts the run."""

from __future__ import annotations

import signal
import sys

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
