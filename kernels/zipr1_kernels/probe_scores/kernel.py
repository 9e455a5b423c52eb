"""Probe scores in Triton: two passes over the keys, no weight ever written to memory.

First the log of each row's normaliser (a row is one probe of one head): the keys are split among programs, and a small
kernel joins their shares. Then each block of columns sums its weights over all rows, in a fixed order and without
atomics: the same numbers every time. Backward has the same two shapes, without the split.
Arguments as in `probe_scores/__init__.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from zipr1_kernels import dispatch
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

# By padded head dimension. Those of sm_90 are the ones that, compiled for it, spill no register, multiply by warp
# groups (wgmma) and leave room for the most warps (kernels/bench/resources.py --candidates); no GPU has chosen yet.
FORWARD: Tables = {
    80: dict.fromkeys((16, 32, 64, 128), Config(64, 64, 4, 2)),
    90: dict.fromkeys((16, 32, 64, 128), Config(64, 64, 4, 2)),
}
COLUMNS: Tables = {
    80: dict.fromkeys((16, 32, 64, 128), Config(64, 64, 8, 2)),
    90: dict.fromkeys((16, 32, 64, 128), Config(64, 64, 4, 2)),
}
# Gradients of the queries, and of the keys.
QUERIES: Tables = {
    80: dict.fromkeys((16, 32, 64, 128), Config(32, 64, 4, 2)),
    90: dict.fromkeys((16, 32, 64, 128), Config(64, 64, 4, 2)),
}
KEYS: Tables = {
    80: dict.fromkeys((16, 32, 64, 128), Config(32, 64, 4, 2)),
    90: dict.fromkeys((16, 32, 64, 128), Config(64, 64, 4, 2)),
}

# Programs to aim at when keys are split, about two for each multiprocessor of an H100, and what is joined at once.
PROGRAMS, MOST_SHARES, JOINED = 264, 32, 64


@triton.jit
def _rows(
    Q, Slot, b, h, m0, R, GR, sqb, sqh, sql,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Queries `(BM, BD)` and the slots they reach `(BM,)`, -1 for rows that do not count, whose queries are 0."""
    rows = m0 + tl.arange(0, BM)
    dims = tl.arange(0, BD)
    slot = tl.load(Slot + b * R + rows % R, mask=rows < GR, other=-1)
    head = h * (GR // R) + rows // R
    at = b.to(tl.int64) * sqb + head.to(tl.int64) * sqh + (rows % R) * sql
    q = tl.load(Q + at[:, None] + dims, mask=(slot >= 0)[:, None] & (dims < D), other=0.0)
    if UP:
        q = q.to(tl.float32)
    return q, slot


@triton.jit
def _keys(
    K, Cand, b, h, n0, L, skb, skh, skl, CLEAN: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Keys `(BN, BD)`, the columns `(BN,)` and whether they are candidates.

    CLEAN: 0 where no candidate is, for a product that sums over keys. Without it such keys spoil their own column
    alone, which is masked later, and the loads need not wait for Cand.
    """
    cols = n0 + tl.arange(0, BN)
    dims = tl.arange(0, BD)
    cand = tl.load(Cand + b * L + cols, mask=cols < L, other=0) != 0
    base = K + b.to(tl.int64) * skb + h * skh
    there = cols < L
    if CLEAN:
        there = cand
    k = tl.load(
        base + cols[:, None].to(tl.int64) * skl + dims, mask=there[:, None] & (dims < D), other=0.0
    )
    if UP:
        k = k.to(tl.float32)
    return k, cols, cand


@triton.jit
def _weights(q, k, cols, cand, slot, lse, scale, PREC: tl.constexpr):
    """Attention weights `(BM, BN)` of rows whose normaliser is known; 0 where a row does not see a column."""
    x = tl.dot(q, tl.trans(k), input_precision=PREC) * scale
    seen = cand[None, :] & (cols[None, :] <= slot[:, None])
    return tl.where(seen, tl.exp2(x - lse[:, None]), 0.0)


@triton.jit(do_not_specialize=["L", "span"])
def lse_kernel(
    Q, K, Slot, Cand, Share, H, R, GR, L, scale, sqb, sqh, sql, skb, skh, skl, span, shares, Rows,
    MAPPED: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Share `(shares, B, H, GR)`: base-2 logarithm of each row's sum of exponentials over keys span * i .. of the i-th
    share; inf for a row that sees none of them, as is for the whole what `join_kernel` finds when all are."""
    m0, h, pair = tl.program_id(0) * BM, tl.program_id(1), tl.program_id(2)
    b, share = pair // shares, pair % shares
    row = b
    if MAPPED:
        row = tl.load(Rows + b)
    q, slot = _rows(Q, Slot, b, h, m0, R, GR, sqb, sqh, sql, D, BD, BM, UP)
    most = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    begin = share * span
    for n0 in range(begin, tl.minimum(begin + span, tl.max(slot, 0) + 1), BN):
        k, cols, cand = _keys(K, Cand, row, h, n0, L, skb, skh, skl, False, D, BD, BN, UP)
        x = tl.dot(q, tl.trans(k), input_precision=PREC) * scale
        x = tl.where(cand[None, :] & (cols[None, :] <= slot[:, None]), x, -float("inf"))
        new = tl.maximum(most, tl.max(x, 1))
        safe = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp2(most - safe) + tl.sum(tl.exp2(x - safe[:, None]), 1)
        most = new
    rows = m0 + tl.arange(0, BM)
    lse = tl.where(total > 0, most + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))
    at = (share * (tl.num_programs(2) // shares) + b) * H + h
    tl.store(Share + at * GR + rows, lse, mask=rows < GR)


@triton.jit
def join_kernel(Share, Lse, total, shares, SHARES: tl.constexpr, BLOCK: tl.constexpr):
    """Lse `(total,)` of Share `(shares, total)`, all shares of a row at once; inf where it saw nothing at all."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    share = tl.arange(0, SHARES)
    there = (share < shares)[:, None] & (row < total)[None, :]
    x = tl.load(Share + share[:, None] * total + row[None, :], mask=there, other=float("inf"))
    x = tl.where(x == float("inf"), -float("inf"), x)
    most = tl.max(x, 0)
    safe = tl.where(most == -float("inf"), 0.0, most)
    none = most == -float("inf")
    total_weight = tl.where(none, 1.0, tl.sum(tl.exp2(x - safe[None, :]), 0))
    tl.store(
        Lse + row, tl.where(none, float("inf"), most + tl.log2(total_weight)), mask=row < total
    )


@triton.jit
def columns_kernel(
    Q, K, Slot, Cand, Lse, Out, Count, H, R, GR, L, scale, sqb, sqh, sql, skb, skh, skl, Rows,
    NORM: tl.constexpr, MAPPED: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Out `(B, L)`: the weights summed over heads and probes; Count `(B, L)`: how many probes see a column."""
    n0, b = tl.program_id(0) * BN, tl.program_id(1)
    row = b
    if MAPPED:
        row = tl.load(Rows + b)
    total = tl.zeros([BN], tl.float32)
    cols = n0 + tl.arange(0, BN)
    cand = tl.load(Cand + row * L + cols, mask=cols < L, other=0) != 0
    for h in range(H):
        k, _, _ = _keys(K, Cand, row, h, n0, L, skb, skh, skl, False, D, BD, BN, UP)
        for m0 in range(0, GR, BM):
            q, slot = _rows(Q, Slot, b, h, m0, R, GR, sqb, sqh, sql, D, BD, BM, UP)
            rows = m0 + tl.arange(0, BM)
            lse = tl.load(Lse + (b * H + h) * GR + rows, mask=rows < GR, other=float("inf"))
            total += tl.sum(_weights(q, k, cols, cand, slot, lse, scale, PREC), 0)
    if NORM:
        count = tl.zeros([BN], tl.float32)
        for r0 in range(0, R, BM):
            probe = r0 + tl.arange(0, BM)
            slot = tl.load(Slot + b * R + probe, mask=probe < R, other=-1)
            count += tl.sum((cols[None, :] <= slot[:, None]).to(tl.float32), 0)
        count = tl.maximum(count, 1.0)
        total = total / count
        tl.store(Count + b * L + cols, count, mask=cols < L)
    tl.store(Out + b * L + cols, tl.where(cand, total, 0.0), mask=cols < L)


@triton.jit
def queries_grad_kernel(
    Q, K, Slot, Cand, Lse, Grad, Delta, DQ, H, R, GR, L, scale, factor, sqb, sqh, sql, skb, skh, skl,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """DQ, and Delta: each row's weighted mean of the columns' gradients. scale is in base 2, factor as it is given."""
    m0, h, b = tl.program_id(0) * BM, tl.program_id(1), tl.program_id(2)
    q, slot = _rows(Q, Slot, b, h, m0, R, GR, sqb, sqh, sql, D, BD, BM, UP)
    rows = m0 + tl.arange(0, BM)
    at = (b * H + h) * GR + rows
    lse = tl.load(Lse + at, mask=rows < GR, other=float("inf"))
    end = tl.max(slot, 0) + 1
    delta = tl.zeros([BM], tl.float32)
    for n0 in range(0, end, BN):
        k, cols, cand = _keys(K, Cand, b, h, n0, L, skb, skh, skl, True, D, BD, BN, UP)
        grad = tl.load(Grad + b * L + cols, mask=cols < L, other=0.0)
        w = _weights(q, k, cols, cand, slot, lse, scale, PREC)
        delta += tl.sum(w * grad[None, :], 1)
    tl.store(Delta + at, delta, mask=rows < GR)
    dq = tl.zeros([BM, BD], tl.float32)
    for n0 in range(0, end, BN):
        k, cols, cand = _keys(K, Cand, b, h, n0, L, skb, skh, skl, True, D, BD, BN, UP)
        grad = tl.load(Grad + b * L + cols, mask=cols < L, other=0.0)
        dx = _weights(q, k, cols, cand, slot, lse, scale, PREC) * (grad[None, :] - delta[:, None])
        dq += tl.dot(dx.to(k.dtype), k, input_precision=PREC)
    dims = tl.arange(0, BD)
    there = (rows < GR)[:, None] & (dims < D)
    tl.store(DQ + at[:, None].to(tl.int64) * D + dims, (dq * factor).to(DQ.dtype.element_ty), mask=there)  # fmt: skip


@triton.jit
def keys_grad_kernel(
    Q, K, Slot, Cand, Lse, Grad, Delta, DK, H, R, GR, L, factor, scale, sqb, sqh, sql, skb, skh, skl,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """DK `(B, H, L, D)`, contiguous; 0 where no candidate is."""
    n0, h, b = tl.program_id(0) * BN, tl.program_id(1), tl.program_id(2)
    k, cols, cand = _keys(K, Cand, b, h, n0, L, skb, skh, skl, True, D, BD, BN, UP)
    grad = tl.load(Grad + b * L + cols, mask=cols < L, other=0.0)
    dk = tl.zeros([BN, BD], tl.float32)
    for m0 in range(0, GR, BM):
        q, slot = _rows(Q, Slot, b, h, m0, R, GR, sqb, sqh, sql, D, BD, BM, UP)
        rows = m0 + tl.arange(0, BM)
        at = (b * H + h) * GR + rows
        lse = tl.load(Lse + at, mask=rows < GR, other=float("inf"))
        delta = tl.load(Delta + at, mask=rows < GR, other=0.0)
        dx = _weights(q, k, cols, cand, slot, lse, scale, PREC) * (grad[None, :] - delta[:, None])
        dk += tl.dot(tl.trans(dx.to(q.dtype)), q, input_precision=PREC)
    dims = tl.arange(0, BD)
    at = (((b * H + h) * L).to(tl.int64) + cols[:, None]) * D + dims
    tl.store(DK + at, (dk * factor).to(DK.dtype.element_ty), mask=(cols < L)[:, None] & (dims < D))


def _shape(config: Config, k: torch.Tensor) -> dict[str, Any]:
    dim = k.shape[3]
    return {
        "D": dim, "BD": padded(dim), "BM": config.rows, "BN": config.columns,
        "PREC": precision(k.dtype), "UP": INTERPRETED, **config.options,
    }  # fmt: skip


def _span(length: int, blocks: int, columns: int) -> int:
    """Keys of one program: so many that `blocks` of rows make about PROGRAMS of them, in whole blocks of columns."""
    shares = min(MOST_SHARES, max(1, PROGRAMS // blocks))
    return triton.cdiv(triton.cdiv(length, shares), columns) * columns


class _ProbeScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, probes, candidates, rows_of_keys, scale, normalise):  # type: ignore[no-untyped-def]
        batch, q_heads, count, dim = q.shape
        heads, length = k.shape[1], k.shape[2]
        q, k = rows_of(q), rows_of(k)
        slots = probes.to(torch.int32).contiguous()
        mapped = rows_of_keys is not None
        which = rows_of_keys.to(torch.int32).contiguous() if mapped else slots
        candidates = candidates.contiguous().view(torch.uint8)
        rows = q_heads // heads * count
        lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=k.device)
        out = torch.empty(batch, length, dtype=torch.float32, device=k.device)
        seen = torch.empty_like(out)
        config = table(FORWARD, k.device)[padded(dim)]
        sizes = (heads, count, rows, length, scale * LOG2E, *q.stride()[:3], *k.stride()[:3])
        blocks = triton.cdiv(rows, config.rows) * heads * batch
        span = _span(length, blocks, config.columns)
        shares = triton.cdiv(length, span)
        part = lse if shares == 1 else lse.new_empty(shares, *lse.shape)
        launch(
            lse_kernel, (triton.cdiv(rows, config.rows), heads, batch * shares),
            q, k, slots, candidates, part, *sizes, span, shares, which, MAPPED=mapped, **_shape(config, k),
        )  # fmt: skip
        if shares > 1:
            launch(
                join_kernel, (triton.cdiv(lse.numel(), JOINED),), part, lse, lse.numel(), shares,
                SHARES=triton.next_power_of_2(shares), BLOCK=JOINED, num_warps=4,
            )  # fmt: skip
        inputs = (q, k, slots, candidates, lse)
        config = table(COLUMNS, k.device)[padded(dim)]
        launch(
            columns_kernel, (triton.cdiv(length, config.columns), batch), *inputs, out, seen, *sizes, which,
            NORM=normalise, MAPPED=mapped, **_shape(config, k),
        )  # fmt: skip
        ctx.save_for_backward(*inputs, seen)
        ctx.scale, ctx.normalise = scale, normalise
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        q, k, slots, candidates, lse, seen = ctx.saved_tensors
        batch, heads, rows = lse.shape
        length, dim, count = k.shape[2], k.shape[3], slots.shape[1]
        grad = grad.float().contiguous()
        if ctx.normalise:
            grad = grad / seen
        delta, dq = torch.empty_like(lse), torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        inputs = (q, k, slots, candidates, lse, grad, delta)
        sizes = (heads, count, rows, length)
        options = {"scale": ctx.scale * LOG2E, "factor": ctx.scale}
        for x, names in ((q, ("sqb", "sqh", "sql")), (k, ("skb", "skh", "skl"))):
            options |= dict(zip(names, x.stride()[:3], strict=True))
        config = table(QUERIES, k.device)[padded(dim)]
        launch(
            queries_grad_kernel, (triton.cdiv(rows, config.rows), heads, batch),
            *inputs, dq, *sizes, **options, **_shape(config, k),
        )  # fmt: skip
        config = table(KEYS, k.device)[padded(dim)]
        launch(
            keys_grad_kernel, (triton.cdiv(length, config.columns), heads, batch),
            *inputs, dk, *sizes, **options, **_shape(config, k),
        )  # fmt: skip
        return dq, dk, None, None, None, None, None


def probe_scores(
    q_probe: torch.Tensor,
    k: torch.Tensor,
    probes: torch.Tensor,
    candidates: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    scale: float | None = None,
    normalise: bool = True,
) -> torch.Tensor:
    """See the public function."""
    scale = q_probe.shape[3] ** -0.5 if scale is None else scale
    if rows is not None and dispatch.graded(
        q_probe, k
    ):  # the backward kernels know one key row for each of queries
        k, candidates, rows = k.index_select(0, rows), candidates.index_select(0, rows), None
    out: torch.Tensor = _ProbeScores.apply(q_probe, k, probes, candidates, rows, scale, normalise)
    return out
