"""Selection rules by name: scores and one number p per sample -> which tokens stay.

To add a rule: a function with the signature of `top_p`, one that turns p into the amount that it takes, and a line in
`RULES`. Every rule keeps all candidates at p = 1 and never drops an always-kept token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from zipr1_kernels import select_threshold, select_top_k, select_top_p

from zipr1.models.sparse.hashing import mix, uniforms


class Draw(NamedTuple):
    """What a rule's random numbers may depend on; they are the same for any padding and batch."""

    seed: int = 0
    layer: int = 0


class Rule(NamedTuple):
    """amount: of p `(.., B)` and the number of candidates `(B,)` -> `(.., B)`, all that `choose` has to know of p, made
    for all layers at once, where lengths are known. choose: see `top_p`. scores: of the candidates `(B, L)` alone, in
    place of the probes', made before the first layer too; None: it reads the probes'."""

    amount: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    choose: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    scores: Callable[[torch.Tensor, Draw], torch.Tensor] | None = None


def top_p(
    scores: torch.Tensor,
    p: torch.Tensor,
    candidates: torch.Tensor,
    always: torch.Tensor,
) -> torch.Tensor:
    """The fewest tokens that hold the share p of the score mass.

    Args of every rule: scores `(B, L)` float >= 0; its amount `(B,)`, here p itself, float in (0, 1]; candidates and
    always `(B, L)` bool. Returns `(B, L)` bool.
    """
    return select_top_p(scores, p, candidates, always)


def top_k(
    scores: torch.Tensor,
    k: torch.Tensor,
    candidates: torch.Tensor,
    always: torch.Tensor,
) -> torch.Tensor:
    """The ceil(p * length) tokens of highest score, always-kept ones counted."""
    return select_top_k(scores, k, candidates, always)


def threshold(
    scores: torch.Tensor,
    t: torch.Tensor,
    candidates: torch.Tensor,
    always: torch.Tensor,
) -> torch.Tensor:
    """Drop tokens whose score, relative to a uniform spread, is below 1 - p."""
    return select_threshold(scores, t, candidates, always)


def noise(candidates: torch.Tensor, draw: Draw) -> torch.Tensor:
    """A hash of (seed, layer, unpadded position): with `top_k`, the control."""
    position = candidates.cumsum(-1) - 1
    return uniforms(mix(draw.seed, draw.layer), position.clamp_min(0))


def _itself(p: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    return p


def _rest(p: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    return 1 - p


def _count(p: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """ceil(p * length), int64, with the rounding of p's own dtype forgiven."""
    exact = p.double() * length
    # 0.7 in float32 times 10 is 6.99999988 or 7.00000018: neither may move the count from 7.
    whole = exact.round()
    near = (exact - whole).abs() <= 1e-6 * length
    return torch.where(near, whole, exact.ceil()).long()


RULES: dict[str, Rule] = {
    "top_p": Rule(_itself, top_p),
    "top_k": Rule(_count, top_k),
    "threshold": Rule(_rest, threshold),
    "random": Rule(_count, top_k, noise),
}


def select(
    rule: str,
    scores: torch.Tensor,
    p: torch.Tensor,
    candidates: torch.Tensor,
    always: torch.Tensor,
    draw: Draw,
) -> torch.Tensor:
    """Apply the rule named `rule`, one of `RULES` (the recipe has checked the name)."""
    amount, choose, own = RULES[rule]
    if own is not None:
        scores = own(candidates, draw)
    return choose(scores, amount(p, candidates.sum(-1)), candidates, always)
