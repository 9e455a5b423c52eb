"""Answers of several words, scored by how far they are: OCR by word error rate, documents by ANLS.

Both rest on the edit distance of Levenshtein, over words or over characters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from zipr1.rewards.final import final
from zipr1.rewards.words import plain, words

# Scripts written without spaces count a word a character: Chinese and Japanese, Thai, Lao, Khmer, Burmese.
_DENSE = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_PIECE = re.compile(rf"[{_DENSE}]|[^{_DENSE}]+")
# Answers less alike than this are simply wrong (Biten et al., 2019, "Scene Text Visual Question Answering").
ALIKE = 0.5
# Words or characters that are compared in order; without an end, the work would grow with the square of the length.
LONGEST = 4096


def tokens(text: str) -> list[str]:
    """Words in small letters, in order; what stands without a space between is one word."""
    return [piece for word in words(text, joined=True) for piece in _PIECE.findall(word)]


def edits(a: Sequence[str], b: Sequence[str]) -> int:
    """Fewest insertions, deletions and replacements that make `b` of `a`.

    Beyond LONGEST elements after the common beginning all counts as wrong but for a common end: the number is then an
    upper bound. Steps: len(a) operations on whole numbers of len(b) bits (Myers, 1999; Hyyrö, 2003).
    """
    a, b = _different(a, b)
    rest = max(len(a), len(b)) - LONGEST
    if rest > 0:
        cut = max(len(a) - LONGEST, 0), max(len(b) - LONGEST, 0)
        return max(cut) + edits(a[:LONGEST], b[:LONGEST])
    if not a or not b:
        return len(a) + len(b)
    # A column of the table of distances, as differences between neighbours: bit j of `more` says that the distance
    # rises by one from b[:j] to b[: j + 1], bit j of `less` that it falls.
    places = _places(b)
    every, last = (1 << len(b)) - 1, 1 << (len(b) - 1)
    more, less, count = every, 0, len(b)
    for one in a:
        equal = places.get(one, 0)
        level = equal | less
        diagonal = (((equal & more) + more) ^ more) | equal
        up, down = less | (every & ~(diagonal | more)), more & diagonal
        count += bool(up & last) - bool(down & last)
        up, down = (up << 1 | 1) & every, (down << 1) & every
        more, less = down | (every & ~(level | up)), up & level
    return count


def common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, of the first LONGEST elements of each.

    Steps: len(a) operations on whole numbers of len(b) bits (Hyyrö, 2004).
    """
    a, b = a[:LONGEST], b[:LONGEST]
    places, every = _places(b), (1 << len(b)) - 1
    missed = every
    for one in a:
        hit = missed & places.get(one, 0)
        missed = ((missed + hit) | (missed - hit)) & every
    return len(b) - missed.bit_count()


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


def _different(a: Sequence[str], b: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Both without their common beginning and end."""
    shorter = min(len(a), len(b))
    start = next((i for i in range(shorter) if a[i] != b[i]), shorter)
    shorter -= start
    end = next((i for i in range(shorter) if a[-1 - i] != b[-1 - i]), shorter)
    return a[start : len(a) - end], b[start : len(b) - end]


def _places(elements: Sequence[str]) -> dict[str, int]:
    """Of each element the places where it stands, as bits."""
    places: dict[str, int] = {}
    for j, element in enumerate(elements):
        places[element] = places.get(element, 0) | 1 << j
    return places
