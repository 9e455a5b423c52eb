"""Decoding over kept keys in Triton: the cache is split among programs, and a second kernel joins their shares.

The query heads of one key head are rows of one block, so that each key is read once. Forward only. Arguments as in
`sparse_decode/__init__.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from zipr1_kernels.launch import (
    INTERPRETED,
    LOG2E,
    Config,
    Tables,
    launch,
    padded,
    precision,
    rows_of,
    table,
)

# By padded head dimension; rows are the least a tensor core takes, more where more are asked for at once.
FORWARD: Tables = {
    80: {
        16: Config(16, 64, 4, 3),
        32: Config(16, 64, 4, 3),
        64: Config(16, 64, 4, 3),
        128: Config(16, 64, 4, 3),
    },
    90: {
        16: Config(16, 64, 4, 3),
        32: Config(16, 64, 4, 3),
        64: Config(16, 64, 4, 3),
        128: Config(16, 64, 4, 3),
    },
}

# Programs to aim at, about two for each multiprocessor of an H100: fewer leave it idle, more have more to join.
PROGRAMS = 264
# Shares of one row and head that are joined at once, at most: the most that `resources.py` compiles.
SHARES = 128


@triton.jit(do_not_specialize=["n", "span"])
def split_kernel(
    Q, K, V, Valid, Count, Part, Most, Total, H, G, queries, n, span, scale,
    sqb, sqh, sql, skb, skh, skl, svb, svh, svl, MASKED: tl.constexpr, COUNTED: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Of places span * i .. of one (row, key head): Part `(.., BM, BV)` not yet divided, its maximum and its sum."""
    pair, share = tl.program_id(0), tl.program_id(1)
    b, h = pair // H, pair % H
    count = n
    if COUNTED:
        count = tl.load(Count + b).to(tl.int32)
    dims, value_dims = tl.arange(0, BD), tl.arange(0, BV)
    row = tl.arange(0, BM)
    live = row < G * queries
    hq, i = h * G + row // queries, row % queries
    at = b.to(tl.int64) * sqb + hq.to(tl.int64) * sqh + i * sql
    q = tl.load(Q + at[:, None] + dims, mask=live[:, None] & (dims < D), other=0.0)
    if UP:
        q = q.to(tl.float32)
    last = count - queries + i  # the place that each query may still see
    acc = tl.zeros([BM, BV], tl.float32)
    most = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    begin = share * span
    for n0 in range(begin, tl.minimum(begin + span, count), BN):
        place = n0 + tl.arange(0, BN)
        real = (place < count) & (place < begin + span)
        if MASKED:
            real = real & (tl.load(Valid + b * n + place, mask=real, other=0) != 0)
        slot = place.to(tl.int64)
        k = tl.load(
            K + b.to(tl.int64) * skb + h * skh + slot[:, None] * skl + dims,
            mask=real[:, None] & (dims < D), other=0.0,
        )  # fmt: skip
        v = tl.load(
            V + b.to(tl.int64) * svb + h * svh + slot[:, None] * svl + value_dims,
            mask=real[:, None] & (value_dims < DV), other=0.0,
        )  # fmt: skip
        if UP:
            k, v = k.to(tl.float32), v.to(tl.float32)
        x = tl.dot(q, tl.trans(k), input_precision=PREC) * scale
        x = tl.where(real[None, :] & (place[None, :] <= last[:, None]), x, -float("inf"))
        new = tl.maximum(most, tl.max(x, 1))
        safe = tl.where(new == -float("inf"), 0.0, new)
        w = tl.exp2(x - safe[:, None])
        fade = tl.exp2(most - safe)
        total = total * fade + tl.sum(w, 1)
        acc = acc * fade[:, None] + tl.dot(w.to(v.dtype), v, input_precision=PREC)
        most = new
    part = (pair * tl.num_programs(1) + share) * BM + row
    tl.store(Part + part[:, None] * BV + value_dims, acc)
    tl.store(Most + part, most)
    tl.store(Total + part, total)


@triton.jit
def join_kernel(
    Part, Most, Total, Out, H, G, queries, shares, sob, soh, sol,
    DV: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """Out: the shares of one query, all loaded at once, weighed by their sums."""
    pair, row = tl.program_id(0), tl.program_id(1)
    b, h = pair // H, pair % H
    dims, share = tl.arange(0, BV), tl.arange(0, SHARES)
    at = (pair * shares + share) * BM + row
    most = tl.load(Most + at, mask=share < shares, other=-float("inf"))
    total = tl.load(Total + at, mask=share < shares, other=0.0)
    # A query sees at least one slot, so one of the shares is finite; a share that saw none weighs 0.
    weight = tl.exp2(most - tl.max(most, 0))
    part = tl.load(Part + at[:, None] * BV + dims, mask=(share < shares)[:, None], other=0.0)
    acc = tl.sum(part * weight[:, None], 0) / tl.sum(total * weight, 0)
    hq, i = h * G + row // queries, row % queries
    out = Out + b.to(tl.int64) * sob + hq.to(tl.int64) * soh + i * sol
    tl.store(out + dims, acc.to(Out.dtype.element_ty), mask=dims < DV)


def split(n: int, pairs: int, columns: int) -> tuple[int, int]:
    """Places of a share, a multiple of `columns`, and how many shares n places make; pairs: rows times key heads."""
    wanted = min(SHARES, triton.cdiv(PROGRAMS, pairs))
    span = triton.cdiv(triton.cdiv(n, wanted), columns) * columns
    return span, triton.cdiv(n, span)


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
    heads, values = k.shape[1], v.shape[3]
    groups, rows = q_heads // heads, q_heads // heads * queries
    scale = dim**-0.5 if scale is None else scale
    q, k, v = rows_of(q), rows_of(k), rows_of(v)
    config = table(FORWARD, k.device)[max(padded(dim), padded(values))]
    n = k.shape[2]
    block = max(config.rows, triton.next_power_of_2(rows))
    span, shares = split(n, batch * heads, config.columns)
    part = q.new_empty(batch * heads, shares, block, padded(values), dtype=torch.float32)
    most, total = (part.new_empty(batch * heads, shares, block) for _ in range(2))
    out = torch.empty(batch, queries, q_heads, values, dtype=q.dtype, device=q.device).transpose(1, 2)  # fmt: skip
    launch(split_kernel, (batch * heads, shares),
        q, k, v,
        q if valid is None else valid.contiguous().view(torch.uint8),
        q if count is None else count.long(),
        part, most, total, heads, groups, queries, n, span, scale * LOG2E,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        MASKED=valid is not None, COUNTED=count is not None,
        D=dim, BD=padded(dim), DV=values, BV=padded(values), BM=block, BN=config.columns,
        PREC=precision(q.dtype), UP=INTERPRETED, **config.options,
    )  # fmt: skip
    launch(join_kernel, (batch * heads, rows),
        part, most, total, out, heads, groups, queries, shares, *out.stride()[:3],
        DV=values, BV=padded(values), BM=block, SHARES=triton.next_power_of_2(shares), num_warps=4,
    )  # fmt: skip
    return out
