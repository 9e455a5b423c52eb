"""The same words in the same order, whatever the case, spacing and punctuation around them."""

from __future__ import annotations

import re
import unicodedata

from zipr1.rewards.final import final

# Vowel signs and accents, which Python counts to no word: without them "नमस्त" would be "नमस्ते".
MARKS = "".join(
    chr(code) for code in range(0x300, 0x20000) if unicodedata.category(chr(code))[0] == "M"
)
_WORD = re.compile(
    rf"[-+]?\d+(?:[.,]\d+)*(?:\s*%)?|[^\W\d_](?:[^\W\d_]|[{MARKS}])*(?:['’](?:[^\W\d_]|[{MARKS}])+)*"
)
# Invisible joiners inside of words.
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\ufeff\u00ad"))


def plain(text: str) -> str:
    """Small letters, each character in one way of writing it."""
    return unicodedata.normalize("NFKC", text).casefold().translate(_INVISIBLE)


def words(text: str) -> list[str]:
    """Lower-case words of a text; a sign, a decimal point or a percent sign of a number stays with it."""
    return [re.sub(r"\s", "", word) for word in _WORD.findall(plain(text))]


def exact(prediction: str, reference: str) -> float:
    """1.0 if the words are those of `reference`, else 0.0; an answer without words is never right."""
    predicted = words(final(prediction))
    return float(bool(predicted) and predicted == words(final(reference)))
