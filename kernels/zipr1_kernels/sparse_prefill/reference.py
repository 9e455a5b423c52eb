"""Sparse prefill in plain PyTorch. Arguments as in `sparse_prefill/__init__.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from zipr1_kernels.kv_compact.reference import gather_tokens, pack_indices


def sparse_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """See the public function."""
    if bool(keep.all()):
        return _causal(q, k, v, scale)
    index, count = pack_indices(keep)
    # Padding sits on the right, so the causal mask alone hides it from every kept token; what
    # padding itself computes is thrown away below.
    packed = _causal(
        gather_tokens(q, index), gather_tokens(k, index), gather_tokens(v, index), scale
    ).transpose(1, 2)  # (B, n, HQ, DV)
    real = torch.arange(index.shape[1], device=keep.device) < count[:, None]  # (B, n)
    out = packed.new_zeros(len(q), q.shape[2], q.shape[1], v.shape[3])  # (B, L, HQ, DV)
    # Both masks list rows, then ascending slots: the m-th True of one is the m-th of the other.
    return out.index_put(keep.nonzero(as_tuple=True), packed[real]).transpose(1, 2)


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
