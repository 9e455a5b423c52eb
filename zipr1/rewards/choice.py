"""Multiple choice: the letter that an answer settles on."""

from __future__ import annotations

import re

from zipr1.rewards.final import final

_NAMED = re.compile(
    r"\b(?:answer|option|choice)\b[^A-Za-z0-9]*(?:is|:)?\s*[(\[]?([A-Z])\b", re.IGNORECASE
)
_LEADING = re.compile(r"^\s*[(\[]?([A-Za-z])(?:[)\].:,]|\s*$)")
_ALONE = re.compile(r"(?:^|[\s(\[])([A-Z])(?=[)\].:,\s]|$)")


def letter(text: str) -> str | None:
    """The chosen letter in upper case, or None where there is none or no single one.

    Looked for in this order: inside <answer> tags or a box, at the start ("B", "(b)", "B. a cat"), after
    "answer is" or "option", and last as the only capital letter that stands alone.
    """
    text = final(text).strip("*_` ")
    if match := _LEADING.match(text):
        return match[1].upper()
    if found := _NAMED.findall(text):
        return str(found[-1]).upper()
    # "I" and "A" are words too: a letter alone counts only if no other one does.
    alone = {c for c in _ALONE.findall(text) if c != "I"}
    return alone.pop() if len(alone) == 1 else None


def choice(said: str, wanted: str) -> float:
    """1.0 if both settle on the same letter, else 0.0."""
    heard = letter(said)
    return float(heard is not None and heard == letter(wanted))
