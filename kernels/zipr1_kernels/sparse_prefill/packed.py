"""Sparse prefill on a GPU by torch's variable-length attention: gather the kept tokens, attend, put them back.

Arguments as in `sparse_prefill/__init__.py`.
"""

from __future__ import annotations

import torch

from zipr1_kernels.kept import Kept
from zipr1_kernels.packed_attention import packed_attention


def sparse_prefill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: Kept, *, scale: float | None = None
) -> torch.Tensor:
    """See the public function."""
    batch, q_heads, length, _ = q.shape
    # Token-first, as projections lay heads out in memory: no copy.
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    if not kept.everything:
        rows = [x.index_select(0, kept.flat) for x in rows]
    out = packed_attention(rows[0], rows[1], rows[2], kept, scale=scale)
    if not kept.everything:
        over = out.new_zeros(batch * length, q_heads, v.shape[3])
        out = over.index_copy_(0, kept.flat, out)
    return out.view(batch, length, q_heads, -1).transpose(1, 2)
