"""Free-form answers: the mean of ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004), as Video-R1 rewards them.

Simplification: words are compared as they are, where Video-R1 stems them first (Porter).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from zipr1.rewards.distance import tokens
from zipr1.rewards.final import final


def rouge(prediction: str, reference: str) -> float:
    """Mean F1 of shared words, shared pairs of neighbours and the longest common subsequence, in [0, 1].

    Where the right answer is one word there are no pairs: the mean is that of the other two.
    """
    predicted, expected = tokens(final(prediction)), tokens(final(reference))
    if not predicted or not expected:
        return 0.0
    scores = [
        shared(predicted, expected, 1),
        f1(common(predicted, expected), len(predicted), len(expected)),
    ]
    if len(expected) > 1:
        scores.append(shared(predicted, expected, 2))
    return sum(scores) / len(scores)


def shared(predicted: Sequence[str], expected: Sequence[str], size: int) -> float:
    """F1 of the runs of `size` words, each counted at most as often as it occurs on the other side."""
    ours, theirs = (
        Counter(tuple(t[i : i + size]) for i in range(len(t) - size + 1))
        for t in (predicted, expected)
    )
    return f1((ours & theirs).total(), ours.total(), theirs.total())


def common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for one in a:
        corner = 0
        for j, other in enumerate(b, 1):
            corner, row[j] = row[j], corner + 1 if one == other else max(row[j], row[j - 1])
    return row[-1]


def f1(hits: int, predicted: int, expected: int) -> float:
    """Harmonic mean of hits / predicted and hits / expected; 0.0 without hits."""
    return 2 * hits / (predicted + expected) if hits else 0.0
