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
_LONE_NUMBER = re.compile(rf"\s*[$€£]?\s*(?:{_NUMBER.pattern})\s*")
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
    fractions: list[tuple[int, float | None]] = []  # where each ends, and its value
    for match in _FRACTION.finditer(text):
        fractions.append((match.end(), _signed(text, match, _quotient(match[1], match[2]))))
    for match in _DIVIDED.finditer(text):
        part = _quotient(match[2], match[3])
        if part is not None and match[1]:
            part += float(match[1])
        fractions.append((match.end(), _signed(text, match, part)))
    end, last = max(fractions, default=(-1, None), key=lambda one: one[0])
    for match in reversed(list(_NUMBER.finditer(text))):
        if match.end() <= end:
            return last
        if _ROOT.search(text, 0, match.start()):
            return None
        written = match[0]
        if written[0] in "+-" and text[: match.start()][-1:].isdigit():
            written = written[1:]
        number = float(re.sub(r"[,%\s]|per\s?cent", "", written))
        return number / 100 if _is_percentage(written) else number
    return last


def number(prediction: str, reference: str, tolerance: float = RELATIVE) -> float:
    """1.0 if the values differ by at most `tolerance` of the right one, else 0.0."""
    return float(
        any(
            _near(predicted, expected, tolerance)
            for predicted, expected in _values(prediction, reference)
        )
    )


def relaxed(prediction: str, reference: str) -> float:
    """1.0 if the values differ by at most 5 % of the right one, or, where that is no lone number, the words agree."""
    expected = value(final(reference))
    if expected is not None and _LONE_NUMBER.fullmatch(final(reference)):
        predicted = value(final(prediction))
        return float(predicted is not None and _near(predicted, expected, RELAXED))
    return exact(prediction, reference)


def regression(prediction: str, reference: str) -> float:
    """1 minus the relative error of the value, not below 0 (Video-R1's `regression`); 0.0 without a number."""
    return max(
        (
            1.0 - min(1.0, abs(predicted - expected) / max(abs(expected), ABSOLUTE))
            for predicted, expected in _values(prediction, reference)
            if math.isfinite(predicted)
        ),
        default=0.0,
    )


def _values(prediction: str, reference: str) -> list[tuple[float, float]]:
    """What to compare. Where one of the two alone is in percent, "12 %" is 12 as well as 0.12: what was asked for is
    not known."""
    predicted, expected = value(final(prediction)), value(final(reference))
    if predicted is None or expected is None:
        return []
    in_percent, expected_in_percent = (
        _is_percentage(_written(final(text)).rstrip(" .")) for text in (prediction, reference)
    )
    pairs = [(predicted, expected)]
    if in_percent and not expected_in_percent:
        pairs.append((predicted * 100, expected))
    elif expected_in_percent and not in_percent:
        pairs.append((predicted, expected * 100))
    return pairs


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


def _signed(text: str, match: re.Match[str], number: float | None) -> float | None:
    minus = _MINUS.search(text, 0, match.start())
    return -number if number is not None and minus else number


def _is_percentage(text: str) -> bool:
    """Whether a text ends in percent."""
    return bool(re.search(r"\d\s*(?:%|per\s?cent)$", text))


def _near(predicted: float, expected: float, tolerance: float) -> bool:
    return abs(predicted - expected) <= max(tolerance * abs(expected), ABSOLUTE)


def _quotient(over: str, under: str) -> float | None:
    return float(over) / float(under) if float(under) else None
