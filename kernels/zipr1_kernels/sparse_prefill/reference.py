"""Sparse prefill in plain PyTorch. Arguments as in `sparse_prefill/__init__.py`."""

from __future__ import annotations

import torch

from zipr1_kernels.causal import causal
from zipr1_kernels.kept import Kept
from zipr1_kernels.kv_compact.reference import gather_tokens


def sparse_prefill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: Kept, *, scale: float | None = None
) -> torch.Tensor:
    """See the public function."""
    if kept.everything:
        return causal(q, k, v, scale)
    # Padding sits on the right, so the causal mask alone hides it from every kept token; what
    # padding itself computes is thrown away below.
    small_q, small_k, small_v = (gather_tokens(x, kept.index) for x in (q, k, v))
    packed = causal(small_q, small_k, small_v, scale).transpose(1, 2)  # (B, n, HQ, DV)
    rows = packed.flatten(0, 1)  # (sum of counts, HQ, DV)
    if kept.ragged:
        rows = rows.index_select(0, kept.packed.flat)
    out = rows.new_zeros(len(q) * q.shape[2], q.shape[1], v.shape[3])
    out.index_copy_(0, kept.flat, rows)
    return out.view(len(q), q.shape[2], *out.shape[1:]).transpose(1, 2)
