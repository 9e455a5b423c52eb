"""The units of a score, and the difference of two scores over the same units. numpy alone is needed.

With s_u and t_u in [0, 1] the results of two models on unit u and weights w_u,

    difference = sum_u w_u (s_u - t_u),    V = G / (G - 1) * sum_g ( sum_{u in g} (w_u (s_u - t_u) - difference / n) )^2

over clusters g of units that share a picture or clip; 95 % interval: difference +- 1.96 sqrt(V). Where no unit
differs, +- 1.96^2 / (N + 1.96^2) of the whole range, with N = (sum_u w_u)^2 / sum_u w_u^2, as in core/statistics.py.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from zipr1.core.statistics import Z


@dataclass
class Units:
    """What a score is made of. score: `(n,)` in [0, 1], or None where samples hold no number. weight: `(n,)`, summing
    to the highest score. cluster: equal values share a picture. name: what is asked, the same in every evaluation."""

    score: np.ndarray | None
    weight: np.ndarray
    cluster: list[Any]
    name: list[str]

    @property
    def total(self) -> float | None:
        return None if self.score is None else float((self.score * self.weight).sum())


def paired(a: Units, b: Units, top: float) -> tuple[float, list[float]] | None:
    """(score of a - score of b, its 95 % interval) over the same units; None where samples hold no numbers."""
    if a.score is None or b.score is None or len(a.score) != len(b.score) or not len(a.score):
        return None
    d = a.weight * (a.score - b.score)
    index = {c: i for i, c in enumerate(dict.fromkeys(a.cluster))}
    groups = len(index)
    total = float(d.sum())
    sums = np.bincount([index[c] for c in a.cluster], d - total / len(d))
    variance = groups / (groups - 1) * float((sums**2).sum()) if groups > 1 else 0.0
    trials = groups if d.any() else float(a.weight.sum() ** 2 / (a.weight**2).sum())
    half = Z * np.sqrt(variance) if variance > 1e-18 else Z * Z / (trials + Z * Z) * top
    return total, [max(-top, total - float(half)), min(top, total + float(half))]


def question_name(number: object, question: object, target: object) -> str:
    """A question by its number and its words, so that another data set's question is another one."""
    return f"{number}-{zlib.crc32(f'{question} -> {target}'.encode()):08x}"


def matched(a: Units, b: Units) -> tuple[Units, Units] | None:
    """Both over the same units: all of them where they are the same, else those in common where every unit of a score
    weighs as much as any other. None where there are none, or where samples hold no numbers."""
    if a.score is None or b.score is None:
        return None
    if a.name == b.name:
        return a, b
    even = all(len(set(u.weight.tolist())) == 1 for u in (a, b) if len(u.name))
    places = {name: i for i, name in enumerate(b.name)}
    common = [(i, places[name]) for i, name in enumerate(a.name) if name in places]
    if not even or not common or any(len(set(u.name)) < len(u.name) for u in (a, b)):
        return None
    return _chosen(a, [i for i, _ in common]), _chosen(b, [j for _, j in common])


def _chosen(units: Units, places: list[int]) -> Units:
    assert units.score is not None
    weight = np.full(len(places), float(units.weight.sum()) / len(places))
    cluster, name = ([values[i] for i in places] for values in (units.cluster, units.name))
    return Units(units.score[places], weight, cluster, name)
