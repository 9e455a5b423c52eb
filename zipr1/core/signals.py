"""SIGTERM and Ctrl-C: the run ends where its checkpoint is true.

While a step only looks and answers, a signal ends it at once, and the state before the step is saved. From the first
change of the weights it waits for the end of the step. Several ranks wait for a place where all of them agree.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType


class Stopped(BaseException):
    """A signal asked the process to end. No Exception: nothing on the way up may take it for a failure.

    note: what was saved, for the last line on the screen.
    """

    def __init__(self, number: int, note: str = ""):
        super().__init__(number)
        self.number = number
        self.note = note


class _Waiting:
    held = False
    number = 0


def handle(number: int, frame: FrameType | None = None) -> None:
    """The signal handler."""
    _Waiting.number = number
    if not _Waiting.held:
        raise Stopped(number)


def hold() -> None:
    """From here on a signal waits."""
    _Waiting.held = True


def check(gather: Callable[[int], list[int]]) -> None:
    """End here if a signal waits, on any rank. gather: everyone's value (ranks.gather); all ranks must ask."""
    number = max(gather(_Waiting.number))
    if number and _Waiting.held:
        release()
        raise Stopped(number)


def release() -> None:
    """Signals no longer wait; one that did is forgotten."""
    _Waiting.held, _Waiting.number = False, 0
