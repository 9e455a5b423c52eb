"""Selection in plain PyTorch. Arguments as in `select_top_p/__init__.py`."""

from __future__ import annotations

import torch

from zipr1_kernels.kept import Kept

# The cut point of padding: above every p, so never kept.
NEVER = 2.0


def cut_points(
    scores: torch.Tensor, candidates: torch.Tensor, always: torch.Tensor
) -> torch.Tensor:
    """See the public function."""
    share = _shares(scores, candidates)
    free = candidates & ~always
    first = share.masked_fill(free, 0).sum(-1, keepdim=True)  # mass of the always-kept tokens
    order = _falling(share, free)
    mass = share.masked_fill(~free, 0).gather(-1, order)
    # Shifted before the sum, not subtracted after it: exclusive sums stay exact and monotone.
    ahead = torch.cat([first, mass[:, :-1]], -1).cumsum(-1)
    cut = torch.zeros_like(share).scatter(-1, order, ahead)
    return cut.masked_fill(~free, 0).masked_fill(~candidates, NEVER)


def select_top_p(
    scores: torch.Tensor, p: torch.Tensor, candidates: torch.Tensor, always: torch.Tensor
) -> torch.Tensor:
    """See the public function."""
    with torch.no_grad():
        p = p[:, None].to(torch.promote_types(scores.dtype, torch.float32))
        kept = (cut_points(scores, candidates, always) < p) | always | (p >= 1)
        return kept & candidates


def select_top_k(
    scores: torch.Tensor, k: torch.Tensor, candidates: torch.Tensor, always: torch.Tensor
) -> torch.Tensor:
    """See the public function."""
    fixed = candidates & always
    free = candidates & ~always
    order = _falling(scores.detach(), free)
    slots = torch.arange(scores.shape[1], device=scores.device)
    rank = torch.empty_like(order).scatter_(-1, order, slots.expand_as(order))
    room = k[:, None] - fixed.sum(-1, keepdim=True)
    return fixed | (free & (rank < room))


def select_threshold(
    scores: torch.Tensor, t: torch.Tensor, candidates: torch.Tensor, always: torch.Tensor
) -> torch.Tensor:
    """See the public function."""
    with torch.no_grad():
        relative = _shares(scores, candidates) * candidates.sum(-1, keepdim=True)
        return candidates & (always | (relative >= t[:, None]))


def pack_each(*masks: torch.Tensor) -> tuple[Kept, ...]:
    """See the public function."""
    return tuple(Kept.from_mask(keep) for keep in masks)


def _shares(scores: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Scores divided by their sum over candidates, at least float32; 0 elsewhere."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.masked_fill(~candidates, 0)
    total = scores.sum(-1, keepdim=True)
    return scores / torch.where(total > 0, total, torch.ones_like(total))


def _falling(scores: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
    """`(B, L)` indices of the free tokens by falling score, ties by lower index, then the rest."""
    key = scores.detach().masked_fill(~free, -1)
    return torch.sort(key, dim=-1, descending=True, stable=True).indices
