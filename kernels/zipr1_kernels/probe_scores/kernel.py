"""Probe scores in Triton: two passes over the keys, no weight ever written to memory.

First the log of each row's normaliser (a row is one probe of one head), then each block of columns sums its weights
over all rows, in a fixed order and without atomics: the same numbers every time. Backward has the same two shapes.
Arguments as in `probe_scores/__init__.py`.
"""

from __future__ import annotations

from typing import Any

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

# By padded head dimension, the same for sm_80 and sm_90; tests/kernels/test_compile.py reads their registers.
FORWARD: Tables = {
    80: {
        16: Config(64, 64, 4, 2),
        32: Config(64, 64, 4, 2),
        64: Config(64, 64, 4, 2),
        128: Config(64, 64, 4, 2),
    },
    90: {
        16: Config(64, 64, 4, 2),
        32: Config(64, 64, 4, 2),
        64: Config(64, 64, 4, 2),
        128: Config(64, 64, 4, 2),
    },
}
BACKWARD: Tables = {
    80: {
        16: Config(32, 64, 4, 2),
        32: Config(32, 64, 4, 2),
        64: Config(32, 64, 4, 2),
        128: Config(32, 64, 4, 2),
    },
    90: {
        16: Config(32, 64, 4, 2),
        32: Config(32, 64, 4, 2),
        64: Config(32, 64, 4, 2),
        128: Config(32, 64, 4, 2),
    },
}


@triton.jit
def _rows(
    Q, Probe, Valid, b, h, m0, H, R, GR,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Queries `(BM, BD)` and the slots they reach `(BM,)`, -1 for rows that do not count."""
    rows = m0 + tl.arange(0, BM)
    dims = tl.arange(0, BD)
    probe = rows % R
    live = (rows < GR) & (tl.load(Valid + b * R + probe, mask=rows < GR, other=0) != 0)
    slot = tl.load(Probe + b * R + probe, mask=live, other=-1)
    start = ((b * H + h) * GR).to(tl.int64)
    q = tl.load(Q + (start + rows[:, None]) * D + dims, mask=live[:, None] & (dims < D), other=0.0)
    if UP:
        q = q.to(tl.float32)
    return q, slot


@triton.jit
def _keys(
    K, Cand, b, h, n0, L, skb, skh, skl,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Keys `(BN, BD)`, 0 where no candidate is, the columns `(BN,)` and whether they are candidates."""
    cols = n0 + tl.arange(0, BN)
    dims = tl.arange(0, BD)
    cand = tl.load(Cand + b * L + cols, mask=cols < L, other=0) != 0
    base = K + b.to(tl.int64) * skb + h * skh
    k = tl.load(
        base + cols[:, None].to(tl.int64) * skl + dims, mask=cand[:, None] & (dims < D), other=0.0
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


@triton.jit
def lse_kernel(
    Q, K, Probe, Valid, Cand, Lse, H, R, GR, L, scale, skb, skh, skl,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Base-2 logarithm of each row's sum of exponentials; inf for a row that sees nothing: its weights are then 0."""
    m0, h, b = tl.program_id(0) * BM, tl.program_id(1), tl.program_id(2)
    q, slot = _rows(Q, Probe, Valid, b, h, m0, H, R, GR, D, BD, BM, UP)
    most = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for n0 in range(0, tl.max(slot, 0) + 1, BN):
        k, cols, cand = _keys(K, Cand, b, h, n0, L, skb, skh, skl, D, BD, BN, UP)
        x = tl.dot(q, tl.trans(k), input_precision=PREC) * scale
        x = tl.where(cand[None, :] & (cols[None, :] <= slot[:, None]), x, -float("inf"))
        new = tl.maximum(most, tl.max(x, 1))
        safe = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp2(most - safe) + tl.sum(tl.exp2(x - safe[:, None]), 1)
        most = new
    rows = m0 + tl.arange(0, BM)
    lse = tl.where(total > 0, most + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))
    tl.store(Lse + (b * H + h) * GR + rows, lse, mask=rows < GR)


@triton.jit
def columns_kernel(
    Q, K, Probe, Valid, Cand, Lse, Out, Count, H, R, GR, L, scale, skb, skh, skl,
    NORM: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Out `(B, L)`: the weights summed over heads and probes; Count `(B, L)`: how many probes see a column."""
    n0, b = tl.program_id(0) * BN, tl.program_id(1)
    total = tl.zeros([BN], tl.float32)
    cols = n0 + tl.arange(0, BN)
    cand = tl.load(Cand + b * L + cols, mask=cols < L, other=0) != 0
    for h in range(H):
        k, _, _ = _keys(K, Cand, b, h, n0, L, skb, skh, skl, D, BD, BN, UP)
        for m0 in range(0, GR, BM):
            q, slot = _rows(Q, Probe, Valid, b, h, m0, H, R, GR, D, BD, BM, UP)
            rows = m0 + tl.arange(0, BM)
            lse = tl.load(Lse + (b * H + h) * GR + rows, mask=rows < GR, other=float("inf"))
            total += tl.sum(_weights(q, k, cols, cand, slot, lse, scale, PREC), 0)
    if NORM:
        count = tl.zeros([BN], tl.float32)
        for r0 in range(0, R, BM):
            probe = r0 + tl.arange(0, BM)
            live = (probe < R) & (tl.load(Valid + b * R + probe, mask=probe < R, other=0) != 0)
            slot = tl.load(Probe + b * R + probe, mask=live, other=-1)
            count += tl.sum((cols[None, :] <= slot[:, None]).to(tl.float32), 0)
        count = tl.maximum(count, 1.0)
        total = total / count
        tl.store(Count + b * L + cols, count, mask=cols < L)
    tl.store(Out + b * L + cols, tl.where(cand, total, 0.0), mask=cols < L)


@triton.jit
def queries_grad_kernel(
    Q, K, Probe, Valid, Cand, Lse, Grad, Delta, DQ, H, R, GR, L, scale, factor, skb, skh, skl,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """DQ, and Delta: each row's weighted mean of the columns' gradients. scale is in base 2, factor as it is given."""
    m0, h, b = tl.program_id(0) * BM, tl.program_id(1), tl.program_id(2)
    q, slot = _rows(Q, Probe, Valid, b, h, m0, H, R, GR, D, BD, BM, UP)
    rows = m0 + tl.arange(0, BM)
    at = (b * H + h) * GR + rows
    lse = tl.load(Lse + at, mask=rows < GR, other=float("inf"))
    end = tl.max(slot, 0) + 1
    delta = tl.zeros([BM], tl.float32)
    for n0 in range(0, end, BN):
        k, cols, cand = _keys(K, Cand, b, h, n0, L, skb, skh, skl, D, BD, BN, UP)
        grad = tl.load(Grad + b * L + cols, mask=cols < L, other=0.0)
        w = _weights(q, k, cols, cand, slot, lse, scale, PREC)
        delta += tl.sum(w * grad[None, :], 1)
    tl.store(Delta + at, delta, mask=rows < GR)
    dq = tl.zeros([BM, BD], tl.float32)
    for n0 in range(0, end, BN):
        k, cols, cand = _keys(K, Cand, b, h, n0, L, skb, skh, skl, D, BD, BN, UP)
        grad = tl.load(Grad + b * L + cols, mask=cols < L, other=0.0)
        dx = _weights(q, k, cols, cand, slot, lse, scale, PREC) * (grad[None, :] - delta[:, None])
        dq += tl.dot(dx.to(k.dtype), k, input_precision=PREC)
    dims = tl.arange(0, BD)
    there = (rows < GR)[:, None] & (dims < D)
    tl.store(DQ + at[:, None].to(tl.int64) * D + dims, (dq * factor).to(DQ.dtype.element_ty), mask=there)  # fmt: skip


@triton.jit
def keys_grad_kernel(
    Q, K, Probe, Valid, Cand, Lse, Grad, Delta, DK, H, R, GR, L, factor, scale, skb, skh, skl,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """DK `(B, H, L, D)`, contiguous; 0 where no candidate is."""
    n0, h, b = tl.program_id(0) * BN, tl.program_id(1), tl.program_id(2)
    k, cols, cand = _keys(K, Cand, b, h, n0, L, skb, skh, skl, D, BD, BN, UP)
    grad = tl.load(Grad + b * L + cols, mask=cols < L, other=0.0)
    dk = tl.zeros([BN, BD], tl.float32)
    for m0 in range(0, GR, BM):
        q, slot = _rows(Q, Probe, Valid, b, h, m0, H, R, GR, D, BD, BM, UP)
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


class _ProbeScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, probes, valid, candidates, scale, normalise):  # type: ignore[no-untyped-def]
        batch, q_heads, count, dim = q.shape
        heads, length = k.shape[1], k.shape[2]
        q, k = q.contiguous(), rows_of(k)
        probes = probes.to(torch.int32).contiguous()
        valid, candidates = (x.contiguous().view(torch.uint8) for x in (valid, candidates))
        rows = q_heads // heads * count
        lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=k.device)
        out = torch.empty(batch, length, dtype=torch.float32, device=k.device)
        seen = torch.empty_like(out)
        config = table(FORWARD, k.device)[padded(dim)]
        sizes = (heads, count, rows, length, scale * LOG2E, *k.stride()[:3])
        shape = _shape(config, k)
        inputs = (q, k, probes, valid, candidates, lse)
        launch(lse_kernel, (triton.cdiv(rows, config.rows), heads, batch), *inputs, *sizes, **shape)
        launch(
            columns_kernel,
            (triton.cdiv(length, config.columns), batch),
            *inputs,
            out,
            seen,
            *sizes,
            NORM=normalise,
            **shape,
        )
        ctx.save_for_backward(*inputs, seen)
        ctx.scale, ctx.normalise = scale, normalise
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        q, k, probes, valid, candidates, lse, seen = ctx.saved_tensors
        batch, heads, rows = lse.shape
        length, dim, count = k.shape[2], k.shape[3], probes.shape[1]
        grad = grad.float().contiguous()
        if ctx.normalise:
            grad = grad / seen
        delta, dq = torch.empty_like(lse), torch.empty_like(q)
        dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        config = table(BACKWARD, k.device)[padded(dim)]
        shape = _shape(config, k)
        inputs = (q, k, probes, valid, candidates, lse, grad, delta)
        sizes = (heads, count, rows, length)
        scales = {"scale": ctx.scale * LOG2E, "factor": ctx.scale}
        strides = dict(zip(("skb", "skh", "skl"), k.stride()[:3], strict=True))
        launch(
            queries_grad_kernel,
            (triton.cdiv(rows, config.rows), heads, batch),
            *inputs,
            dq,
            *sizes,
            **scales,
            **strides,
            **shape,
        )
        launch(
            keys_grad_kernel,
            (triton.cdiv(length, config.columns), heads, batch),
            *inputs,
            dk,
            *sizes,
            **scales,
            **strides,
            **shape,
        )
        return dq, dk, None, None, None, None, None


def probe_scores(
    q_probe: torch.Tensor,
    k: torch.Tensor,
    probes: torch.Tensor,
    probe_valid: torch.Tensor,
    candidates: torch.Tensor,
    *,
    scale: float | None = None,
    normalise: bool = True,
) -> torch.Tensor:
    """See the public function."""
    scale = q_probe.shape[3] ** -0.5 if scale is None else scale
    out: torch.Tensor = _ProbeScores.apply(
        q_probe, k, probes, probe_valid, candidates, scale, normalise
    )
    return out
