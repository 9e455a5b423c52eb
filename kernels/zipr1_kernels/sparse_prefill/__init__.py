"""Causal attention among the kept tokens of a prompt."""

from __future__ import annotations

import torch

from zipr1_kernels import checks, dispatch
from zipr1_kernels.kept import Kept
from zipr1_kernels.kept import check as check_kept
from zipr1_kernels.packed_attention import library
from zipr1_kernels.sparse_prefill import blocked, packed, reference


def sparse_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kept: Kept,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """O[T] = causal attention among the kept tokens T, O = 0 elsewhere (arXiv 2410.08584).

    Exact: T is shared by the heads and stays in order, so gather, attend, scatter is the same as
    attention with dropped keys masked. Cost: O(n^2), n the largest kept count of the batch in torch
    and each row's own in the kernel.

    Args:
        q: `(B, HQ, L, D)`; k: `(B, H, L, D)`; v: `(B, H, L, DV)`; HQ is a multiple of H.
        kept: of L slots, at least one in each row; padding (on either side) is not kept.
        scale: factor of the logits; default 1 / sqrt(D).

    Returns:
        `(B, HQ, L, DV)`. Dropped slots are exactly 0, their q, k, v are never read (NaN is
        harmless) and get gradient exactly 0.
    """
    checks.shape("q", q, (None, None, None, None), "(B, HQ, L, D)")
    batch, _, length, dim = q.shape
    checks.shape("k", k, (batch, None, length, dim), "(B, H, L, D)")
    checks.shape("v", v, (batch, k.shape[1], length, None), "(B, H, L, DV)")
    check_kept(kept, batch, length)
    checks.heads(q, k)
    checks.same_dtype(q=q, k=k, v=v)
    # No GPU has measured the kernel yet; until one does, torch's attention of packed rows is taken where it runs.
    # Elsewhere rows of one length leave nothing to skip: gathering, then torch's fused attention is hard to beat.
    packs = dispatch.automatic("packed_attention") and not isinstance(library.choose(q, k, v), str)
    slower = dispatch.slow(q.dtype)
    if packs:
        slower = "torch's variable-length attention of gathered rows"
    elif not kept.ragged:
        slower = "rows are equally long: gather, then torch's fused attention"
    cannot = dispatch.unfit(q.dtype, dim, v.shape[3])
    if dispatch.plan("sparse_prefill", q, k, v, kept.index, cannot=cannot, slower=slower):
        from zipr1_kernels.sparse_prefill import kernel

        return kernel.sparse_prefill(q, k, v, kept, scale=scale)
    if packs and q.device.type == "cuda":
        return packed.sparse_prefill(q, k, v, kept, scale=scale)
    pays = kept.index.shape[1] >= blocked.least(q.dtype) and not kept.everything
    if dispatch.blocked("sparse_prefill", q, k, v, pays=pays):
        return blocked.sparse_prefill(q, k, v, kept, scale=scale)
    return reference.sparse_prefill(q, k, v, kept, scale=scale)
