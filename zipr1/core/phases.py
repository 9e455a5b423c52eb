"""Where the time of a forward pass goes: named phases of our own code, such as `scoring` and `selection`.

    with phase("scoring"):        in the code that is measured
        ...
    with watch.listening():       seconds by phase, for zipr1 profile
    with torch.profiler.profile() as trace:       a user's trace shows them as zipr1/scoring

Without a stopwatch or a profiler in this thread a phase does nothing.
"""

from __future__ import annotations

import contextlib
import sys
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
    """What runs inside belongs to this phase: of the stopwatch that listens, and of a running trace of torch's."""
    watch: Stopwatch | None = getattr(_state, "watch", None)
    torch = sys.modules.get("torch")  # core loads no torch; where none is loaded, none traces
    if torch is None or not torch.autograd._profiler_enabled():
        return _NOTHING if watch is None else watch.phase(name)
    span: contextlib.AbstractContextManager[Any] = torch.profiler.record_function(f"zipr1/{name}")
    return span if watch is None else _both(span, watch.phase(name))


@contextlib.contextmanager
def _both(
    outer: contextlib.AbstractContextManager[Any], inner: contextlib.AbstractContextManager[Any]
) -> Iterator[None]:
    with outer, inner:
        yield
