"""Free-form answers: the mean of ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004), as Video-R1 rewards them.

Simplification: words are compared as they are, where Video-R1 stems them first (Porter).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from zipr1.rewards.distance import common, tokens
from zipr1.rewards.final import final


def rouge(prediction: str, reference: str) -> float:
    """Mean F1 of shared words, shared pairs of neighbours and the longest common subsequence, in [0, 1].

    Where the right answer is one word there are no pairs: the mean is that of the other two. The common subsequence is
    that of the first LONGEST words (distance.py) of each; what follows counts as not shared there.
    """
    heard, right = tokens(final(prediction)), tokens(final(reference))
    if not heard or not right:
        return 0.0
    scores = [shared(heard, right, 1), f1(common(heard, right), len(heard), len(right))]
    if len(right) > 1:
        scores.append(shared(heard, right, 2))
    return sum(scores) / len(scores)


def shared(heard: Sequence[str], right: Sequence[str], size: int) -> float:
    """F1 of the runs of `size` words, each counted at most as often as it occurs on the other side."""
    ours, theirs = (
        Counter(tuple(t[i : i + size]) for i in range(len(t) - size + 1)) for t in (heard, right)
    )
    return f1((ours & theirs).total(), ours.total(), theirs.total())


def f1(hits: int, heard: int, right: int) -> float:
    """Harmonic mean of hits / heard and hits / right; 0.0 without hits."""
    return 2 * hits / (heard + right) if hits else 0.0
