"""Numbers in English words, written in digits: "twenty-five" -> "25", "two thirds" -> "2/3"."""

from __future__ import annotations

import re

_UNITS = {
    "zero": 0,
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "eleven": 11,
    "twelve": 12,
    "thirteen": 13,
    "fourteen": 14,
    "fifteen": 15,
    "sixteen": 16,
    "seventeen": 17,
    "eighteen": 18,
    "nineteen": 19,
    "twenty": 20,
    "thirty": 30,
    "forty": 40,
    "fifty": 50,
    "sixty": 60,
    "seventy": 70,
    "eighty": 80,
    "ninety": 90,
}
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "dozen": 12}
_PARTS = {
    "half": 2,
    "halves": 2,
    "third": 3,
    "thirds": 3,
    "quarter": 4,
    "quarters": 4,
    "fourth": 4,
    "fourths": 4,
    "fifth": 5,
    "fifths": 5,
    "tenth": 10,
    "tenths": 10,
}
# Words of one number; more are no number, and its value would grow without an end.
LONGEST = 12
_ONE = "|".join([*_UNITS, *_SCALES])
_PART = "|".join(_PARTS)
_NUMBER = re.compile(
    rf"""\b(?:
      half\san?\s (?P<scale> hundred|thousand|million|billion|dozen )
    | (?P<whole> (?:an?\s)? (?:{_ONE}) (?: (?:[\s-]|\sand\s) (?:{_ONE}) )* )
      (?: \sand\sa\s (?P<more> half|quarter|third ) )? (?: [\s-] (?P<parts> {_PART} ) )?
    | an?\s (?P<part> {_PART} )
    | (?P<half> half )
    )\b""",
    re.IGNORECASE | re.VERBOSE,
)
_POINT = re.compile(r"(?<=\d) point (?=\d)", re.IGNORECASE)
_AND_PART = re.compile(r"(?<=\d) and a (half|quarter|third)\b", re.IGNORECASE)
# "no one", "this one", "one of them": a pronoun.
_PRONOUN = re.compile(r"\b(?:no|this|that|the|which|each|every|any|some|another)\s$", re.IGNORECASE)


def in_digits(text: str) -> str:
    """The text with its numbers in digits."""

    def one(match: re.Match[str]) -> str:
        if match["scale"]:
            return str(_SCALES[match["scale"].lower()] // 2)
        if match["half"]:
            return "1/2"
        if match["part"]:
            return f"1/{_PARTS[match['part'].lower()]}"
        said = match["whole"].lower()
        if said == "one" and not match["parts"] and not match["more"]:
            before, after = (
                text[max(0, match.start() - 10) : match.start()],
                text[match.end() : match.end() + 4],
            )
            if _PRONOUN.search(before) or after.lower() == " of ":
                return match[0]
        if said.count(" ") + said.count("-") > LONGEST:
            return match[0]
        whole = _value(said)
        if whole is None:
            return match[0]
        if match["parts"]:
            return f"{whole}/{_PARTS[match['parts'].lower()]}"
        return f"{whole} 1/{_PARTS[match['more'].lower()]}" if match["more"] else str(whole)

    return halves(_NUMBER.sub(one, text))


def halves(text: str) -> str:
    """ "2 and a half" -> "2 1/2", "2 point 5" -> "2.5"."""
    text = _POINT.sub(".", text)
    return _AND_PART.sub(lambda match: f" 1/{_PARTS[match[1].lower()]}", text)


def _value(said: str) -> int | None:
    """ "two thousand and five" -> 2005, "nineteen eighty-four" -> 1984; None for words that are no number together."""
    total = current = 0
    begun = False
    for word in re.split(r"[\s-]+", said):
        if word in _UNITS:
            unit = _UNITS[word]
            tens = current % 100
            if (
                not begun
                or (unit >= 10 and tens == 0)
                or (0 < unit < 10 and tens % 10 == 0 and tens != 10)
            ):
                current += unit
            elif unit >= 10 and 10 <= current < 100:
                current = 100 * current + unit
            else:
                return None
            begun = True
        elif word in ("hundred", "dozen"):
            current = max(current, 1) * _SCALES[word]
            begun = True
        elif word in _SCALES:
            total += max(current, 1) * _SCALES[word]
            current, begun = 0, False
    return total + current
