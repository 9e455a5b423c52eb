"""Text for people: durations, sizes, and the reason of an error, each on one line."""

from __future__ import annotations


def one_line(value: object, most: int | None = None) -> str:
    """Any text with its white space made single spaces; what is over `most` characters is left out."""
    text = " ".join(str(value).split())
    return text if most is None else text[:most]


def reason(error: BaseException, most: int = 200) -> str:
    """What an exception says, as it may stand in brackets inside of a message."""
    return one_line(error, most)


def duration(seconds: float) -> str:
    """`45 s`, `12 min 5 s`, `3 h 7 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def number(count: int, what: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def mib(count: float) -> str:
    """Bytes as a number of MiB, for a column whose heading names the unit: `1,234.5`."""
    return f"{count / 2**20:,.1f}"


def size(count: float) -> str:
    """Bytes: `512 B`, `1.5 KiB`, `120 MiB`; one decimal below a hundred of a unit."""
    for unit, one in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= one:
            return f"{count / one:,.{0 if count >= 100 * one else 1}f} {unit}"
    return f"{count:.0f} B"


def times(speedup: float | None) -> str:
    """How many times faster than dense, above 1 is faster, which is all that `x` means in zipr1; nothing for None."""
    return "" if speedup is None else f"{speedup:.2f}x"
