"""Norm and rotary positions in Triton, by one launch. Arguments as in reference.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from zipr1_kernels.launch import Config, launch, padded, rows_of
from zipr1_kernels.norm_rope import reference

FORWARD = Config(1, 32, 4, 1)


@triton.jit(do_not_specialize=["n"])
def norm_rope_kernel(
    X, Cos, Sin, Weight, Out, H, n, sxb, sxl, sxh, scb, scl, ssb, ssl, eps,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Out `(B, n, H, D)`, contiguous. Each head is read twice, the second time with its halves swapped."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)[:, None]
    dims = tl.arange(0, BD)[None, :]
    across = tl.where(dims < D // 2, dims + D // 2, dims - D // 2)
    live = (place < n) & (dims < D)
    head = X + b * sxb + place * sxl + h * sxh
    x = tl.load(head + dims, mask=live, other=0).to(tl.float32)
    swapped = tl.load(head + across, mask=live, other=0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x *= scale * tl.load(Weight + dims, mask=dims < D, other=0).to(tl.float32)
        swapped *= scale * tl.load(Weight + across, mask=dims < D, other=0).to(tl.float32)
    cos = tl.load(Cos + b * scb + place * scl + dims, mask=live, other=0).to(tl.float32)
    sin = tl.load(Sin + b * ssb + place * ssl + dims, mask=live, other=0).to(tl.float32)
    out = x * cos + swapped * sin
    tl.store(Out + ((b * n + place) * H + h) * D + dims, out.to(Out.dtype.element_ty), mask=live)


def norm_rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    signed_sin: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """x `(B, L, H, D)`; cos, signed_sin `(B, L, D)`; weight `(D,)` or None. Gradients are those of plain torch."""
    out: torch.Tensor = _NormRope.apply(x, cos, signed_sin, weight, eps)
    return out


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        cos: torch.Tensor,
        signed_sin: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, cos, signed_sin, weight)
        ctx.eps = eps
        batch, length, heads, dim = x.shape
        x = rows_of(x)
        cos, signed_sin = (y if y.stride(-1) == 1 else y.contiguous() for y in (cos, signed_sin))
        out = x.new_empty(batch, length, heads, dim)
        launch(norm_rope_kernel, (triton.cdiv(length, FORWARD.columns), heads, batch),
            x, cos, signed_sin, x if weight is None else weight.contiguous(), out, heads, length, *x.stride()[:3],
            *cos.stride()[:2], *signed_sin.stride()[:2], eps,
            D=dim, BD=padded(dim), BN=FORWARD.columns, NORM=weight is not None, **FORWARD.options,
        )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:4]
        inputs: list[Any] = [
            None if x is None else x.detach().requires_grad_(want)
            for x, want in zip(ctx.saved_tensors, wanted, strict=True)
        ]
        x, cos, signed_sin, weight = inputs
        with torch.enable_grad():
            out = reference.norm_rope(x, cos, signed_sin, weight, ctx.eps)
        leaves = [one for one, want in zip(inputs, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(out, leaves, grad))
        return (*(next(found) if want else None for want in wanted), None)
