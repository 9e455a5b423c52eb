"""Sparse decode in plain PyTorch. Arguments as in `sparse_decode/__init__.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def sparse_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    valid: torch.Tensor | None = None,
    *,
    count: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """See the public function."""
    batch, q_heads, queries, dim = q.shape
    heads, slots = k.shape[1], k.shape[2]
    if count is not None:
        valid = torch.arange(slots, device=q.device) < count[:, None]
    groups = q_heads // heads
    mask = None if valid is None else valid[:, None, None]  # (B, 1, 1, n)
    if queries > 1:
        end = torch.full((1,), slots, device=q.device) if count is None else count
        last = end[:, None] - queries + torch.arange(queries, device=q.device)  # (B or 1, Lq)
        seen = torch.arange(slots, device=q.device) <= last[:, :, None]  # (B or 1, Lq, n)
        mask = seen[:, None] if mask is None else mask & seen[:, None]
        mask = mask.repeat(1, 1, groups, 1)  # (B or 1, 1, G*Lq, n)
    # The query heads of one key head become rows, so the cache is read once and never repeated.
    folded = q.reshape(batch, heads, groups * queries, dim)
    out = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scale)
    return out.reshape(batch, q_heads, queries, v.shape[3])
