"""Which of several processes stands still, known to all of them without a word from it.

Each rank writes into the store at which they meet, from a thread and twice a second: how often it has come to a place
where ranks wait for each other, a count of its signs of life, and what it is doing; and it reads what the others wrote.
A rank that the others wait for, and that shows no sign for `train.stall_minutes`, ends the run: so does one that leaves
with an error. All ranks then tell the same reason.

    watch.at("step 3, rollout")      what this rank does from here on; activity.tell tells it too
    watch.alive()                    a sign of life, where something is done again and again: it costs an addition
    watch.arrive()                   before this rank waits for others

Signs of life are these, and that the process reads or writes: a model that is downloaded or a checkpoint that is
written slowly is no rank that hangs. Alone, all of this only counts. Not here: the ranks' own words (distributed.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

from zipr1.core import signals
from zipr1.core.errors import InputError, RunError, ZipError
from zipr1.core.judge import Judge, Sign
from zipr1.core.machine import moved
from zipr1.core.text import one_line

EVERY = 0.5  # seconds between two looks
# Looks that a rank which ends leaves to those of which it knows nothing.
HEARD = 3
# Seconds that it leaves to those that live and have not yet told that they know why: their machine is busy, or they
# are dead.
PATIENT = 10.0
# Seconds without a sign of life after which a rank that is to end, and does not, is made to. A launcher gives it 30,
# and then kills it without a word.
GRACE = 20.0
# Bytes a second that a process at work reads or writes at least, where it does nothing else; what a thread that logs
# writes is less.
MOVING = 100_000
# Bytes a second that any disk takes: waiting for them is no standstill.
SLOWEST = 10_000_000

NOTHING = "-"  # in the store


class Ending(NamedTuple):
    """Why all ranks end. ranks: whose fault it is; text: for people; code: what the processes exit with."""

    ranks: list[int]
    code: int
    text: str

    def error(self) -> ZipError:
        error = InputError(self.text) if self.code == InputError.exit_code else RunError(self.text)
        error.exit_code = self.code
        return error


class _Here:
    """This process's sign, as it grows."""

    def __init__(self) -> None:
        self.doing, self.more, self.ended, self.heard = "starting", 0.0, False, False
        self.meetings = self.passes = self.count = 0

    def sign(self) -> Sign:
        return Sign(**vars(self))


_here = _Here()
_watches: list[Watch] = []  # of this process: one or none


def at(doing: str) -> None:
    """What this rank is doing from here on, in a few words."""
    _here.doing = doing
    _here.count += 1


def alive() -> None:
    """Something was done again."""
    _here.count += 1


def arrive(meeting: bool = True) -> None:
    """This rank is about to wait for others, at a place to which all come equally often. meeting: all of them exchange
    a word here; else a part of the work between two such places is done. Raises ZipError if the run is to end."""
    if meeting:
        _here.meetings, _here.passes = _here.meetings + 1, 0
    else:
        _here.passes += 1
    check()


def check() -> None:
    """Raises ZipError if the run is to end."""
    if _watches and _watches[-1].ending is not None:
        raise _watches[-1].ending.error()


@contextlib.contextmanager
def slow(count: int) -> Iterator[None]:
    """Inside, the process waits until `count` bytes are on a disk, and shows no sign of life."""
    _here.more, before = count / SLOWEST, _here.more
    try:
        yield
    finally:
        _here.more = before
        _here.count += 1


def say(message: str, code: int) -> None:
    """Last words of a process that cannot come to the end of its program. The command line puts its own here."""
    print(f"error: {message}", file=sys.stderr, flush=True)


class Watch(threading.Thread):
    """The thread of one rank. store: a connection of its own, for one that waits is waited for. limit: in seconds.
    keeper: the rank in whose process the store is, if it is in one.

    ending: why all ranks end, once it is known.
    """

    def __init__(
        self, store: Any, rank: int, size: int, limit: float, keeper: Sequence[int] = ()
    ) -> None:
        super().__init__(name="watch", daemon=True)
        self.store, self.rank, self.size, self.keeper = store, rank, size, keeper
        store.set_timeout(timedelta(seconds=limit))
        self.every = min(EVERY, limit / 10)
        self.judge = Judge(size, limit)
        self.ending: Ending | None = None
        self._closed = threading.Event()
        self._beat, self._moved = 0, moved()
        self._leaving = False

    def __enter__(self) -> Watch:
        global _here
        _here = _Here()
        for name in ("end", *map(str, range(self.size))):
            self.store.compare_set(name, "", NOTHING)
        self._tell()
        _watches.append(self)
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        _here.ended = True
        self._closed.set()
        _watches.remove(self)
        with contextlib.suppress(RuntimeError):  # the rank that keeps the store may have gone
            self._tell()
            if self.rank in self.keeper:
                self._outstay()
        self.join(HEARD * self.every)  # it ends now, unless the store holds it

    def _outstay(self) -> None:
        """Leave the others the time to hear why all end, before the store goes with this process or the launcher ends
        them for it. The ranks whose fault it is are not waited for: they may never hear."""
        begun = time.monotonic()
        while True:
            deaf = [
                sign
                for rank, (_, sign) in enumerate(self._told())
                if rank not in (self.rank, *(self.ending.ranks if self.ending else ()))
                and not (sign and (sign.ended or sign.heard))
            ]
            lives = self.ending is not None and any(deaf)
            if not deaf or time.monotonic() - begun > (PATIENT if lives else HEARD * self.every):
                return
            time.sleep(self.every / 10)

    def _told(self) -> list[tuple[int, Sign | None]]:
        """What each rank told last."""
        names = [str(rank) for rank in range(self.size)]
        return [_read(text) for text in self.store.multi_get(names)]

    def everyone(self) -> None:
        """Wait until all ranks have come here. Raises ZipError if the run is to end."""
        arrive()
        self._tell()
        while not all(sign and sign.meetings for _, sign in self._told()):
            if self.ending is not None:
                raise self.ending.error()
            time.sleep(self.every / 10)

    def leave(self, error: BaseException) -> None:
        """This rank ends with an error: tell the others, and give them the time to read it. Not of a signal on which
        all have agreed: each ends when it has saved what it has to."""
        if self.ending is not None or (isinstance(error, signals.Stopped) and error.agreed):
            return
        self._leaving = True
        code = getattr(error, "exit_code", 1)
        kind = "" if isinstance(error, ZipError) else f"{type(error).__name__}: "
        said = kind + one_line(error, 400)
        if isinstance(error, signals.Stopped):
            code, said = 128 + error.number, f"stopped by signal {error.number}"
        text = f"rank {self.rank} ended, in {_here.doing!r}: {said}"
        with contextlib.suppress(RuntimeError):
            if self._end(Ending([self.rank], code, text)).ranks == [self.rank]:
                self._outstay()

    def gone(self) -> Ending:
        """Why a word between the ranks broke off. Where nobody has said so, a rank is dead: one that tells nothing any
        more, though it has not ended."""
        try:
            silent = self._silent()
            if self.ending is None:
                return self._end(Ending(silent, 1, self.judge.gone(silent)))
        except RuntimeError:  # the store's: who keeps it is gone
            if self.ending is None:
                self.ending = Ending([*self.keeper], 1, self.judge.gone(self.keeper))
        return self.ending

    def _silent(self) -> list[int]:
        """Ranks that tell nothing any more. Takes a few looks, and longer while a busy machine leaves it open which one
        it is."""
        before, until = self._told(), time.monotonic() + 4 * HEARD * self.every
        time.sleep(HEARD * self.every)
        while True:
            silent = [
                rank
                for rank, (told, now) in enumerate(zip(before, self._told(), strict=True))
                if rank != self.rank and now == told and now[1] and not now[1].ended
            ]
            if len(silent) < 2 or self.ending or time.monotonic() > until:
                return silent
            time.sleep(self.every)

    def run(self) -> None:
        clock, looked = 0.0, time.monotonic()
        try:
            while self.ending is None:
                if self._closed.wait(self.every):
                    return
                # A machine that was suspended, or is too busy for this thread, has not watched.
                now = time.monotonic()
                clock, looked = clock + min(now - looked, 3 * self.every), now
                self._look(clock)
        except RuntimeError:  # the store's: who keeps it is gone
            if self._closed.wait(self.judge.limit):
                return
            self.ending = Ending([], 1, self.judge.gone(self.keeper))
        if self.ending is not None:
            self._part(self.ending)

    def _look(self, clock: float) -> None:
        self._feel()
        self._tell()
        self._hear(clock)
        if self.ending is None and (late := self.judge.stuck(clock)):
            self._end(Ending(late, 1, self.judge.text(late)))

    def _feel(self) -> None:
        """A sign of life, if the process has read or written much since the last look."""
        now = moved()
        if now - self._moved > MOVING * self.every:
            _here.count += 1
        self._moved = now

    def _tell(self) -> None:
        self._beat += 1
        self.store.set(str(self.rank), json.dumps([self._beat, vars(_here.sign())]))

    def _hear(self, clock: float) -> None:
        end, *told = self.store.multi_get(["end", *map(str, range(self.size))])
        if end.decode() != NOTHING:
            self.ending = Ending(*json.loads(end))
        for rank, text in enumerate(told):
            self.judge.note(rank, _read(text)[1], clock)

    def _end(self, ending: Ending) -> Ending:
        """The first reason is everyone's."""
        said = self.store.compare_set("end", NOTHING, json.dumps(ending))
        self.ending = Ending(*json.loads(said))
        return self.ending

    def _part(self, ending: Ending) -> None:
        """See to it that this process ends, wherever it waits; what it is writing, it may finish."""
        signals.hold()  # the launcher's, which comes when the first rank is gone, is not the reason
        with contextlib.suppress(RuntimeError):  # the store may be gone: that may be the reason
            _here.heard = True
            self._tell()
        hangs = self.rank in ending.ranks and not self._leaving
        still, count = 0, _here.count
        while still * self.every < (HEARD * self.every if hangs else GRACE + _here.more):
            if self._closed.wait(self.every):
                return
            self._feel()
            still = still + 1 if hangs or _here.count == count else 0
            count = _here.count
        with contextlib.suppress(RuntimeError):
            self._outstay()
        with contextlib.suppress(OSError, ValueError):
            say(ending.text, ending.code)
        os._exit(ending.code)


def _read(text: bytes) -> tuple[int, Sign | None]:
    """What a rank has told: how often, and its sign."""
    if text.decode() == NOTHING:
        return -1, None
    beat, sign = json.loads(text)
    return beat, Sign(**sign)
