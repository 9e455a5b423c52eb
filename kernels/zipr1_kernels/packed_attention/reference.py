"""Attention of packed rows in plain PyTorch: padded, computed, stripped.

Arguments as in `packed_attention/__init__.py`.
"""

from __future__ import annotations

import torch

from zipr1_kernels.causal import causal
from zipr1_kernels.kept import Kept


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: Kept, *, scale: float | None = None
) -> torch.Tensor:
    """See the public function."""
    packed = kept.packed
    rows, longest = packed.index.shape
    if kept.ragged:
        # Padding repeats a row's last token; it sits on the right, where the causal mask hides it.
        places = (kept.starts[:-1, None] + packed.index).flatten()
        q, k, v = (x.index_select(0, places) for x in (q, k, v))
    q, k, v = (x.view(rows, longest, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    out = causal(q, k, v, scale).transpose(1, 2).flatten(0, 1)
    return out.index_select(0, packed.flat) if kept.ragged else out
