"""Compaction in Triton: kept keys and values copied by one launch. Arguments as in reference.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from zipr1_kernels.launch import Config, launch, padded, rows_of

FORWARD = Config(1, 32, 4, 1)


@triton.jit(do_not_specialize=["n"])
def compact_kernel(
    K, V, NewK, NewV, Index, H, n, skb, skh, skl, svb, svh, svl,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """NewK and NewV `(B, n, H, D)`, contiguous."""
    n0, h, b = tl.program_id(0) * BN, tl.program_id(1), tl.program_id(2)
    place = n0 + tl.arange(0, BN)
    live = (place < n)[:, None]
    slot = tl.load(Index + b.to(tl.int64) * n + place, mask=place < n, other=0)[:, None]
    to = ((b.to(tl.int64) * n + place) * H + h)[:, None]
    dims, value_dims = tl.arange(0, BD), tl.arange(0, BV)
    k = tl.load(K + b.to(tl.int64) * skb + h * skh + slot * skl + dims, mask=live & (dims < D))
    tl.store(NewK + to * D + dims, k, mask=live & (dims < D))
    v = tl.load(
        V + b.to(tl.int64) * svb + h * svh + slot * svl + value_dims, mask=live & (value_dims < DV)
    )
    tl.store(NewV + to * DV + value_dims, v, mask=live & (value_dims < DV))


def kv_compact(
    k: torch.Tensor, v: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `(B, H, L, D)` at `index` `(B, n)`; without a gradient."""
    batch, heads, _, dim = k.shape
    n, values = index.shape[1], v.shape[3]
    k, v = rows_of(k), rows_of(v)
    small_k, small_v = k.new_empty(batch, n, heads, dim), v.new_empty(batch, n, heads, values)
    launch(compact_kernel, (triton.cdiv(n, FORWARD.columns), heads, batch),
        k, v, small_k, small_v, index.contiguous(), heads, n, *k.stride()[:3], *v.stride()[:3],
        D=dim, BD=padded(dim), DV=values, BV=padded(values), BN=FORWARD.columns, **FORWARD.options,
    )  # fmt: skip
    return small_k.transpose(1, 2), small_v.transpose(1, 2)
