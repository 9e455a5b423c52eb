"""What a command is doing is shown in a terminal, told once a minute elsewhere, and never by a library."""

import io
import time

from rich.console import Console

from zipr1.core import activity


def console(terminal):
    return Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None)


def test_outside_of_a_command_nothing_is_said(capsys):
    assert list(activity.counted("drawing", [1, 2])) == [1, 2]
    activity.tell("x", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_what_runs_and_how_much_of_it():
    c = console(True)
    with activity.shown(c):
        activity.tell("loading")
        c.print("a line :smile:", emoji=False)
        for _ in activity.counted("drawing", range(1200)):
            pass
        time.sleep(0.3)
    said = c.file.getvalue()
    assert "loading" in said and "drawing 1,199 of 1,200" in said and "a line :smile:" in said


def test_a_pipe_gets_a_line_a_minute(monkeypatch):
    monkeypatch.setattr(activity, "EVERY", 0.05)
    c = console(False)
    with activity.shown(c):
        activity.tell("timing: turn", 3, 8)
        time.sleep(0.3)
        activity.tell("")
        time.sleep(0.1)
        told = c.file.getvalue().count("\n")
        time.sleep(0.2)
        assert c.file.getvalue().count("\n") == told >= 1
    assert c.file.getvalue().startswith("timing: turn 3 of 8 (")


def test_a_quiet_console_is_quiet():
    c = Console(file=io.StringIO(), quiet=True, force_terminal=True)
    with activity.shown(c):
        activity.tell("loading")
        time.sleep(0.15)
    assert c.file.getvalue() == ""


def test_a_line_of_its_own_puts_the_next_one_off(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(activity.time, "monotonic", lambda: now[0])
    with activity.shown(console(False)):
        (lines,) = activity._open
        now[0] = 59.0
        assert lines._wait() == 1.0
        activity.spoke()
        assert lines._wait() == activity.EVERY == 60.0
        now[0] = 200.0
        assert lines._wait() == 0.0
