"""Which of several ranks the others wait for in vain, from what each tells of itself (watch.py), and words for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zipr1.core.text import duration

ADVICE = "what is saved is complete, the same command with --output goes on"


@dataclass(frozen=True)
class Sign:
    """What a rank tells. meetings: words that it has exchanged with the others; passes: places where it waited for them
    since; count: of signs of life; more: seconds beyond the limit that what it does may take; ended: it needs nobody
    any more; heard: it knows why all end."""

    doing: str
    meetings: int = 0
    passes: int = 0
    count: int = 0
    more: float = 0.0
    ended: bool = False
    heard: bool = False


class Judge:
    """Which ranks the others wait for in vain, from what all tell. limit: seconds without a sign of life."""

    def __init__(self, size: int, limit: float) -> None:
        self.limit = limit
        self.signs: list[Sign | None] = [None] * size
        self.since = [0.0] * size

    def note(self, rank: int, sign: Sign | None, now: float) -> None:
        if sign != self.signs[rank]:
            self.signs[rank], self.since[rank] = sign, now

    def stuck(self, now: float) -> list[int]:
        """None while one of those that are not as far as the others is at work: it is waited for rightly."""
        far = {
            rank: (sign.meetings, sign.passes) if sign else (-1, 0)
            for rank, sign in enumerate(self.signs)
            if sign is None or not sign.ended
        }
        if len(far) < 2:
            return []  # nobody waits
        late = [rank for rank, place in far.items() if place == min(far.values())]
        return late if all(self._is_still(rank, now) for rank in late) else []

    def _is_still(self, rank: int, now: float) -> bool:
        sign = self.signs[rank]
        return now - self.since[rank] > self.limit + (sign.more if sign else 0.0)

    def text(self, late: Sequence[int]) -> str:
        """What is told of `stuck` ranks: who, since when, where they were last, and where the others are."""
        limit = duration(self.limit)
        signs = {rank: self.signs[rank] for rank in late}
        parts = []
        if never := [rank for rank, sign in signs.items() if sign is None]:
            parts.append(f"{_named(never)} did not come within {limit}")
        if silent := {rank: sign.doing for rank, sign in signs.items() if sign is not None}:
            has = "has" if len(silent) == 1 else "have"
            parts.append(
                f"{_named(list(silent))} {has} shown no sign of life for {limit}, last seen in {_places(silent)}"
            )
        waiting = {
            rank: sign.doing
            for rank, sign in enumerate(self.signs)
            if rank not in late and sign is not None and not sign.ended
        }
        if waiting:
            parts.append(
                f"{_named(list(waiting))} {'waits' if len(waiting) == 1 else 'wait'} in {_places(waiting)}"
            )
        return "; ".join([*parts, f"{ADVICE} (train.stall_minutes sets the limit)"])

    def gone(self, dead: Sequence[int]) -> str:
        """What is told of ranks whose word broke off; none: nobody knows which one it was."""
        if not dead:
            return f"another rank is gone, the launcher names it below (Root Cause); {ADVICE}"
        last = {rank: sign.doing for rank in dead if (sign := self.signs[rank])}
        return f"{_named(dead)} {'is' if len(dead) == 1 else 'are'} gone, last seen in {_places(last)}; {ADVICE}"


def _named(ranks: Sequence[int]) -> str:
    *most, last = [str(rank) for rank in ranks]
    return f"ranks {', '.join(most)} and {last}" if most else f"rank {last}"


def _places(doing: dict[int, str]) -> str:
    """What ranks are doing; of several that do not do the same, who does what."""
    places: dict[str, list[int]] = {}
    for rank, what in doing.items():
        places.setdefault(what, []).append(rank)
    if len(places) == 1:
        return repr(next(iter(places)))
    return ", ".join(f"{what!r} ({_named(ranks)})" for what, ranks in places.items())
