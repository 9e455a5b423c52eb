"""Selection rules by name: scores and one number p per sample -> which tokens stay.

To add a rule: a function with the signature of `top_p` and a line in `RULES`. Every rule keeps all
candidates at p = 1 and never drops an always-kept token.
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


Rule = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Draw],
    torch.Tensor,
]


def top_p(
    scores: torch.Tensor,
    p: torch.Tensor,
    candidates: torch.Tensor,
    always: torch.Tensor,
    draw: Draw,
) -> torch.Tensor:
    """The fewest tokens that hold the share p of the score mass.

    Args of every rule: scores `(B, L)` float >= 0; p `(B,)` float in (0, 1]; candidates and always
    `(B, L)` bool; draw for random rules. Returns `(B, L)` bool.
    """
    return select_top_p(scores, p, candidates, always)


def top_k(
    scores: torch.Tensor,
    p: torch.Tensor,
    candidates: torch.Tensor,
    always: torch.Tensor,
    draw: Draw,
) -> torch.Tensor:
    """The ceil(p * length) tokens of highest score, always-kept ones counted."""
    return select_top_k(scores, _count(p, candidates), candidates, always)


def threshold(
    scores: torch.Tensor,
    p: torch.Tensor,
    candidates: torch.Tensor,
    always: torch.Tensor,
    draw: Draw,
) -> torch.Tensor:
    """Drop tokens whose score, relative to a uniform spread, is below 1 - p."""
    return select_threshold(scores, 1 - p, candidates, always)


def random(
    scores: torch.Tensor,
    p: torch.Tensor,
    candidates: torch.Tensor,
    always: torch.Tensor,
    draw: Draw,
) -> torch.Tensor:
    """ceil(p * length) tokens by a hash of (seed, layer, unpadded position): the control."""
    position = candidates.cumsum(-1) - 1
    noise = uniforms(mix(draw.seed, draw.layer), position.clamp_min(0))
    return select_top_k(noise, _count(p, candidates), candidates, always)


def _count(p: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """ceil(p * candidates), `(B,)` int64, with the rounding of p's own dtype forgiven."""
    length = candidates.sum(-1)
    exact = p.double() * length
    # 0.7 in float32 times 10 is 6.99999988 or 7.00000018: neither may move the count from 7.
    whole = exact.round()
    near = (exact - whole).abs() <= 1e-6 * length
    return torch.where(near, whole, exact.ceil()).long()


RULES: dict[str, Rule] = {
    "top_p": top_p,
    "top_k": top_k,
    "threshold": threshold,
    "random": random,
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
    return RULES[rule](scores, p, candidates, always, draw)
