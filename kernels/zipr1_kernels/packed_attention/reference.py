"""Attention of packed rows in plain PyTorch: padded, computed, stripped.

Arguments as in `packed_attention/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from zipr1_kernels.causal import causal
from zipr1_kernels.kept import Kept


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: Kept, *, scale: float | None = None
) -> torch.Tensor:
    """See the public function."""
    return by_rows(q, k, v, kept, lambda q, k, v: causal(q, k, v, scale))


def by_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kept: Kept,
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """`attend` of heads `(B, H, n, D)`, whose rows are padded to the longest."""
    rows, longest = kept.index.shape
    if kept.ragged:
        # Padding repeats a row's last token; it sits on the right, where the causal mask hides it.
        places = kept.places.flatten()
        q, k, v = (x.index_select(0, places) for x in (q, k, v))
    q, k, v = (x.unflatten(0, (rows, longest)).transpose(1, 2) for x in (q, k, v))
    out = attend(q, k, v).transpose(1, 2).flatten(0, 1)
    return out.index_select(0, kept.packed.flat) if kept.ragged else out
