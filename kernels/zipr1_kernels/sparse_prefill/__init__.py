"""Causal attention among the kept tokens of a prompt."""

from __future__ import annotations

import torch

from zipr1_kernels import checks
from zipr1_kernels.sparse_prefill import reference


def sparse_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """O[T] = causal attention among the kept tokens T, O = 0 elsewhere (arXiv 2410.08584).

    Exact: T is shared by the heads and stays in order, so gather, attend, scatter is the same as
    attention with dropped keys masked. Cost: O(n^2) for the largest kept count n of the batch.

    Args:
        q: `(B, HQ, L, D)`; k: `(B, H, L, D)`; v: `(B, H, L, DV)`; HQ is a multiple of H.
        keep: `(B, L)` bool, at least one True in each row; padding (on either side) is False.
        scale: factor of the logits; default 1 / sqrt(D).

    Returns:
        `(B, HQ, L, DV)`. Dropped slots are exactly 0, their q, k, v are never read (NaN is
        harmless) and get gradient exactly 0.
    """
    checks.shape("q", q, (None, None, None, None), "(B, HQ, L, D)")
    batch, _, length, dim = q.shape
    checks.shape("k", k, (batch, None, length, dim), "(B, H, L, D)")
    checks.shape("v", v, (batch, k.shape[1], length, None), "(B, H, L, DV)")
    checks.shape("keep", keep, (batch, length), "(B, L)")
    checks.boolean("keep", keep)
    checks.heads(q, k)
    return reference.sparse_prefill(q, k, v, keep, scale=scale)
