"""Where the time of a forward pass goes: named phases, which cost nothing unless a stopwatch listens in this thread."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

_state = threading.local()
_NOTHING = contextlib.nullcontext()


class Stopwatch:
    """Seconds by phase. Exclusive: while a phase inside another runs, the outer one stands still.

    sync: waits for the device, at both ends of each phase; None for a CPU.
    """

    def __init__(self, sync: Callable[[], None] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._sync = sync
        self._open: list[str] = []
        self._since = 0.0

    def _turn(self) -> None:
        if self._sync is not None:
            self._sync()
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def enter(self, name: str) -> None:
        self._turn()
        self._open.append(name)

    def leave(self) -> None:
        self._turn()
        self._open.pop()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    @contextlib.contextmanager
    def listening(self) -> Iterator[Stopwatch]:
        """Inside, `phase` of this thread is counted here."""
        _state.watch = self
        try:
            yield self
        finally:
            _state.watch = None


def phase(name: str) -> contextlib.AbstractContextManager[Any]:
    """What runs inside belongs to this phase."""
    watch: Stopwatch | None = getattr(_state, "watch", None)
    return _NOTHING if watch is None else watch.phase(name)
