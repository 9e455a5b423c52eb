"""Numbers: the last one in an answer, compared as a value and not as a string."""

from __future__ import annotations

import math
import re

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?%?")
RELATIVE, ABSOLUTE = 1e-6, 1e-9


def value(text: str) -> float | None:
    """The last number of a text ("1,234.5", "-3e2", "25%" = 0.25), or None."""
    for found in reversed(_NUMBER.findall(text)):
        if any(c.isdigit() for c in found):
            number = float(found.rstrip("%").replace(",", ""))
            return number / 100 if found.endswith("%") else number
    return None


def number(said: str, wanted: str) -> float:
    """1.0 if the values agree to one part in a million, else 0.0."""
    heard, right = value(said), value(wanted)
    if heard is None or right is None:
        return 0.0
    return float(math.isclose(heard, right, rel_tol=RELATIVE, abs_tol=ABSOLUTE))
