"""Answers of several words, scored by how far they are: OCR by word error rate, documents by ANLS.

Both rest on the edit distance of Levenshtein, over words or over characters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from zipr1.rewards.exact import MARKS, plain
from zipr1.rewards.final import final

# Scripts written without spaces count a word a character: Chinese and Japanese, Thai, Lao, Khmer, Burmese.
_DENSE = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(rf"[{_DENSE}]|[^\W_{_DENSE}](?:[^\W_{_DENSE}]|[{MARKS}])*")
# Answers less alike than this are simply wrong (Biten et al., 2019, "Scene Text Visual Question Answering").
ALIKE = 0.5


def tokens(text: str) -> list[str]:
    """Lower-case runs of letters and digits, in order."""
    return _TOKEN.findall(plain(text))


def edits(a: Sequence[str], b: Sequence[str]) -> int:
    """Fewest insertions, deletions and replacements that make `b` of `a`; len(a) x len(b) steps."""
    row = list(range(len(b) + 1))
    for i, one in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (one != other))
    return row[-1]


def ocr(prediction: str, reference: str) -> float:
    """1 minus the word error rate, not below 0: edits in words, over the number of words in the reference.

    Case and punctuation do not count. Where the reference has no words, an answer without words is right.
    """
    predicted, expected = tokens(final(prediction)), tokens(final(reference))
    if not expected:
        return float(not predicted)
    # From twice as many words on, the rate is at least 1: no need to compare.
    if len(predicted) >= 2 * len(expected):
        return 0.0
    return max(0.0, 1.0 - edits(predicted, expected) / len(expected))


def anls(prediction: str, reference: str) -> float:
    """Average normalised Levenshtein similarity of one answer: 1 - edits / the longer length, in characters, and 0
    where that is below one half. Case and runs of spaces do not count."""
    predicted, expected = (" ".join(plain(final(text)).split()) for text in (prediction, reference))
    longer = max(len(predicted), len(expected))
    if not longer or abs(len(predicted) - len(expected)) > (1 - ALIKE) * longer:
        return 0.0
    alike = 1.0 - edits(predicted, expected) / longer
    return alike if alike >= ALIKE else 0.0
