"""Attention among kept tokens in Triton, ragged over samples, reading and writing through their indices.

An online softmax over blocks of kept keys. A program owns a block of kept queries of one head; blocks beyond a sample's
own count end at once, so a ragged batch costs the sum of its samples and not the largest of them times their number.
Arguments as in `sparse_prefill/__init__.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from zipr1_kernels.kept import Kept
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

# By padded head dimension. sm_80: of the sizes tried, the largest without a spilled register. sm_90: of those without
# one, whose products are all by warp groups (wgmma) of 64 columns or more, those that leave room for the most warps
# (kernels/bench/resources.py --candidates). No GPU has chosen among them. Forward, rows are a multiple of columns: the
# causal mask then concerns the last blocks of a row only.
FORWARD: Tables = {
    80: {
        **dict.fromkeys((16, 32), Config(64, 64, 4, 2)),
        64: Config(128, 64, 8, 3),
        128: Config(128, 32, 8, 3),
    },
    90: {
        **dict.fromkeys((16, 32), Config(64, 64, 4, 2)),
        64: Config(64, 64, 4, 3),
        128: Config(128, 64, 8, 3),
    },
}
# Gradients of the queries, and of keys and values.
QUERIES: Tables = {
    80: {**dict.fromkeys((16, 32, 64), Config(32, 64, 4, 2)), 128: Config(32, 64, 8, 2)},
    90: {**dict.fromkeys((16, 32, 64), Config(64, 64, 8, 2)), 128: Config(64, 64, 4, 2)},
}
KEYS: Tables = {
    80: {**dict.fromkeys((16, 32, 64), Config(32, 64, 4, 2)), 128: Config(32, 64, 8, 2)},
    90: {**dict.fromkeys((16, 32, 64), Config(64, 64, 8, 2)), 128: Config(64, 64, 8, 1)},
}


@triton.jit
def _tokens(X, slot, live, stride, D: tl.constexpr, BD: tl.constexpr, UP: tl.constexpr):
    """Rows of X at the slots, `(block, BD)`; 0 where not live, never read there."""
    dims = tl.arange(0, BD)
    x = tl.load(X + slot[:, None] * stride + dims, mask=live[:, None] & (dims < D), other=0.0)
    if UP:
        x = x.to(tl.float32)
    return x


@triton.jit
def _span(Index, b, start, count, n, BLOCK: tl.constexpr):
    """Places start.. in the row's list of kept tokens, their slots (int64), and which of them there are."""
    place = start + tl.arange(0, BLOCK)
    live = place < count
    return place, tl.load(Index + b.to(tl.int64) * n + place, mask=live, other=0), live


@triton.jit
def _attend(
    q, K, V, Index, b, rows, acc, most, total, begin, end, count, n, scale, skl, svl, MASK: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    BN: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    for n0 in range(begin, end, BN):
        cols, slot, live = _span(Index, b, n0, count, n, BN)
        k = _tokens(K, slot, live, skl, D, BD, UP)
        x = tl.dot(q, tl.trans(k), input_precision=PREC) * scale
        if MASK:
            x = tl.where((cols[None, :] <= rows[:, None]) & live[None, :], x, -float("inf"))
        new = tl.maximum(most, tl.max(x, 1))
        w = tl.exp2(x - new[:, None])
        fade = tl.exp2(most - new)
        total = total * fade + tl.sum(w, 1)
        v = _tokens(V, slot, live, svl, DV, BV, UP)
        acc = acc * fade[:, None] + tl.dot(w.to(v.dtype), v, input_precision=PREC)
        most = new
    return acc, most, total


@triton.jit(do_not_specialize=["n"])
def forward_kernel(
    Q, K, V, Out, Lse, Index, Count, HQ, G, n, scale, sqb, sqh, sql, skb, skh, skl, svb, svh, svl, sob, soh, sol,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Out at the kept slots (the rest is not touched), Lse `(B, HQ, n)` in base 2."""
    hq, b = tl.program_id(1), tl.program_id(2)
    count = tl.load(Count + b).to(tl.int32)
    # The longest rows first: the last block sees the most keys.
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    if m0 < count:
        Q += b.to(tl.int64) * sqb + hq.to(tl.int64) * sqh
        K += b.to(tl.int64) * skb + (hq // G).to(tl.int64) * skh
        V += b.to(tl.int64) * svb + (hq // G).to(tl.int64) * svh
        Out += b.to(tl.int64) * sob + hq.to(tl.int64) * soh
        rows, slot, live = _span(Index, b, m0, count, n, BM)
        q = _tokens(Q, slot, live, sql, D, BD, UP)
        acc = tl.zeros([BM, BV], tl.float32)
        most = tl.full([BM], -float("inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc, most, total = _attend(
            q, K, V, Index, b, rows, acc, most, total, 0, m0, count, n, scale, skl, svl, False,
            D, BD, DV, BV, BN, PREC, UP,
        )  # fmt: skip
        acc, most, total = _attend(
            q, K, V, Index, b, rows, acc, most, total, m0, tl.minimum(m0 + BM, count), count, n, scale, skl, svl, True,
            D, BD, DV, BV, BN, PREC, UP,
        )  # fmt: skip
        dims = tl.arange(0, BV)
        there = live[:, None] & (dims < DV)
        tl.store(
            Out + slot[:, None] * sol + dims,
            (acc / total[:, None]).to(Out.dtype.element_ty),
            mask=there,
        )
        at = (b.to(tl.int64) * HQ + hq) * n + rows
        tl.store(Lse + at, most + tl.log2(total), mask=live)


@triton.jit(do_not_specialize=["n"])
def queries_grad_kernel(
    Q, K, V, Out, Grad, DQ, Lse, Delta, Index, Count, HQ, G, n, scale, factor,
    sqb, sqh, sql, skb, skh, skl, svb, svh, svl, sob, soh, sol, sgb, sgh, sgl,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """DQ at the kept slots (laid out like Q), and Delta `(B, HQ, n)`: the sum of output times gradient of each row."""
    m0, hq, b = tl.program_id(0) * BM, tl.program_id(1), tl.program_id(2)
    count = tl.load(Count + b).to(tl.int32)
    if m0 < count:
        start = b.to(tl.int64) * sqb + hq.to(tl.int64) * sqh
        K += b.to(tl.int64) * skb + (hq // G).to(tl.int64) * skh
        V += b.to(tl.int64) * svb + (hq // G).to(tl.int64) * svh
        Out += b.to(tl.int64) * sob + hq.to(tl.int64) * soh
        Grad += b.to(tl.int64) * sgb + hq.to(tl.int64) * sgh
        rows, slot, live = _span(Index, b, m0, count, n, BM)
        q = _tokens(Q + start, slot, live, sql, D, BD, UP)
        out = _tokens(Out, slot, live, sol, DV, BV, UP)
        grad = _tokens(Grad, slot, live, sgl, DV, BV, UP)
        at = (b.to(tl.int64) * HQ + hq) * n + rows
        lse = tl.load(Lse + at, mask=live, other=0.0)
        delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
        tl.store(Delta + at, delta, mask=live)
        dq = tl.zeros([BM, BD], tl.float32)
        for n0 in range(0, tl.minimum(m0 + BM, count), BN):
            cols, places, there = _span(Index, b, n0, count, n, BN)
            k = _tokens(K, places, there, skl, D, BD, UP)
            v = _tokens(V, places, there, svl, DV, BV, UP)
            x = tl.dot(q, tl.trans(k), input_precision=PREC) * scale
            seen = (cols[None, :] <= rows[:, None]) & there[None, :]
            w = tl.where(seen, tl.exp2(x - lse[:, None]), 0.0)
            dw = tl.dot(grad, tl.trans(v), input_precision=PREC)
            dx = w * (dw - delta[:, None])
            dq += tl.dot(dx.to(k.dtype), k, input_precision=PREC)
        dims = tl.arange(0, BD)
        tl.store(
            DQ + start + slot[:, None] * sql + dims, (dq * factor).to(DQ.dtype.element_ty),
            mask=live[:, None] & (dims < D),
        )  # fmt: skip


@triton.jit(do_not_specialize=["n"])
def keys_grad_kernel(
    Q, K, V, Grad, DK, DV_, Lse, Delta, Index, Count, HQ, G, n, scale, factor,
    sqb, sqh, sql, skb, skh, skl, svb, svh, svl, sgb, sgh, sgl,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """DK and DV at the kept slots, laid out like K and V: each sums over the query heads that share a key head."""
    n0, h, b = tl.program_id(0) * BN, tl.program_id(1), tl.program_id(2)
    count = tl.load(Count + b).to(tl.int32)
    if n0 < count:
        key_start = b.to(tl.int64) * skb + h.to(tl.int64) * skh
        value_start = b.to(tl.int64) * svb + h.to(tl.int64) * svh
        cols, places, there = _span(Index, b, n0, count, n, BN)
        k = _tokens(K + key_start, places, there, skl, D, BD, UP)
        v = _tokens(V + value_start, places, there, svl, DV, BV, UP)
        dk = tl.zeros([BN, BD], tl.float32)
        dv = tl.zeros([BN, BV], tl.float32)
        for g in range(G):
            hq = h * G + g
            queries = Q + b.to(tl.int64) * sqb + hq.to(tl.int64) * sqh
            grads = Grad + b.to(tl.int64) * sgb + hq.to(tl.int64) * sgh
            for m0 in range(n0 // BM * BM, count, BM):
                rows, slot, live = _span(Index, b, m0, count, n, BM)
                q = _tokens(queries, slot, live, sql, D, BD, UP)
                grad = _tokens(grads, slot, live, sgl, DV, BV, UP)
                at = (b.to(tl.int64) * HQ + hq) * n + rows
                lse = tl.load(Lse + at, mask=live, other=float("inf"))
                delta = tl.load(Delta + at, mask=live, other=0.0)
                x = tl.dot(q, tl.trans(k), input_precision=PREC) * scale
                w = tl.where(cols[None, :] <= rows[:, None], tl.exp2(x - lse[:, None]), 0.0)
                dv += tl.dot(tl.trans(w.to(grad.dtype)), grad, input_precision=PREC)
                dw = tl.dot(grad, tl.trans(v), input_precision=PREC)
                dx = w * (dw - delta[:, None])
                dk += tl.dot(tl.trans(dx.to(q.dtype)), q, input_precision=PREC)
        dims, value_dims = tl.arange(0, BD), tl.arange(0, BV)
        tl.store(
            DK + key_start + places[:, None] * skl + dims, (dk * factor).to(DK.dtype.element_ty),
            mask=there[:, None] & (dims < D),
        )  # fmt: skip
        tl.store(
            DV_ + value_start + places[:, None] * svl + value_dims, dv.to(DV_.dtype.element_ty),
            mask=there[:, None] & (value_dims < DV),
        )  # fmt: skip


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _shape(config: Config, q: torch.Tensor, v: torch.Tensor) -> dict[str, Any]:
    dim, values = q.shape[3], v.shape[3]
    return {
        "D": dim, "BD": padded(dim), "DV": values, "BV": padded(values),
        "BM": config.rows, "BN": config.columns, "PREC": precision(q.dtype), "UP": INTERPRETED,
        **config.options,
    }  # fmt: skip


def _token_first(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Zeros of x's shape but for the last dimension, `(B, H, L, dim)`, heads side by side in memory."""
    batch, heads, length, _ = x.shape
    return x.new_zeros(batch, length, heads, dim).transpose(1, 2)


class _SparsePrefill(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, index, count, scale):  # type: ignore[no-untyped-def]
        batch, q_heads = q.shape[:2]
        n, groups = index.shape[1], q_heads // k.shape[1]
        # Gradients are laid out like these, so that kernels address both alike.
        q, k, v = rows_of(q), rows_of(k), rows_of(v)
        out = _token_first(q, v.shape[3])
        lse = torch.empty(batch, q_heads, n, dtype=torch.float32, device=q.device)
        config = table(FORWARD, k.device)[max(padded(q.shape[3]), padded(v.shape[3]))]
        launch(forward_kernel, (triton.cdiv(n, config.rows), q_heads, batch),
            q, k, v, out, lse, index, count, q_heads, groups, n, scale * LOG2E,
            *_strides(q, k, v, out), **_shape(config, q, v),
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse, index, count)
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        q, k, v, out, lse, index, count = ctx.saved_tensors
        batch, q_heads, n = lse.shape
        heads = k.shape[1]
        grad = rows_of(grad)
        delta = torch.empty_like(lse)
        # Not zeros_like: that would give an expanded tensor strides of its own.
        dq, dk, dv = (
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).zero_()
            for x in (q, k, v)
        )
        dim = max(padded(q.shape[3]), padded(v.shape[3]))
        sizes = (q_heads, q_heads // heads, n, ctx.scale * LOG2E, ctx.scale)
        config = table(QUERIES, k.device)[dim]
        launch(
            queries_grad_kernel, (triton.cdiv(n, config.rows), q_heads, batch),
            q, k, v, out, grad, dq, lse, delta, index, count, *sizes, *_strides(q, k, v, out, grad),
            **_shape(config, q, v),
        )  # fmt: skip
        config = table(KEYS, k.device)[dim]
        launch(
            keys_grad_kernel, (triton.cdiv(n, config.columns), heads, batch),
            q, k, v, grad, dk, dv, lse, delta, index, count, *sizes, *_strides(q, k, v, grad),
            **_shape(config, q, v),
        )  # fmt: skip
        return dq, dk, dv, None, None, None


def sparse_prefill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: Kept, *, scale: float | None = None
) -> torch.Tensor:
    """See the public function."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    out: torch.Tensor = _SparsePrefill.apply(q, k, v, kept.index, kept.count, scale)
    return out
