"""Means over seeds, and how sure they are: other seeds might have been drawn, and other questions.

Of a mean over S runs, each trained with a seed of its own and asked the same n questions:

    seeds       s / sqrt(S), s the standard deviation of the runs' means; of two sets of runs that are compared,
                sqrt(s_a^2 / S_a + s_b^2 / S_b)
    questions   the standard error of the mean, over questions, of each question's mean over the seeds, paired and
                clustered by picture (zipr1/core/statistics.py)

They are added in quadrature. That errs on the wide side: the runs' means differ a little for their questions' sake too.
The half of a 95 % interval is sqrt((t seeds)^2 + (z questions)^2), t of Student's distribution with S - 1 degrees of
freedom (of two sets those of Welch, rounded down).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zipr1.core.statistics import Z, difference_error
from zipr1.data.embedded import PER_PICTURE


@dataclass(frozen=True)
class Difference:
    """A mean difference. seeds: its standard error over seeds, None where a side has one seed only, of which nobody
    knows how far others would lie. questions: that over questions. degrees: of freedom of `seeds`. runs: on each
    side."""

    mean: float
    seeds: float | None
    questions: float
    degrees: int
    runs: tuple[int, int]

    @property
    def error(self) -> float:
        """Both standard errors in quadrature."""
        return math.hypot(self.seeds or 0.0, self.questions)

    @property
    def half(self) -> float:
        """Half of the 95 % interval; of questions alone where the seeds' error is not known."""
        seeds = 0.0 if self.seeds is None else t_quantile(self.degrees) * self.seeds
        return math.hypot(seeds, Z * self.questions)


def difference(
    a: Sequence[np.ndarray], b: Sequence[np.ndarray], pictures: np.ndarray, base: bool = False
) -> Difference:
    """Mean of `a` less that of `b`: of each run on a side the outcomes of the same n questions, in [0, 1].

    base: `b` is the one untouched base, which no seed changes.
    """
    mean, questions = difference_error(np.mean(a, 0), np.mean(b, 0), pictures)
    sides = [a] if base else [a, b]
    seeds, degrees = None, 0
    if all(len(side) > 1 for side in sides):
        means = [[float(np.mean(run)) for run in side] for side in sides]
        parts = [float(np.var(m, ddof=1)) / len(m) for m in means]
        seeds = math.sqrt(sum(parts))
        degrees = sum(len(side) - 1 for side in sides)
        if sum(parts) > 0:
            below = sum(v * v / (len(m) - 1) for v, m in zip(parts, means, strict=True))
            degrees = max(1, math.floor(sum(parts) ** 2 / below + 1e-9))
    return Difference(mean, seeds, questions, degrees, (len(a), len(b)))


def pictures(number: int) -> np.ndarray:
    """Of each of `number` embedded questions of a task the number of its picture, which questions are clustered by."""
    return np.arange(number) // PER_PICTURE


def mean_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean over seeds, and its standard error; None for one seed."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(np.mean(values)), error


def t_quantile(degrees: int, inside: float = 0.95) -> float:
    """The t with P(|T| <= t) = inside, T of Student's distribution with a whole number of degrees of freedom."""
    low, high = 0.0, 1.0
    while _inside(high, degrees) < inside:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, degrees) < inside else (low, middle)
    return (low + high) / 2


def _inside(t: float, degrees: int) -> float:
    """P(|T| <= t); the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    total, term = 0.0, cosine if odd else 1.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= k / (k + 1) * cosine**2
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
