"""A few new queries against a pruned key/value cache."""

from __future__ import annotations

import torch

from zipr1_kernels import checks, dispatch
from zipr1_kernels.sparse_decode import reference

# Queries that share a key head, all rows of one block of the kernel.
MOST_ROWS = 64


def sparse_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    valid: torch.Tensor | None = None,
    *,
    count: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of the last Lq appended tokens to the cache, causal among themselves.

    Args:
        q: `(B, HQ, Lq, D)`, the queries of cache slots n - Lq .. n - 1.
        k: `(B, H, n, D)`; v: `(B, H, n, DV)`: pruned prompt, then response; HQ is a multiple of H.
        valid: `(B, n)` bool; False slots (padding of ragged prompts) get weight exactly 0. None:
            all count. Each query must see at least one valid slot.
        count: `(B,)` int64, at least Lq: of a cache with room for more, how many slots of each row are filled; the
            queries are then the last Lq of these, and what lies behind is of no effect if finite. Only n, which stays,
            decides what is launched: a step can be captured as a CUDA graph. Takes the place of `valid`.
        scale: factor of the logits; default 1 / sqrt(D).

    Returns:
        `(B, HQ, Lq, DV)`, differentiable (with a gradient, plain torch runs).

    What False slots hold is of no effect as long as it is finite: 0 * NaN is NaN. `kv_compact` pads
    by repeating a kept token, which keeps this promise at no cost.
    """
    checks.shape("q", q, (None, None, None, None), "(B, HQ, Lq, D)")
    batch, _, queries, dim = q.shape
    checks.shape("k", k, (batch, None, None, dim), "(B, H, n, D)")
    checks.shape("v", v, (*k.shape[:3], None), "(B, H, n, DV)")
    checks.heads(q, k)
    checks.same_dtype(q=q, k=k, v=v)
    slots = k.shape[2]
    if count is not None:
        checks.shape("count", count, (batch,), "(B,)")
        checks.integer("count", count)
        if valid is not None:
            raise ValueError("count was given with valid; count alone says what counts")
    if queries > slots:
        raise ValueError(
            f"{queries} queries but {slots} cache slots; append the queries' own k and v first"
        )
    if valid is not None:
        checks.shape("valid", valid, (batch, slots), "(B, n)")
        checks.boolean("valid", valid)
    tensors = [x for x in (q, k, v, valid, count) if x is not None]
    cannot = dispatch.unfit(q.dtype, dim, v.shape[3])
    rows = q.shape[1] // k.shape[1] * queries
    most = MOST_ROWS if q.element_size() == 2 else MOST_ROWS // 4  # what fits in shared memory
    if rows > most:
        cannot = f"{rows} queries a key head are more than {most}"
    if dispatch.graded(q, k, v):
        cannot = "a gradient is wanted"
    slower = dispatch.slow(q.dtype)
    if not dispatch.plan("sparse_decode", *tensors, cannot=cannot, slower=slower):
        return reference.sparse_decode(q, k, v, valid, count=count, scale=scale)
    from zipr1_kernels.sparse_decode import kernel

    return kernel.sparse_decode(q, k, v, valid, count=count, scale=scale)
