"""Numbers: the last one in an answer, compared as a value and not as a string."""

from __future__ import annotations

import math
import re
import unicodedata

from zipr1.rewards.exact import exact
from zipr1.rewards.final import final

_NUMBER = re.compile(
    r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:\s*(?:%|per\s?cent\b))?"
)
_FRACTION = re.compile(r"\\[dt]?frac\{\s*(-?\d+(?:\.\d+)?)\s*\}\{\s*(-?\d+(?:\.\d+)?)\s*\}")
# "3/4", "1 1/2"; but no date or path ("3/4/2020").
_DIVIDED = re.compile(
    r"(?<![\d/.,])(?:(\d+)\s+)?(?<![\d/.,])(\d+(?:\.\d+)?)\s*/\s*(\d+(?:\.\d+)?)(?![\d/%]|[.,]\d)"
)
_MINUS = re.compile(r"(?<![\d)])(?<![\d)]\s)-\s?$")
# What is written otherwise: "\frac12", "2 \times 10^{3}", "10^3", and exponents of units ("5 m^2"), which count no more
# than those of typesetters do ("5 m²").
_SHORT = re.compile(r"(\\[dt]?frac)\s*(\d)\s*(\d)(?!\d)")
_POWER = re.compile(
    r"(?:(?<![\w.])|(\d)\s*(?:\\times|\\cdot|[x×*·])\s*)10\s*(?:\^\s*\{?\s*([-+]?\d{1,3})\b\s*\}?|([⁺⁻]?[⁰¹²³⁴-⁹]{1,3}))"
)
_UNIT = re.compile(r"(?<=[A-Za-z}])\s*\^\s*\{?\s*[-+]?\d+\s*\}?")
_ROOT = re.compile(r"(?:\\sqrt\s*(?:\[\d+\])?\s*\{?|√\s*)\s*$")
_RAISED = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "+-0123456789")
RELATIVE, ABSOLUTE = 1e-6, 1e-9
# ChartQA's relaxed accuracy (Masry et al., 2022, after PlotQA).
RELAXED = 0.05


def value(text: str) -> float | None:
    """The last number of a text ("1,234.5", "-3e2", "2 \\times 10^3", "25 %" = 0.25, "\\frac{1}{2}" and "1/2" = 0.5),
    or None; None, too, if it stands under a root.

    A minus sign that follows a digit is a dash: the last number of "3-4" is 4.
    """
    text = _written(text)
    found: list[tuple[int, float | None]] = []
    for match in _FRACTION.finditer(text):
        found.append((match.end(), _signed(text, match, _quotient(match[1], match[2]))))
    for match in _DIVIDED.finditer(text):
        part = _quotient(match[2], match[3])
        if part is not None and match[1]:
            part += float(match[1])
        found.append((match.end(), _signed(text, match, part)))
    end, last = max(found, default=(-1, None), key=lambda one: one[0])
    for match in reversed(list(_NUMBER.finditer(text))):
        if match.end() <= end:
            return last
        if _ROOT.search(text, 0, match.start()):
            return None
        said = match[0]
        if said[0] in "+-" and text[: match.start()][-1:].isdigit():
            said = said[1:]
        number = float(re.sub(r"[,%\s]|per\s?cent", "", said))
        return number / 100 if _is_share(said) else number
    return last


def number(said: str, wanted: str, tolerance: float = RELATIVE) -> float:
    """1.0 if the values differ by at most `tolerance` of the right one, else 0.0."""
    return float(any(_near(heard, right, tolerance) for heard, right in _values(said, wanted)))


def relaxed(said: str, wanted: str) -> float:
    """1.0 if the values differ by at most 5 % of the right one, or, where that is no lone number, the words agree."""
    right = final(wanted)
    if re.fullmatch(rf"\s*[$€£]?\s*(?:{_NUMBER.pattern})\s*", right) and value(right) is not None:
        heard, exactly = value(final(said)), value(right)
        return float(heard is not None and exactly is not None and _near(heard, exactly, RELAXED))
    return exact(said, wanted)


def regression(said: str, wanted: str) -> float:
    """1 minus the relative error of the value, not below 0 (Video-R1's `regression`); 0.0 without a number."""
    return max(
        (
            1.0 - min(1.0, abs(heard - right) / max(abs(right), ABSOLUTE))
            for heard, right in _values(said, wanted)
            if math.isfinite(heard)
        ),
        default=0.0,
    )


def _values(said: str, wanted: str) -> list[tuple[float, float]]:
    """What to compare. Where one of the two alone is in percent, "12 %" is 12 as well as 0.12: what was asked for is
    not known."""
    heard, right = value(final(said)), value(final(wanted))
    if heard is None or right is None:
        return []
    shares = [_is_share(_written(final(text)).rstrip(" .")) for text in (said, wanted)]
    other = {(True, False): (heard * 100, right), (False, True): (heard, right * 100)}
    return [(heard, right), *([other[shares[0], shares[1]]] if shares[0] != shares[1] else [])]


def _written(text: str) -> str:
    """The text with one way of writing a number for all."""
    text = "".join(
        f" {unicodedata.normalize('NFKC', c)} "
        if unicodedata.decomposition(c).startswith("<fraction>")
        else c
        for c in text
    )
    for old, new in (("−", "-"), ("–", "-"), ("⁄", "/"), ("％", "%"), ("\\%", "%"), ("{,}", ",")):
        text = text.replace(old, new)
    text = re.sub(r"(?<=\d)(?:\\[,!; ]|[\u00a0\u2009\u202f])(?=\d{3})", "", text)
    text = _SHORT.sub(r"\1{\2}{\3}", text)
    text = _POWER.sub(
        lambda m: f"{m[1] or 1}e{(m[2] or m[3].translate(_RAISED)).removeprefix('+')}", text
    )
    return _UNIT.sub("", text)


def _signed(text: str, match: re.Match[str], found: float | None) -> float | None:
    minus = _MINUS.search(text, 0, match.start())
    return -found if found is not None and minus else found


def _is_share(said: str) -> bool:
    """Whether a text ends in percent."""
    return bool(re.search(r"\d\s*(?:%|per\s?cent)$", said))


def _near(heard: float, right: float, tolerance: float) -> bool:
    return abs(heard - right) <= max(tolerance * abs(right), ABSOLUTE)


def _quotient(over: str, under: str) -> float | None:
    return float(over) / float(under) if float(under) else None
