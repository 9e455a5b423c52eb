"""SIGTERM and Ctrl-C: the run ends where its checkpoint is true.

During rollout a signal aborts, and the state before the step is saved; after `optimizer.step` it waits for the end of
the step. Several ranks wait for a place where all of them agree.

One signal is enough: while it takes the process out, another one changes nothing, so that what is cleaned up on the way
is cleaned up whole.

`handled` puts the handlers in place and takes them back; `scope` is what `hold` is good for, and ends with it. So a
program that calls the trainer, or a test, finds its signals as they were.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType


class Stopped(BaseException):
    """A signal asked the process to end. No Exception: nothing on the way up may take it for a failure.

    note: what was saved, for the last line on the screen. agreed: all ranks end with it.
    """

    def __init__(self, number: int, note: str = "", agreed: bool = False):
        super().__init__(number)
        self.number = number
        self.note = note
        self.agreed = agreed


@dataclass
class _Scope:
    """held: whether signals wait; number: of the one that does, or 0."""

    held: bool = False
    number: int = 0


_scopes: list[_Scope] = []  # the innermost last


@contextlib.contextmanager
def handled(last: bool = False) -> Iterator[None]:
    """Inside, SIGTERM and SIGINT raise `Stopped`, or wait; afterwards their handlers are those of before. A signal that
    was ignored stays so. Only in the main thread. last: the process ends afterwards, and they are ignored instead:
    Python would tell of them with a traceback."""
    before = {}
    with scope():
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                old = signal.getsignal(number)
                # None: set by something other than Python, which cannot put it back.
                if old is not signal.SIG_IGN and old is not None:
                    before[number] = old
                    signal.signal(number, handle)
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, signal.SIG_IGN if last else old)


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Inside, `hold` has an effect; it ends here at the latest, with what waits."""
    _scopes.append(_Scope())
    try:
        yield
    finally:
        _scopes.pop()


def handle(number: int, frame: FrameType | None = None) -> None:
    """The signal handler."""
    if _leaving():
        return
    if not (_scopes and _scopes[-1].held):
        raise Stopped(number)
    _scopes[-1].number = number


def _leaving() -> bool:
    """Whether a `Stopped` is on its way up at this moment. Not after foreign code has swallowed it: then the next
    signal is the first one again."""
    error = sys.exception()
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error is not None


def hold() -> None:
    """From here to the end of the innermost `scope` a signal waits. Without one nobody would let it go: no effect."""
    if _scopes:
        _scopes[-1].held = True


def check(gather: Callable[[int], list[int]]) -> None:
    """End here if a signal waits, on any rank. gather: everyone's value (distributed.gather); all ranks must ask."""
    here = _scopes[-1] if _scopes else _Scope()
    number = max(gather(here.number))
    if number and here.held:
        release()
        raise Stopped(number, agreed=True)


def release() -> None:
    """Signals no longer wait; one that did is forgotten."""
    if _scopes:
        _scopes[-1] = _Scope()
