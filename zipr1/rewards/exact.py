"""The same words in the same order, whatever the case, spacing and punctuation around them."""

from __future__ import annotations

import re

from zipr1.rewards.final import final
from zipr1.rewards.words import plain, words

# "3.0", as tables write whole numbers where a cell is empty, and "2.50".
_ZEROS = re.compile(r"(?<=\d)\.0+(?=\D*$)|(?<=\d)(\.\d*[1-9])0+(?=\D*$)")


def exact(prediction: str, reference: str) -> float:
    """1.0 if the words are those of `wanted`, else 0.0. Numbers count as such: "1,234.0" is "1234".

    Where neither has words, as in "?", the marks are compared; nothing but spaces and points is never right.
    """
    heard, right = final(prediction), final(reference)
    ours, theirs = ([_ZEROS.sub(r"\1", word) for word in words(text)] for text in (heard, right))
    if ours or theirs:
        return float(ours == theirs)
    marks = "".join(plain(heard).split())
    return float(bool(marks.strip(".")) and marks == "".join(plain(right).split()))
