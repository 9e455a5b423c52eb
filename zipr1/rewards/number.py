"""Numbers: the one that an answer settles on (quantities.py), compared as a value and not as a string."""

from __future__ import annotations

import re

from zipr1.rewards.exact import exact
from zipr1.rewards.final import final
from zipr1.rewards.quantities import ANSWER, Quantity, quantity

RELATIVE, ABSOLUTE = 1e-6, 1e-9
# ChartQA's relaxed accuracy (Masry et al., 2022, after PlotQA).
RELAXED = 0.05
# "red, blue" and "red and blue" are one list.
_LISTED = re.compile(r"(?<=\s)and(?=\s)|&", re.IGNORECASE)


def value(text: str) -> float | None:
    """The number that a text settles on ("1,234.5", "-3e2", "2 \\times 10^3", "25 %" = 0.25, "\\frac{1}{2}" and "1/2"
    = 0.5, "1.5 million", "minus five"), or None; None, too, for a list, a range, a bound, a date or a root."""
    found = quantity(final(text))
    if found is None or len(found.values) > 1 or found.bound:
        return None
    return found.values[0]


def number(prediction: str, reference: str, tolerance: float = RELATIVE) -> float:
    """1.0 if the values differ by at most `tolerance` of the right one, else 0.0.

    Several numbers, as of a list or a range, are compared one by one; a right answer without a number by its words.
    Where one of the two alone is in percent, "12 %" is 12 as well as 0.12: what was asked for is not known.
    """
    right = quantity(final(reference))
    if right is None:
        return exact(prediction, reference)
    return float(
        any(_near(ours, theirs, tolerance) for ours, theirs in _readings(prediction, right))
    )


def relaxed(prediction: str, reference: str) -> float:
    """1.0 if the values differ by at most 5 % of the right one, or, where that is no lone number, the words agree.

    For training: lenient about form ("The answer is 45"), where the benchmark (`chartqa`) is not. "12 %" is 0.12.
    """
    heard, right = (_LISTED.sub(" ", final(text)) for text in (prediction, reference))
    answers = [found.end() for found in ANSWER.finditer(heard)]
    if exact(heard, right) or (answers and exact(heard[answers[-1] :], right)):
        return 1.0
    asked = quantity(final(reference))
    if asked is None or not asked.alone or asked.bound:
        return 0.0
    ours, theirs = next(iter(_readings(prediction, asked)), ((), ()))
    # Of a list, a range or a date each part must be right.
    tolerance = RELAXED if len(theirs) == 1 else RELATIVE
    return float(bool(ours) and _near(ours, theirs, tolerance))


def chartqa(prediction: str, reference: str) -> float:
    """1.0 if ChartQA's evaluation counts the answer as right, else 0.0: to measure as the benchmark does.

    Both must be numbers as they stand ("5", "5.0", "5%" = 0.05) to be compared within 5 % of the right one; all else,
    and a right answer of 0, must be the same text but for the case of letters. Nothing is looked for inside of the
    answer: no tags, boxes, units or separators of thousands.
    """
    ours, theirs = _bare(prediction), _bare(reference)
    if ours is None or not theirs:
        return float(prediction.lower() == reference.lower())
    return float(abs(ours - theirs) / abs(theirs) <= RELAXED)


def regression(prediction: str, reference: str) -> float:
    """1 minus the relative error of the value, not below 0 (Video-R1's `regression`); 0.0 without a number. Where the
    right answer is not one number it is compared as by `number`."""
    right = quantity(final(reference))
    if right is None or right.compound or len(right.values) > 1:
        return number(prediction, reference)
    return max(
        (
            1.0 - min(1.0, abs(ours[0] - theirs[0]) / max(abs(theirs[0]), ABSOLUTE))
            for ours, theirs in _readings(prediction, right)
        ),
        default=0.0,
    )


def _readings(said: str, right: Quantity) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
    """Pairs of values to compare, of which one must agree; none where it is another thing that is said."""
    single = not right.compound and len(right.values) == 1
    asked = right.values[0]
    year = single and asked == int(asked) and 1000 <= asked < 3000
    heard = quantity(final(said), year)
    if heard is None or heard.bound != right.bound:
        return []
    if heard.compound and year:  # a date says its year
        return [((part,), right.values) for part in heard.values if 1000 <= part < 3000]
    if (heard.compound, len(heard.values)) != (right.compound, len(right.values)):
        return []
    if any(
        a and b and a != b for a, b in ((heard.unit, right.unit), (heard.currency, right.currency))
    ):
        return []
    pairs = [(heard.values, right.values)]
    if heard.share and not right.share:
        pairs.append((tuple(100 * value for value in heard.values), right.values))
    if right.share and not heard.share:
        pairs.append((heard.values, tuple(100 * value for value in right.values)))
    return pairs


def _near(heard: tuple[float, ...], right: tuple[float, ...], tolerance: float) -> bool:
    return all(
        abs(ours - theirs) <= max(tolerance * abs(theirs), ABSOLUTE)
        for ours, theirs in zip(heard, right, strict=True)
    )


def _bare(text: str) -> float | None:
    """What Python reads as a number, "5%" as 0.05; None otherwise."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
