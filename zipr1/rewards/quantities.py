"""Which number does an answer settle on? Text -> Quantity, for the rewards that compare numbers (number.py)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from zipr1.rewards.spelled import halves, in_digits
from zipr1.rewards.words import CURRENCIES, evened, ungrouped

# How far around a number is looked for what it means, in characters.
WINDOW = 40
_DECIMAL = r"\d+(?:\.\d+)?"
_NUMBER = re.compile(
    rf"""
    (?<! [A-Za-z0-9_] ) (?<! [A-Za-z]- ) (?<! \d\. )  # not the 2 of H2O, the 19 of COVID-19
    (?: (?P<european> \d{{1,3}} (?: \.\d{{3}} )+ ,\d+ (?! [\d,] ) | \d{{1,3}} (?: \.\d{{3}} ){{2,}} (?! \.?\d ) )
    # A time, a date, a version: several numbers that are none together.
    | (?P<compound> \d+ (?: :\d+ )+ | \d+ (?: -\d+ ){{2,}} | \d+ (?: /\d+ ){{2,}} | \d+ (?: \.\d+ ){{2,}} )
    | (?: (?P<whole> \d{{1,3}} ) \s )? (?P<over> {_DECIMAL} ) \s?/\s? (?P<under> {_DECIMAL} ) (?! [\d%/] | [.,]\d )
    | (?P<comma> (?<! [(\[{{] ) (?<! \d, ) \d+,\d+ (?! [\d,] | \.\d ) )
    | (?P<plain> (?: {_DECIMAL} | \.\d+ ) (?: [eE][-+]?\d{{1,4}} (?!\d) )? )
    )""",
    re.VERBOSE,
)
# Before a number.
_MINUS = re.compile(
    rf"(?<![\w)\]}}%])(?<![\d)\]}}%]\s)-\s?(?=[{CURRENCIES}]?\s?$)|(?i:\b(?:minus|negative))\s[{CURRENCIES}]?$"
)
_MONEY = re.compile(rf"[{CURRENCIES}](?=\s?-?\s?$)")
_BOUND = re.compile(
    rf"""
    (?: (?P<sign> [<>≤≥]=? )
    | \b(?: (?P<less> less|fewer|lower|smaller ) | (?P<more> more|greater|higher|larger ) )\sthan
        (?P<equal> \sor\sequal\sto )?
    | \b(?: (?P<most> at\smost | up\sto ) | (?P<least> at\sleast ) )
    | (?: \A | \b(?:is|was|are)\s ) (?:just\s|well\s)? (?: (?P<under> under|below ) | (?P<over> over|above ) )
    ) \s? [{CURRENCIES}]? \s? -? \s? \Z""",
    re.IGNORECASE | re.VERBOSE,
)
_ROOT = re.compile(
    r"(?:\b(?:sqrt|log|ln|exp|sin|cos|tan)\s?\(?|\\sqrt\s?(?:\[\d+\])?\s?\{?|√\s?|\}\s?\{|\}\s?/\s?|\^\s?\{?)-?\s?$"
)
_MARGIN = re.compile(r"(?:±|\+/-|\+-)\s?$")
_YEAR = re.compile(
    r"(?:\b(?:in|since|during|by|until|till|from|of|for|year|years)\s|\()$", re.IGNORECASE
)
_LABEL = re.compile(
    r"\d\S{0,6}\s(?:out\s)?of(?:\sthe)?\s$|\b(?:figure|fig\.?|table|page|step|question|chart|item|section|row|column)\s?#?$"
    r"|\b(?:jan|feb|mar|apr|may|june?|july?|aug|sept?|oct|nov|dec)[a-z]{0,6}\.?\s$",
    re.IGNORECASE,
)
_DENIED = re.compile(
    rf"(?:\b(?:not|never|instead\sof|rather\sthan)|n't)\s(?:about\s)?[{CURRENCIES}]?-?$",
    re.IGNORECASE,
)
# After it.
_SCALES = {
    "hundred": 1e2,
    "thousand": 1e3,
    "million": 1e6,
    "billion": 1e9,
    "trillion": 1e12,
    "dozen": 12,
    "k": 1e3,
    "m": 1e6,
    "mn": 1e6,
    "mln": 1e6,
    "b": 1e9,
    "bn": 1e9,
    "tn": 1e12,
}
_SCALE = re.compile(
    r"([kK])(?![\w^])|\s?(M|B|mn|mln|bn|tn)(?![\w^])|[\s-]?((?i:hundred|thousand|million|billion|trillion|dozen))s?\b"
)
_SHARE = re.compile(r"\s?(?:%|(?i:per\s?cent(?:age)?|pct)\b)")
_MONEY_AFTER = re.compile(rf"\s?([{CURRENCIES}])")
_UNIT = re.compile(r"\s?(°\s?[CFK]?\b|°|[A-Za-zµμΩ]{1,3}(?:/[A-Za-z]{1,3})?2?3?)(?![A-Za-z\d])")
# What follows a number and measures nothing.
_NO_UNITS = {"in", "of", "to", "at", "on", "is", "for", "by", "and", "or", "per", "as", "out"}
_NO_UNITS |= {"are", "was", "the", "but", "so", "not", "if", "it", "we", "vs", "a", "an", "i", "x"}
_NO_UNITS |= {"st", "nd", "rd", "th", "s"}
_SAME_UNITS = {"hr": "h", "hrs": "h", "sec": "s", "kgs": "kg", "lbs": "lb", "yrs": "yr"}
_TIMES_ROOT = re.compile(r"\s?(?:\\pi|π|√|\\sqrt|\^)")
_OR_MORE = re.compile(
    r"(\+(?!\s?[\w(])|\sor\s(?:more|above|greater|higher)\b|\sat\sleast\b)"
    r"|\sor\s(?:less|fewer|below|lower)\b|\sat\smost\b"
)
# Between two: neither is the one.
_JOINED = re.compile(
    rf"(?:[a-z]\s?(?=[+*×-]))?[\s)\]}}]*(?:,\s?(?:and|or)|[,;&/×*+~'-]|\b(?:and|or|to|vs\.?)\b)[\s(\[{{{CURRENCIES}-]*",
    re.IGNORECASE,
)
ANSWER = re.compile(
    r"\banswer\b\W{0,3}(?:(?:is|was|would\sbe|should\sbe|must\sbe|=)\b|:|=)|答案\s?(?:是|为|:)",
    re.IGNORECASE,
)

# What follows gives reasons, unless it comes to a conclusion again.
_REASONS = re.compile(r"\bbecause\b|,\s(?:as|since)\s", re.IGNORECASE)
_CONCLUSION = re.compile(r"\b(?:so|thus|therefore|hence|total|finally|answer)\b", re.IGNORECASE)
_FIRST_LINE = re.compile(r"[^\n]*\n\s*(?=[^\W\d])")

# One way of writing a number for all.
_SPACED = re.compile(r"\\[,!;: ]|\{,\}")
_FRACTION = re.compile(
    rf"\\[dt]?frac\s?(?:\{{\s?(-?{_DECIMAL})\s?\}}\s?\{{\s?(-?{_DECIMAL})\s?\}}|(\d)\s?(\d)(?!\d))"
)
_COMMANDS = {
    "times": " × ",
    "cdot": " × ",
    "pm": " ± ",
    "le": " ≤ ",
    "leq": " ≤ ",
    "ge": " ≥ ",
    "geq": " ≥ ",
    "approx": " ≈ ",
    "circ": "°",
    "pi": r"\pi ",
    "sqrt": r"\sqrt",
    "frac": r"\frac",
    "dfrac": r"\frac",
    "tfrac": r"\frac",
}
_COMMAND = re.compile(r"\\([A-Za-z]+)\s?")
_DEGREES = re.compile(r"\^\s?(?:\{\s?°\s?\}|°)")
_RAISED = r"\s?(?:\^|\*\*)\s?(?:\{\s?([-+]?\d{1,3})\s?\}|([-+]?\d{1,3})(?!\d|\.\d))"
_TENS = re.compile(rf"(?<![\w.])(\d+(?:\.\d+)?)\s?[x×*·⋅∙]\s?10{_RAISED}")
_POWER = re.compile(rf"(?<![\w.])(\d+(?:\.\d+)?){_RAISED}")
_UNIT_POWER = re.compile(r"(?<=[A-Za-z}])\s?\^\s?(?:\{\s?[-+]?\d+\s?\}|[-+]?\d+)")
_TIMES = re.compile(r"(?<=\d)\s?[x×*·⋅∙]\s?(?=\d)")


# Around a number that stands alone.
_MARKS = f" \n\t.,;!()[]{{}}\"'≈*+-{CURRENCIES}"


class Quantity(NamedTuple):
    """values: one, or several of a list, a range or a formula, which settle on none. share: it is in percent.
    bound: "<" of "less than 5". compound: a time, date or version, its parts in `values`. start, end: where it stands
    in `text`, with its units."""

    values: tuple[float, ...]
    text: str
    start: int
    end: int
    share: bool = False
    unit: str = ""
    currency: str = ""
    bound: str = ""
    compound: bool = False
    symbolic: bool = False
    dated: bool = False
    year: bool = False
    denied: bool = False
    label: bool = False

    @property
    def alone(self) -> bool:
        """Whether nothing else is said."""
        rest = self.text[: self.start] + self.text[self.end :]
        return not rest.strip(_MARKS)


def quantity(text: str, year: bool = False) -> Quantity | None:
    """What a text settles on: the number after "answer is", else the last one that is not part of reasons given; None
    without one, or where it is part of a root or the like. Numbers that stand together are one Quantity of several.

    Left aside, where others remain: years ("5 people in 2020"; if a `year` is asked for, they come first), what is
    denied ("not 5"), numbers of figures, pages and days. Words are read where there are no digits.
    """
    text = _written(text)
    found = _found(text)
    if all(one.year and not year for one in found) and (digits := in_digits(text)) != text:
        text, found = digits, _found(digits) or found
    groups = _groups(text, found)
    for aside in ("label", "denied", *(() if year else ("year",))):
        groups = [group for group in groups if not getattr(group[0], aside)] or groups
    if year:
        groups = [group for group in groups if group[0].year] or groups
    if not groups:
        return None
    marks = list(ANSWER.finditer(text))
    after = [group for group in groups if marks and group[0].start >= marks[-1].end()]
    chosen = after[0] if after else _before_reasons(text, groups)[-1]
    if len(groups) > 1 and len(chosen) > 1 and chosen is groups[-1]:
        between = text[groups[-2][-1].end : chosen[0].start]
        if between.strip() == "=":  # "5 = 12 - 7"
            chosen = groups[-2]
    for follower in after[1:]:
        if not re.fullmatch(r".{0,20}[=≈].{0,20}", text[chosen[-1].end : follower[0].start]):
            break
        chosen = follower
    # Half of a formula is no number, and infinity is none.
    if any(one.symbolic or one.denied or not math.isfinite(one.values[0]) for one in chosen):
        return None
    if len(chosen) == 1:
        return chosen[0]
    values = tuple(value for one in chosen for value in one.values)
    return Quantity(values, text, chosen[0].start, chosen[-1].end, bound=chosen[0].bound)


def _found(text: str) -> list[Quantity]:
    """Every number of a text with what belongs to it."""
    found = []
    for match in _NUMBER.finditer(text):
        before = text[max(0, match.start() - WINDOW) : match.start()]
        if _MARGIN.search(before):
            continue
        values = _values(match)
        end = match.end()
        currency, unit, share = "", "", False
        if money := _MONEY.search(before):
            currency = money[0]
        if not match["compound"]:
            for _ in range(2):  # "5 hundred thousand"
                if scale := _SCALE.match(text, end):
                    factor = _SCALES[next(filter(None, scale.groups())).lower()]
                    values, end = tuple(value * factor for value in values), scale.end()
        symbolic = bool(_ROOT.search(before) or _TIMES_ROOT.match(text, end))
        bound = _bound(before)
        if more := _OR_MORE.match(text, end):
            bound, end = ">=" if more[1] else "<=", more.end()
        if part := _SHARE.match(text, end):
            share, end = True, part.end()
            values = tuple(value / 100 for value in values)
        if money := _MONEY_AFTER.match(text, end):
            currency, end = money[1], money.end()
        elif (said := _UNIT.match(text, end)) and said[1].lower() not in _NO_UNITS:
            unit, end = _SAME_UNITS.get(said[1], said[1]), said.end()
        if _MINUS.search(before) and not match["compound"]:
            values = tuple(-value for value in values)
        dated = bool(re.fullmatch("[12][0-9]{3}", match[0])) and end == match.end()
        found.append(
            Quantity(
                values,
                text,
                match.start(),
                end,
                share,
                unit,
                currency,
                bound,
                compound=bool(match["compound"]),
                symbolic=symbolic,
                dated=dated,
                year=dated and bool(_YEAR.search(before)),
                denied=bool(_DENIED.search(before)),
                label=bool(_LABEL.search(before)),
            )
        )
    return found


def _values(match: re.Match[str]) -> tuple[float, ...]:
    if match["compound"]:
        return tuple(float(part) for part in re.split("[-:/.]", match[0]))
    if match["european"]:
        return (float(match[0].replace(".", "").replace(",", ".")),)
    if match["comma"]:
        return (float(match[0].replace(",", ".")),)
    if match["over"]:
        under = float(match["under"])
        part = float(match["over"]) / under if under else math.nan
        return (float(match["whole"] or 0) + part,)
    return (float(match["plain"]),)


def _bound(before: str) -> str:
    match = _BOUND.search(before)
    if match is None:
        return ""
    if match["sign"]:
        return match["sign"].replace("≤", "<=").replace("≥", ">=")
    if match["most"] or match["least"]:
        return "<=" if match["most"] else ">="
    return ("<" if match["less"] or match["under"] else ">") + "=" * bool(match["equal"])


def _groups(text: str, found: Sequence[Quantity]) -> list[list[Quantity]]:
    """Numbers that are joined by "or", "to", a comma or a sign stand together."""
    groups: list[list[Quantity]] = []
    for one in found:
        last = groups[-1][-1] if groups else None
        # "In 2020, 5 people": the year stands apart.
        apart = last is None or last.label or last.denied or (last.year and not one.dated)
        if last and not apart and _together(text, last, one):
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


def _before_reasons(text: str, groups: list[list[Quantity]]) -> list[list[Quantity]]:
    """The numbers before the reasons that are given for them ("5, because 2 + 3"), where there are some."""
    reasons = _FIRST_LINE.match(text)
    start, end = groups[0][0].start, groups[0][-1].end
    if not reasons or (text[:start] + text[end : reasons.end()]).strip(_MARKS):
        reasons = _REASONS.search(text, end)  # the first line is more than a number
    if reasons is None or _CONCLUSION.search(text, reasons.end()):
        return groups
    return [group for group in groups if group[0].start < reasons.end()]


def _together(text: str, last: Quantity, one: Quantity) -> bool:
    if last.unit and not one.dated and text[last.end : one.start] in ("", " "):
        return True  # "6 ft 2 in"
    return bool(_JOINED.fullmatch(text, last.end, one.start))


def _written(text: str) -> str:
    """The text with one way of writing a number for all."""
    text = _SPACED.sub("", evened(text).replace(r"\%", "%").replace("{,}", ","))
    text = _FRACTION.sub(lambda m: f" {m[1] or m[3]}/{m[2] or m[4]} ", text)
    text = _COMMAND.sub(lambda m: _COMMANDS.get(m[1], " "), text).replace("\\$", "$")
    text = _DEGREES.sub("°", re.sub(r"[^\S\n]+", " ", text))
    text = _TENS.sub(lambda m: f"{m[1]}e{(m[2] or m[3]).removeprefix('+')}", ungrouped(text))
    text = _UNIT_POWER.sub("", _POWER.sub(_power, text)).replace("**", " ")
    return _TIMES.sub(" × ", halves(text))


def _power(match: re.Match[str]) -> str:
    try:
        return repr(float(match[1]) ** int(match[2] or match[3]))
    except (OverflowError, ZeroDivisionError):
        return match[0]
