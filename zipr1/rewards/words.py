"""Texts cut into words, for the rewards that compare words: exact, ocr and rouge.

Marks that only punctuate are not seen; those that mean something are: in numbers (-5, 5 %, $5, 1/2, 11:30), in names
(C++, C#, A-) and in formulas (x > 5, x^2).
"""

from __future__ import annotations

import re
import unicodedata

# Vowel signs and accents, which Python counts to no word: without them "नमस्त" would be "नमस्ते".
MARKS = "".join(
    chr(code) for code in range(0x300, 0x20000) if unicodedata.category(chr(code))[0] == "M"
)
CURRENCIES = "$€£¥₹₩₽"
# Separators of thousands: "1,234", "1,00,000", "1 234", "1'000".
GROUPED = re.compile(
    r"(?<![\d.,'])(?<!\d )(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d{1,2}(?:,\d{2})+,\d{3}(?![\d,])"
    r"|\d{1,3}(?: \d{3})+(?! ?\d)|\d{1,3}(?:'\d{3})+(?![\d']))"
)
# One way of writing quotes, dashes, slashes and the sign of multiplication; joiners inside of words are not seen.
_ONE_WAY = {
    **dict.fromkeys(map(ord, "\u200b\u200c\u200d\ufeff\u00ad\ufe0f")),
    **dict.fromkeys(map(ord, "\u2018\u2019\u201b\u02bc\u2032\u00b4"), "'"),
    **dict.fromkeys(map(ord, "\u201c\u201d\u201e\u2033"), '"'),
    **dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63"), "-"),
    **dict.fromkeys(map(ord, "\u2044\u2215"), "/"),
    **dict.fromkeys(map(ord, "\u00d7\u2715"), "x"),
}
_RAISED = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "+-0123456789")
_EXPONENT = re.compile("[⁺⁻⁰¹²³⁴-⁹]+")
_MIXED = re.compile("(?<=[0-9])(?=[¼-¾⅐-⅞])")

_LETTER = r"[^\W\d_]"
_LETTERS = rf"{_LETTER}(?:{_LETTER}|[{MARKS}])*"
_WORD = re.compile(
    rf"""
    (?: (?<! [\w)\]] ) [-+] (?=[\d{CURRENCIES}]) )? [{CURRENCIES}]? \d+ (?: \.\d+ )? (?: \s?[%‰{CURRENCIES}] )?
    | (?<! \w ) {_LETTER} [-+] (?! [\w+] )                  # the marks A- and B+
    | {_LETTERS} (?: '{_LETTERS} )* (?: \+\+ | \#(?!\w) )?  # it's, C++, C#
    | (?<= \d ) \s?[-+*]\s? (?= \d ) | (?<= \w )\s-\s(?= \d ) | (?<= \d ):(?= \d ) | (?<= \w )\s?/\s?(?= \w )
    | (?P<mark> [^\w\s] )
    """,
    re.VERBOSE,
)
_PER_CENT = re.compile(r"(?<=\d)\s?per\s?cent\b")
_FRACTION = re.compile(r"\\[dt]?frac\s?\{([^{}]*)\}\s?\{([^{}]*)\}")
# "U.S.", "u.s" and "Ph.D.": letters with points after each or between.
_ACRONYM = re.compile(rf"(?<![\w.]){_LETTER}{{1,2}}(?:\.{_LETTER}(?!\w))+\.?")


def evened(text: str) -> str:
    """The text with one way of writing each character; raised digits as "^2"."""
    text = _EXPONENT.sub(lambda found: "^" + found[0].translate(_RAISED), text)
    text = _MIXED.sub(" ", text).translate(_ONE_WAY)
    return unicodedata.normalize("NFKC", text).translate(_ONE_WAY)


def plain(text: str) -> str:
    """The text in small letters, with one way of writing each character."""
    return evened(text).casefold()


def ungrouped(text: str) -> str:
    """The text without separators of thousands."""
    return GROUPED.sub(lambda found: re.sub(r"\D", "", found[0]), text)


def words(text: str, joined: bool = False) -> list[str]:
    """Lower-case words of a text, numbers and signs that mean something, in order.

    joined: what stands without a space between is one word ("5kg", "x^2", "11:30").
    """
    text = _FRACTION.sub(r" \1/\2 ", ungrouped(plain(text)))
    text = _ACRONYM.sub(lambda found: found[0].replace(".", ""), _PER_CENT.sub("%", text))
    text = re.sub(r"\A\s*([-+])\s+(?=\d)", r"\1", re.sub(r"(?<![\w.])\.(?=\d)", "0.", text))
    found: list[str] = []
    end = -1
    for match in _WORD.finditer(text):
        word = re.sub(r"\s", "", match[0])
        if match["mark"] and not _means(word):
            continue
        if word[0] == "+" and len(word) > 1:
            word = word[1:]
        if joined and match.start() == end:
            found[-1] += word
        else:
            found.append("and" if word == "&" else word)
        end = match.end()
    return found


def _means(mark: str) -> bool:
    """Whether a lone mark is more than punctuation: a sign of mathematics, money or the like."""
    return mark in "&@%" or (unicodedata.category(mark)[0] == "S" and mark not in "|~`")
