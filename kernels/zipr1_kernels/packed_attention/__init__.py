"""Causal attention of rows of different lengths that lie one after the other, without padding."""

from __future__ import annotations

import torch

from zipr1_kernels import checks, dispatch
from zipr1_kernels.kept import Kept
from zipr1_kernels.packed_attention import library, reference


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: Kept, *, scale: float | None = None
) -> torch.Tensor:
    """Each token attends to those of its own row up to itself: `sparse_prefill` of tokens that were gathered before.

    On a GPU a variable-length attention runs where it can, FlashAttention 3 or 4 where installed, else torch's own:
    unlike torch's padded attention on cuDNN it plans nothing for a new length, and needs no padding. Elsewhere rows are
    padded to the longest and `sparse_prefill` runs.

    Args:
        q: `(T, HQ, D)`; k: `(T, H, D)`; v: `(T, H, DV)`; HQ is a multiple of H. The kept tokens of all rows in the
            order of `kept.flat`, T the sum of the counts.
        kept: whose tokens they are.
        scale: factor of the logits; default 1 / sqrt(D).

    Returns:
        `(T, HQ, DV)`, differentiable.
    """
    checks.shape("q", q, (None, None, None), "(T, HQ, D)")
    tokens, _, dim = q.shape
    checks.shape("k", k, (tokens, None, dim), "(T, H, D)")
    checks.shape("v", v, (tokens, k.shape[1], None), "(T, H, DV)")
    checks.heads(q, k)
    checks.same_dtype(q=q, k=k, v=v)
    if kept.total is not None and kept.total != tokens:
        raise ValueError(f"{tokens} tokens and kept has {kept.total}; give those of kept.flat")
    provider = library.choose(q, k, v)
    cannot, name = (provider, "") if isinstance(provider, str) else (None, provider.name)
    if dispatch.library("packed_attention", q, k, v, kept.index, cannot=cannot, name=name):
        assert not isinstance(provider, str)
        return library.packed_attention(provider, q, k, v, kept, scale=scale)
    # Which uses this operation, so it is not imported above.
    from zipr1_kernels.sparse_prefill import blocked, sparse_prefill

    short = not kept.ragged or kept.index.shape[1] < blocked.LEAST
    if short and q.device.type == "cpu" and not dispatch.forced("triton"):
        return reference.packed_attention(q, k, v, kept, scale=scale)
    return reference.by_rows(
        q, k, v, kept, lambda q, k, v: sparse_prefill(q, k, v, kept.packed, scale=scale)
    )
