"""Prune a key/value cache to chosen tokens, and turn a kept mask into indices."""

from __future__ import annotations

import torch

from zipr1_kernels import checks
from zipr1_kernels.kv_compact import reference


def pack_indices(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept slots in ascending order, right-padded by repeating the row's last kept slot.

    Args:
        keep: `(B, L)` bool with at least one True in each row (a row without any points at slot 0).

    Returns:
        index `(B, n)` int64 with n the largest count (at least 1), and count `(B,)` int64; entries
        from count[b] on are padding. Reading n makes a GPU wait for the host once.
    """
    checks.shape("keep", keep, (None, None), "(B, L)")
    checks.boolean("keep", keep)
    return reference.pack_indices(keep)


def kv_compact(
    k: torch.Tensor, v: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the tokens at `index`, in that order.

    Args:
        k: `(B, H, L, D)`; v: `(B, H, L, DV)`; index: `(B, n)` int64 in 0..L-1, from `pack_indices`.

    Returns:
        `(B, H, n, D)` and `(B, H, n, DV)`, new memory laid out token-first. Padding repeats a kept
        token, so a compacted cache is finite wherever the kept tokens are. Peak memory: the inputs
        plus n / L of them, until the caller drops the inputs. Differentiable; slots that `index`
        does not name are not read and get gradient 0.
    """
    checks.shape("k", k, (None, None, None, None), "(B, H, L, D)")
    checks.shape("v", v, (*k.shape[:3], None), "(B, H, L, DV)")
    checks.shape("index", index, (k.shape[0], None), "(B, n)")
    return reference.kv_compact(k, v, index)
