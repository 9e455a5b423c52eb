"""What lowers the token ratio: random thresholds, and exact gradients through the choice they make.

Per layer a prompt token k is kept iff its cut point c_k (share of score mass ahead of it, see
`zipr1_kernels.cut_points`) is below the threshold p. With p ~ U(low, high) the number of kept
tokens is an action with a known probability (`cut_log_prob`) and a known expectation
(`expected_ratio`). Not here: how the terms are weighted (zipr1/train/controller.py).

For one layer, given its input and its probes, the gradient of the expected kept fraction over a
uniform threshold is computed exactly, with no sampling noise. Across layers it is a partial
derivative: the kept sets of earlier layers are held fixed, as are the effects of selection on
correctness and KL. It concerns the training distribution of p, not the fixed p of inference.

`through` adds those effects to first order: a kept token's key and output carry its `chance` of
being kept as a factor of value 1 (zipr1/models/sparse/gate.py), so what the token is worth to the KL
and to the answer pulls on its score. Dropped tokens are not computed and say nothing: an estimate,
biased like any straight-through gate (arXiv 1308.3432), not an exact gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

# Least length of an interval of p: a replayed choice that no p leads to any more has probability
# 0, and its logarithm must stay finite.
TINY = 1e-12


def expected_ratio(
    cut: torch.Tensor, low: float, high: float, candidates: torch.Tensor
) -> torch.Tensor:
    """E[kept fraction] of one layer for p ~ U(low, high): the `pathwise` term.

    (1/l) * sum over candidates k of clamp((high - c_k) / (high - low), 0, 1).

    Args:
        cut: `(B, L)` float, 0 for always-kept tokens; padding is not read. 0 < low < high <= 1.
        candidates: `(B, L)` bool, at least one in each row.

    Returns:
        `(B,)`, dtype of `cut`, in (0, 1]. Differentiable: d/dc_k = -1 / (l (high - low)) for
        low < c_k < high, else 0.

    Averaged over layers: exact for thresholds drawn independently per layer, given the sets that
    earlier layers kept; approximate for one shared p, with which those sets are correlated.
    """
    return chance(cut, low, high).masked_fill(~candidates, 0).sum(-1) / candidates.sum(-1)


def chance(cut: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """P(kept) of each token for p ~ U(low, high): clamp((high - c_k) / (high - low), 0, 1), of the shape of `cut`."""
    return ((high - cut) / (high - low)).clamp(0, 1)


def cut_log_prob(
    cut: torch.Tensor | Sequence[torch.Tensor],
    keep: torch.Tensor | Sequence[torch.Tensor],
    low: float,
    high: float,
    per: Literal["layer", "rollout"],
) -> torch.Tensor:
    """Log-probability of the kept counts, given the scores, for p ~ U(low, high): the `cut` term.

    A layer keeps just this set iff c_last < p <= c_next, c_last the largest cut point kept and
    c_next the least one dropped (none dropped: no bound). P is the share of [low, high] in that
    interval. `per="layer"`: thresholds are independent, logs add up. `per="rollout"`: one p must
    lie in the intervals of all layers.

    Args:
        cut: `(D, B, L)` or D of `(B, L)`, float; padding holds 2 (as `cut_points` gives it).
        keep: the same shape, bool; padding False.

    Returns:
        `(B,)` float, <= 0, differentiable in `cut`.

    A set replayed under changed parameters may no longer be a prefix of the order; c_last > c_next
    then, no p leads to it, and log(1e-12) with gradient 0 stands in for log 0: the PPO ratio is
    about 0 and the sample drops out.
    """
    c = torch.stack(list(cut))
    kept = torch.stack(list(keep))
    last = c.masked_fill(~kept, 0).amax(-1).clamp_min(low)  # (D, B)
    following = c.masked_fill(kept, 2).amin(-1).clamp_max(high)
    if per == "rollout":
        last, following = last.amax(0, keepdim=True), following.amin(0, keepdim=True)
    share = (following - last) / (high - low)
    return share.clamp_min(TINY).log().sum(0)


def thresholds(
    count: int,
    layers: int,
    low: float,
    high: float,
    per: Literal["layer", "rollout"],
    sampling: Literal["stratified", "independent", "grid"],
    generator: torch.Generator,
) -> torch.Tensor:
    """The p of each rollout of one question and each layer: `(count, layers)` float32.

    What holds exactly, up to float32 rounding:

    * independent, `layer`: all entries are independent and uniform on [low, high].
    * independent, `rollout`: rows are constant; they are independent and uniform.
    * stratified, `rollout`: rows are constant; row n is uniform on the n-th of `count` equal cells,
      p_n = low + (n + u_n) / count * (high - low). A row alone is not uniform on [low, high]; the
      mean of anything over the rows is an unbiased estimate of its mean over U(low, high).
    * stratified, `layer`: each layer puts one value in each cell, in an order of its own. A row
      alone is uniform on [low, high] and independent over layers, as `cut_log_prob(per="layer")`
      assumes; the rows of a group are dependent, since they exclude each other's cells.

    * grid: as stratified, with the centre of each cell instead of a draw. Nothing is uniform.

    generator: a CPU generator; it alone decides the draw.
    """
    columns = layers if per == "layer" else 1
    unit = torch.rand(count, columns, generator=generator, dtype=torch.float64)
    if sampling == "grid":
        unit = torch.full_like(unit, 0.5)
    if sampling != "independent":
        cells = [torch.arange(count)]
        if per == "layer":
            cells = [torch.randperm(count, generator=generator) for _ in range(layers)]
        unit = (torch.stack(cells, -1) + unit) / count
    return (low + unit * (high - low)).to(torch.float32).expand(count, layers).contiguous()
