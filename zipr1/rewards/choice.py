"""Multiple choice: the letter that an answer decides on."""

from __future__ import annotations

import re
import unicodedata

from zipr1.rewards.final import final

# A letter that is no part of a word; a small one counts only where a mark or the end follows: "a" is a word too.
_LETTER = r"(?<![A-Za-z0-9'’])(?:([A-Z])(?![A-Za-z0-9'’])|([a-z])(?=\s*(?:[)\].:,;]|$)))"
_LEADING = re.compile(r"^[(\[<\"']*([A-Za-z])(?:[)\].:,;!?>\"']|\s*$|\s*\n)")
# Another letter right after the first: "A or B", "A, B", "(A)(B)" settle on nothing.
_SECOND = re.compile(
    r"[)\]]*\s*(?:,|/|&|\bor\b|\band\b|\()\s*[(\[]*(?!I\s+[a-z])[A-Z](?![A-Za-z0-9'’])"
)
_ANSWER = re.compile(
    r"(?i:\b(?:answer|choose|pick|select)\b[^A-Za-z0-9]*(?:(?:is|would\s+be|should\s+be|must\s+be)\b)?[^A-Za-z0-9]*"
    r"(?:the\s+)?(?:(?:option|choice|letter)\b)?[^A-Za-z0-9]*)" + _LETTER
)
_OPTION = re.compile(r"(?i:\b(?:option|choice)\b[^A-Za-z0-9]*(?:is\b)?[^A-Za-z0-9]*)" + _LETTER)
_ALONE = re.compile(r"(?<![A-Za-z0-9'’])([A-Z])(?![A-Za-z0-9'’])")
_DENIED = re.compile(r"(?i:(?:\b(?:not|nor|never)|n['’]t)\s+[(\[\"']*)$")
# "A dog": the article, and no letter. "A is", "A because": the letter.
_ARTICLE = re.compile(
    r"\s+(?!(?:is|was|because|since|as|and|or|but|seems|looks|matches|fits)\b)[a-z]"
)


def letter(text: str) -> str | None:
    """The chosen letter in upper case, or None where there is none or no single one.

    Searched in this order: inside <answer> tags or a box, at the start ("B", "(b)", "B. a cat"), after "answer is"
    (the last time), after "option" if there is one only, and last as the only capital letter that stands alone.
    """
    text = re.sub(r"\\[A-Za-z]+", " ", unicodedata.normalize("NFKC", final(text)))
    text = re.sub(r"[*_`${}\\]+", " ", text).strip()
    for pattern in (_LEADING, _ANSWER):
        if matches := list(pattern.finditer(text)):
            last = matches[-1]
            if _SECOND.match(text, last.end(last.lastindex or 0)):
                return None
            return _letter_of(last)
    options = {_letter_of(match) for match in _OPTION.finditer(text)}
    if len(options) == 1:
        return options.pop()
    alone = {
        match[1]
        for match in _ALONE.finditer(text)
        # "I" is a word too.
        if match[1] != "I"
        and not _DENIED.search(text, 0, match.start())
        and not (match[1] == "A" and _ARTICLE.match(text, match.end()))
    }
    return alone.pop() if len(alone) == 1 else None


def choice(prediction: str, reference: str) -> float:
    """1.0 if both decide on the same letter, else 0.0."""
    predicted = letter(prediction)
    return float(predicted is not None and predicted == letter(reference))


def _letter_of(match: re.Match[str]) -> str:
    """The letter: of the pattern's groups only one can match."""
    return str(match[match.lastindex or 0]).upper()
