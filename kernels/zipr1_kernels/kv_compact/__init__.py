"""Prune a key/value cache to chosen tokens."""

from __future__ import annotations

import torch

from zipr1_kernels import checks, dispatch
from zipr1_kernels.kept import Kept
from zipr1_kernels.kept import check as check_kept
from zipr1_kernels.kv_compact import reference


def kv_compact(k: torch.Tensor, v: torch.Tensor, kept: Kept) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the kept tokens, in order.

    Args:
        k: `(B, H, L, D)`; v: `(B, H, L, DV)`; kept: of L slots, n the most of a row. Or packed, `(T, H, D)` and
            `(T, H, DV)`: the kept tokens alone, T the sum of their counts, in the order of `kept.flat`.

    Returns:
        `(B, H, n, D)` and `(B, H, n, DV)`, new memory laid out token-first. Padding repeats a kept
        token, so a compacted cache is finite wherever the kept tokens are. Peak memory: the inputs
        plus n / L of them, until the caller drops the inputs; nothing else is allocated.
        Differentiable; slots that are not kept are not read and get gradient 0.
    """
    if k.ndim == 3:
        checks.shape("k", k, (kept.total, None, None), "(T, H, D)")
        checks.shape("v", v, (*k.shape[:2], None), "(T, H, DV)")
        # A batch of one row, of which every row of the result takes a part.
        one_k, one_v = _compact(
            k.transpose(0, 1)[None], v.transpose(0, 1)[None], kept.places.view(1, -1)
        )
        shape = kept.index.shape
        return one_k[0].unflatten(1, shape).transpose(0, 1), one_v[0].unflatten(1, shape).transpose(
            0, 1
        )
    checks.shape("k", k, (None, None, None, None), "(B, H, L, D)")
    checks.shape("v", v, (*k.shape[:3], None), "(B, H, L, DV)")
    check_kept(kept, k.shape[0], k.shape[2])
    return _compact(k, v, kept.index)


def _compact(
    k: torch.Tensor, v: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    checks.same_dtype(k=k, v=v)
    cannot = "a gradient is wanted" if dispatch.graded(k, v) else None
    if not dispatch.plan("kv_compact", k, v, index, cannot=cannot):
        return reference.kv_compact(k, v, index)
    from zipr1_kernels.kv_compact import kernel

    return kernel.kv_compact(k, v, index)
