"""A few new queries against a pruned key/value cache."""

from __future__ import annotations

import torch

from zipr1_kernels import checks
from zipr1_kernels.sparse_decode import reference


def sparse_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    valid: torch.Tensor | None = None,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of the last Lq appended tokens to the cache, causal among themselves.

    Args:
        q: `(B, HQ, Lq, D)`, the queries of cache slots n - Lq .. n - 1.
        k: `(B, H, n, D)`; v: `(B, H, n, DV)`: pruned prompt, then response; HQ is a multiple of H.
        valid: `(B, n)` bool; False slots (padding of ragged prompts) get weight exactly 0. None:
            all count. Each query must see at least one valid slot.
        scale: factor of the logits; default 1 / sqrt(D).

    Returns:
        `(B, HQ, Lq, DV)`, differentiable.

    What False slots hold is of no effect as long as it is finite: 0 * NaN is NaN. `kv_compact` pads
    by repeating a kept token, which keeps this promise at no cost.
    """
    checks.shape("q", q, (None, None, None, None), "(B, HQ, Lq, D)")
    batch, _, queries, dim = q.shape
    checks.shape("k", k, (batch, None, None, dim), "(B, H, n, D)")
    checks.shape("v", v, (*k.shape[:3], None), "(B, H, n, DV)")
    checks.heads(q, k)
    if queries > k.shape[2]:
        raise ValueError(
            f"{queries} queries but {k.shape[2]} cache slots; append the queries' own k and v first"
        )
    if valid is not None:
        checks.shape("valid", valid, (batch, k.shape[2]), "(B, n)")
        checks.boolean("valid", valid)
    return reference.sparse_decode(q, k, v, valid, scale=scale)
