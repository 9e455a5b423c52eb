"""What a command is doing at this moment, for who waits: any room tells, the command line shows.

    activity.tell("reading questions", 120, 2000)      where something takes long; the numbers where they are known
    with activity.shown(console):                      around a command: a spinner in a terminal, else a line a minute

Outside of `shown`, telling shows nothing: a program that uses zipr1 as a library stays silent. Other processes of the
same run hear of it (watch.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from zipr1.core import watch

T = TypeVar("T")

EVERY = 60.0  # seconds between two lines where nobody watches


class _Shown(Protocol):
    def show(self, what: str, count: str) -> None: ...

    def spoke(self) -> None: ...

    def close(self) -> None: ...


_open: list[_Shown] = []
_told: list[tuple[str, int | None, int | None]] = [("", None, None)]  # the newest alone


def tell(what: str, done: int | None = None, total: int | None = None) -> None:
    """Show `what`, and `done` of `total`; an empty `what` shows nothing until the next call."""
    _told[:] = [(what, done, total)]
    count = "" if done is None else f" {done:,}" if total is None else f" {done:,} of {total:,}"
    if what:
        watch.at(what + count)
    if _open:
        _open[-1].show(what, count)


def spoke() -> None:
    """A line was printed that says how far it is: the next one that nobody asked for is due EVERY seconds from now."""
    if _open:
        _open[-1].spoke()


def counted(what: str, items: Sequence[T] | Iterable[T], total: int | None = None) -> Iterator[T]:
    """The items one by one, telling before each how many are done, and at the end again what was told before."""
    if total is None and isinstance(items, Sequence):
        total = len(items)
    (before,) = _told
    for number, item in enumerate(items):
        tell(what, number, total)
        yield item
    tell(*before)


@contextmanager
def shown(console: Console) -> Iterator[None]:
    """While the block runs, what is told is shown through `console`, and nothing where that is quiet.

    The console should have a file of its own (`Console(file=sys.stdout)`): sys.stdout may be swallowed for a while.
    """
    if console.quiet:
        yield
        return
    watched = console.is_terminal and not console.is_dumb_terminal
    shown: _Shown = _Spinner(console) if watched else _Lines(console)
    _open.append(shown)
    try:
        yield
    finally:
        _open.remove(shown)
        shown.close()


class _Spinner:
    """One line that is gone at the end. It starts and stops with what is told, for other displays come between."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._what = ""

    def show(self, what: str, count: str) -> None:
        if not what:
            return self.close()
        if self._progress is None:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._progress.add_task(what, total=None)
            self._progress.start()
        if what != self._what:  # another thing: its own time
            self._progress.reset(self._progress.task_ids[0], total=None)
        self._what = what
        self._progress.update(self._progress.task_ids[0], description=what + count)

    def spoke(self) -> None:
        pass

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class _Lines:
    """What is under way, as a line each EVERY seconds in which nothing else was printed."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._text, self._began = "", time.monotonic()
        self._last = self._began
        self._end = threading.Event()
        threading.Thread(target=self._tick, name="activity", daemon=True).start()

    def show(self, what: str, count: str) -> None:
        self._text = what and what + count

    def spoke(self) -> None:
        self._last = time.monotonic()

    def close(self) -> None:
        self._end.set()

    def _wait(self) -> float:
        """Seconds to the next line."""
        return max(0.0, self._last + EVERY - time.monotonic())

    def _tick(self) -> None:
        while not self._end.wait(self._wait()):
            if self._wait() > 0:  # a line came between
                continue
            self._last = time.monotonic()
            if text := self._text:
                minutes = round((time.monotonic() - self._began) / 60)
                line = f"{text} ({minutes} min since the start)"
                self._console.print(line, markup=False, highlight=False, soft_wrap=True)
