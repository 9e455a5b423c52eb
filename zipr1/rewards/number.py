"""Numbers: the last one in an answer, compared as a value and not as a string."""

from __future__ import annotations

import math
import re

from zipr1.rewards.exact import exact
from zipr1.rewards.final import final

_NUMBER = re.compile(
    r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?%?"
)
_FRACTION = re.compile(r"\\[dt]?frac\{\s*(-?\d+(?:\.\d+)?)\s*\}\{\s*(-?\d+(?:\.\d+)?)\s*\}")
_DIVIDED = re.compile(r"\A\s*(-?\d+(?:\.\d+)?)\s*/\s*(\d+(?:\.\d+)?)\s*\Z")
RELATIVE, ABSOLUTE = 1e-6, 1e-9
# ChartQA's relaxed accuracy (Masry et al., 2022, after PlotQA).
RELAXED = 0.05


def value(text: str) -> float | None:
    """The last number of a text ("1,234.5", "-3e2", "25%" = 0.25, "\\frac{1}{2}" and a lone "1/2" = 0.5), or None.

    A minus sign that follows a digit is a dash: the last number of "3-4" is 4.
    """
    text = text.replace("\u2212", "-").replace("\\%", "%")
    if match := _DIVIDED.match(text):
        return _quotient(match[1], match[2])
    fractions = list(_FRACTION.finditer(text))
    if fractions and not re.search(r"\d", text[fractions[-1].end() :]):
        sign = -1.0 if text[: fractions[-1].start()].rstrip().endswith("-") else 1.0
        found = _quotient(*fractions[-1].groups())
        return None if found is None else sign * found
    for match in reversed(list(_NUMBER.finditer(text))):
        said = match[0]
        if said[0] in "+-" and text[: match.start()][-1:].isdigit():
            said = said[1:]
        number = float(said.rstrip("%").replace(",", ""))
        return number / 100 if said.endswith("%") else number
    return None


def number(said: str, wanted: str, tolerance: float = RELATIVE) -> float:
    """1.0 if the values differ by at most `tolerance` of the right one, else 0.0."""
    heard, right = value(final(said)), value(final(wanted))
    if heard is None or right is None:
        return 0.0
    return float(_near(heard, right, tolerance))


def relaxed(said: str, wanted: str) -> float:
    """1.0 if the values differ by at most 5 % of the right one, or, where that is no lone number, the words agree."""
    right = final(wanted)
    if re.fullmatch(rf"\s*[$€£]?\s*(?:{_NUMBER.pattern})\s*", right) and value(right) is not None:
        return number(said, wanted, RELAXED)
    return exact(said, wanted)


def regression(said: str, wanted: str) -> float:
    """1 minus the relative error of the value, not below 0 (Video-R1's `regression`); 0.0 without a number."""
    heard, right = value(final(said)), value(final(wanted))
    if heard is None or right is None or not math.isfinite(heard):
        return 0.0
    return 1.0 - min(1.0, abs(heard - right) / max(abs(right), ABSOLUTE))


def _near(heard: float, right: float, tolerance: float) -> bool:
    return abs(heard - right) <= max(tolerance * abs(right), ABSOLUTE)


def _quotient(over: str, under: str) -> float | None:
    return float(over) / float(under) if float(under) else None
