"""Choose which tokens stay, given their scores: by share of mass, by count, by threshold; then list them.

Choosing takes one row per sample, padding included, and returns a bool mask of what is kept, to which a caller may add
(answer tokens, say); `pack_indices` turns the mask into ascending indices and counts. On a GPU only long rows are
sorted.
"""

from __future__ import annotations

from types import ModuleType

import torch

from zipr1_kernels import checks, dispatch
from zipr1_kernels.kept import Kept
from zipr1_kernels.select_top_p import reference

# Tokens up to which the kernel searches a row and does not sort it: one program searches, about 7 us for each 1,024
# tokens (counted in instructions, not measured), while a sort uses the whole GPU. A threshold needs neither.
LONGEST = 8192


def cut_points(
    scores: torch.Tensor, candidates: torch.Tensor, always: torch.Tensor
) -> torch.Tensor:
    """c_k: the share of score mass ahead of token k. Token k is kept iff c_k < p.

    Always-kept tokens go first; the rest follow by falling score, ties by lower index. So c is the
    exclusive cumulative sum of normalised scores that starts at the mass of the always-kept ones.

    Args:
        scores: `(B, L)` float, >= 0 at candidates; other entries are never read (NaN allowed).
        candidates: `(B, L)` bool, the prompt's tokens; False for padding.
        always: `(B, L)` bool, tokens kept whatever their score; entries at padding are ignored.

    Returns:
        `(B, L)` in the tokens' own order, dtype of `scores` (at least float32): 0 for always-kept
        tokens, 2 for padding, else in [0, 1] up to rounding. All candidates get 0 if all scores
        are 0. Differentiable in `scores`; the order is held fixed.
    """
    _check(scores, candidates, always)
    return reference.cut_points(scores, candidates, always)


def select_top_p(
    scores: torch.Tensor, p: torch.Tensor, candidates: torch.Tensor, always: torch.Tensor
) -> torch.Tensor:
    """Keep the fewest best tokens whose share of score mass reaches p. `(B, L)` bool.

    Args: as `cut_points`; p: `(B,)` float in (0, 1]. At p >= 1 every candidate is kept by
    definition (cumulative sums of underflowing scores reach 1 early). Source: arXiv 2410.08584,
    counted and chosen on the same score so that the kept mass is guaranteed, to 1e-6 of the whole.
    """
    _check(scores, candidates, always)
    checks.shape("p", p, (scores.shape[0],), "(B,)")
    return _module("select_top_p", scores, p, candidates, always).select_top_p(
        scores, p, candidates, always
    )


def select_top_k(
    scores: torch.Tensor, k: torch.Tensor, candidates: torch.Tensor, always: torch.Tensor
) -> torch.Tensor:
    """Keep k tokens: the always-kept ones, then the best others; ties by lower index.

    Args: as `cut_points`; k: `(B,)` integer, the total. Fewer always-kept tokens than k: exactly
    min(k, candidates) are kept; otherwise just the always-kept ones. Returns `(B, L)` bool.
    """
    _check(scores, candidates, always)
    checks.shape("k", k, (scores.shape[0],), "(B,)")
    checks.integer("k", k)
    return _module("select_top_k", scores, k, candidates, always).select_top_k(
        scores, k, candidates, always
    )


def select_threshold(
    scores: torch.Tensor, t: torch.Tensor, candidates: torch.Tensor, always: torch.Tensor
) -> torch.Tensor:
    """Keep tokens whose score is at least t times that of a uniform spread. `(B, L)` bool.

    Args: as `cut_points`; t: `(B,)` float >= 0, compared with score / sum * (number of
    candidates); 0 keeps all.
    """
    _check(scores, candidates, always)
    checks.shape("t", t, (scores.shape[0],), "(B,)")
    return _module("select_threshold", scores, t, candidates, always).select_threshold(
        scores, t, candidates, always
    )


def pack_indices(keep: torch.Tensor) -> Kept:
    """Kept slots in ascending order, each row padded to the longest by repeating its last kept slot.

    Args:
        keep: `(B, L)` bool with at least one True in each row (a row without any has count 0 and points at slot 0).

    A GPU is waited for once, to learn how much memory the longest row takes.
    """
    return pack_each(keep)[0]


def pack_each(*masks: torch.Tensor) -> tuple[Kept, ...]:
    """`pack_indices` of several masks, of any shapes, for all of which a GPU is waited for once."""
    for keep in masks:
        checks.shape("keep", keep, (None, None), "(B, L)")
        checks.boolean("keep", keep)
        if not keep.numel():
            said = tuple(keep.shape)
            raise ValueError(f"keep has shape {said}; expected at least one row and slot")
    found: tuple[Kept, ...] = _module("pack_indices", *masks).pack_each(*masks)
    return found


def _module(op: str, *tensors: torch.Tensor) -> ModuleType:
    """`reference` or `kernel`, for these tensors."""
    scores = tensors[0]
    cannot = "no kernel for torch.float64" if scores.dtype == torch.float64 else None
    if not dispatch.plan(op, *tensors, cannot=cannot):
        return reference
    from zipr1_kernels.select_top_p import kernel

    return kernel


def _check(scores: torch.Tensor, candidates: torch.Tensor, always: torch.Tensor) -> None:
    checks.shape("scores", scores, (None, None), "(B, L)")
    if not scores.is_floating_point():
        raise ValueError(f"scores has dtype {scores.dtype}; expected a float")
    for name, mask in (("candidates", candidates), ("always", always)):
        checks.shape(name, mask, tuple(scores.shape), "(B, L)")
        checks.boolean(name, mask)
