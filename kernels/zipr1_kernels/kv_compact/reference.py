"""Gathering tokens in plain PyTorch. Arguments as in `kv_compact/__init__.py`."""

from __future__ import annotations

import torch


def pack_indices(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See the public function."""
    count = keep.sum(-1)
    width = max(int(count.max()), 1)
    rows, slots = keep.nonzero(as_tuple=True)
    rank = keep.cumsum(-1)[rows, slots] - 1
    index = torch.zeros(len(keep), width, dtype=torch.int64, device=keep.device)
    index[rows, rank] = slots
    # Slots ascend and padding is 0, so a running maximum repeats the last kept slot.
    return index.cummax(-1).values, count


def kv_compact(
    k: torch.Tensor, v: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the public function."""
    return gather_tokens(k, index), gather_tokens(v, index)


def gather_tokens(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`(B, H, L, D)`, `(B, n)` -> `(B, H, n, D)`.

    Indexed token-first: that is how projections lay heads out in memory, and on a CPU it was two to
    three times as fast as `torch.gather`.
    """
    rows = torch.arange(len(index), device=index.device)[:, None]
    return x.transpose(1, 2)[rows, index].transpose(1, 2)
