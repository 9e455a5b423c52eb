"""What a command is doing is shown in a terminal, told once a minute elsewhere, and never by a library."""

import io
import time
import types

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


class Clock:
    """Stands in for the time, and for the event that a thread waits for: to wait is to let the time go by."""

    def __init__(self, until):
        self.now, self.until, self.then = 1000.0, 1000.0 + until, {}

    def monotonic(self):
        return self.now

    def wait(self, seconds):
        """Whether it is over; what is to happen in the meantime happens at its second."""
        end = self.now + seconds
        for moment in sorted(m for m in self.then if 1000.0 + m < end):
            self.now = 1000.0 + moment
            self.then.pop(moment)()
        self.now = max(self.now, end)
        return self.now > self.until


def minutes(monkeypatch, until, then):
    """What a pipe is told within so many seconds. then: by second, what happens."""
    clock = Clock(until)
    clock.then = then
    monkeypatch.setattr(activity, "time", clock)
    monkeypatch.setattr(activity.threading.Thread, "start", lambda thread: None)
    c = console(False)
    with activity.shown(c):
        (lines,) = activity._open
        lines._end = types.SimpleNamespace(wait=clock.wait, set=lambda: None)
        lines._tick()
    return c.file.getvalue().splitlines()


def test_a_pipe_gets_a_line_a_minute(monkeypatch):
    happens = {
        10: lambda: activity.tell("opening"),
        70: lambda: activity.tell("timing: turn", 3, 8),
        200: lambda: activity.tell(""),
        310: lambda: activity.tell("drawing"),
    }
    assert minutes(monkeypatch, 370, happens) == [
        "opening (1 min since the start)",
        "timing: turn 3 of 8 (2 min since the start)",
        "timing: turn 3 of 8 (3 min since the start)",
        "drawing (6 min since the start)",
    ]


def test_what_was_told_before_a_count_is_told_again_after_it():
    told = []
    with activity.shown(console(False)):
        (lines,) = activity._open
        lines.show = lambda what, count: told.append(what + count)
        activity.tell("reading")
        list(activity.counted("drawing", "ab"))
        assert list(activity.counted("drawing", iter("c"), 1)) == ["c"]
    counts = ["drawing 0 of 2", "drawing 1 of 2", "reading", "drawing 0 of 1", "reading"]
    assert told == ["reading", *counts]


def test_a_quiet_console_is_quiet():
    c = Console(file=io.StringIO(), quiet=True, force_terminal=True)
    with activity.shown(c):
        activity.tell("loading")
        time.sleep(0.15)
    assert c.file.getvalue() == ""


def test_a_line_of_its_own_puts_the_next_one_off(monkeypatch):
    activity.tell("training 3/9")
    assert minutes(monkeypatch, 190, {1: lambda: activity.tell("a"), 50: activity.spoke}) == [
        "a (2 min since the start)",
        "a (3 min since the start)",
    ]
