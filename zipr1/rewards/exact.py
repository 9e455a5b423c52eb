"""The same words in the same order, whatever the case, spacing and punctuation around them."""

from __future__ import annotations

import re
import unicodedata

from zipr1.rewards.final import final


def words(text: str) -> list[str]:
    """Lower-case words of a text; a sign or a decimal point inside a number stays with it."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return re.findall(r"[-+]?\d+(?:[.,]\d+)*%?|[^\W\d_]+(?:['’][^\W\d_]+)*", text)


def exact(said: str, wanted: str) -> float:
    """1.0 if the words are those of `wanted`, else 0.0; an answer without words is never right."""
    heard = words(final(said))
    return float(bool(heard) and heard == words(final(wanted)))
