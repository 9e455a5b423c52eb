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


def ocr(said: str, wanted: str) -> float:
    """1 minus the word error rate, not below 0: edits in words, by the number of right words.

    Case and punctuation do not count. Nothing right to read is read by saying nothing.
    """
    heard, right = tokens(final(said)), tokens(final(wanted))
    if not right:
        return float(not heard)
    # Beyond twice the right words the rate is 1 at least: no need to look.
    if len(heard) >= 2 * len(right):
        return 0.0
    return max(0.0, 1.0 - edits(heard, right) / len(right))


def anls(said: str, wanted: str) -> float:
    """Average normalised Levenshtein similarity of one answer: 1 - edits / the longer length, in characters, and 0
    where that is below one half. Case and runs of spaces do not count."""
    heard, right = (" ".join(plain(final(text)).split()) for text in (said, wanted))
    longer = max(len(heard), len(right))
    if not longer or abs(len(heard) - len(right)) > (1 - ALIKE) * longer:
        return 0.0
    alike = 1.0 - edits(heard, right) / longer
    return alike if alike >= ALIKE else 0.0
