"""How sure an accuracy is: 95 % intervals that know which questions share a picture.

With outcomes x_i, n of them, mean m and G clusters (questions about one picture), the variance of the mean is
the cluster-robust

    V = G / (G - 1) * sum_g ( sum_{i in g} (x_i - m) )^2 / n^2

and the interval m +- z sqrt(V), z = 1.96, cut to the possible range. Where V is 0 (all right, all wrong, one
cluster) the normal interval would have no width. Wilson's interval with the number of clusters in place of the
number of questions stands in:

    ( m + z^2 / 2G +- z sqrt( m (1 - m) / G + z^2 / 4G^2 ) ) / ( 1 + z^2 / G )

and for a difference d +- z^2 / (G + z^2). Where not one pair differs it is d +- z^2 / (n + z^2), the score interval
without discordant pairs (Tango 1998): V treats a single differing question as one of n independent ones, and a
sample without any must not be less sure than that one. (Over the embedded tasks at p = 0.97, 0.9 and 0.8, 400
questions four a picture, clusters widened differences by no more than n independent questions would have.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from zipr1.core.errors import InputError

Z = 1.959963984540054
ONE_SIDED = 1.6448536269514722  # a normal value is below it with a chance of 95 %


def confidence_interval(
    correct: Sequence[float] | np.ndarray, clusters: Sequence[Any] | np.ndarray | None = None
) -> tuple[float, float]:
    """95 % interval of the mean of `correct`, values in [0, 1].

    clusters: one value per outcome; equal values are dependent. Without it every outcome stands alone.
    """
    x = _outcomes("correct", correct)
    mean, error, groups = _mean_error(x, clusters)
    if error > 0:
        return max(0.0, mean - Z * error), min(1.0, mean + Z * error)
    z2 = Z * Z / groups
    middle = (mean + z2 / 2) / (1 + z2)
    half = Z * np.sqrt(mean * (1 - mean) / groups + z2 / (4 * groups)) / (1 + z2)
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def paired_difference(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    clusters: Sequence[Any] | np.ndarray | None = None,
) -> tuple[float, float, float]:
    """`(mean(a - b), low, high)` for outcomes of the same questions in the same order, each in [0, 1]."""
    mean, error = difference_error(a, b, clusters)
    return mean, max(-1.0, mean - Z * error), min(1.0, mean + Z * error)


def difference_error(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    clusters: Sequence[Any] | np.ndarray | None = None,
) -> tuple[float, float]:
    """`mean(a - b)` and its standard error: half of the width of `paired_difference` before it is cut, over z."""
    x, y = _outcomes("a", a), _outcomes("b", b)
    if len(x) != len(y):
        raise InputError(f"a has {len(x)} outcomes and b {len(y)}; give the same questions to both")
    mean, error, groups = _mean_error(x - y, clusters)
    trials = groups if (x != y).any() else len(x)
    return mean, error if error > 0 else Z / (trials + Z * Z)


def verdict(lost: float, error: float, number: int, allowed: float) -> dict[str, Any]:
    """Whether a loss is within what is allowed, said with 95 % certainty (one-sided).

    lost: mean over `number` questions, with standard error `error`. Returns `verdict`: `held` if lost + 1.645 error is
    at most `allowed`, `violated` if lost - 1.645 error is above it, else `not shown`; with the arguments, and
    `questions`: how many would show that it is held, if the loss is what was found (None where it is not below).
    """
    margin = ONE_SIDED * error
    word = "held" if lost + margin <= allowed else "violated" if lost - margin > allowed else ""
    needed = None
    if lost < allowed:
        needed = max(1, int(np.ceil(number * (margin / (allowed - lost)) ** 2)))
    return {
        "verdict": word or "not shown", "lost": lost, "error": error, "n": number, "allowed": allowed,
        "questions": needed,
    }  # fmt: skip


def _outcomes(name: str, values: Sequence[float] | np.ndarray) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x):
        raise InputError(f"{name} has shape {x.shape}; give a list of at least one outcome")
    if not ((x >= 0) & (x <= 1)).all():
        raise InputError(f"{name} has values outside [0, 1]; give 1 for right and 0 for wrong")
    return x


def _mean_error(x: np.ndarray, clusters: Any) -> tuple[float, float, int]:
    """Mean, its cluster-robust standard error (exactly 0.0 where rounding is all there is), number of clusters."""
    n = len(x)
    index = (
        np.arange(n)
        if clusters is None
        else np.unique(np.asarray(clusters), return_inverse=True)[1]
    )
    if len(index) != n:
        raise InputError(f"clusters has {len(index)} values for {n} outcomes; give one each")
    groups = int(index.max()) + 1
    mean = float(x.mean())
    if groups == 1:
        return mean, 0.0, 1
    sums = np.bincount(index, weights=x - mean)
    variance = groups / (groups - 1) * float((sums**2).sum()) / n**2
    return mean, float(np.sqrt(variance)) if variance > 1e-18 else 0.0, groups
