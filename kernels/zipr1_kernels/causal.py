"""torch's fused causal attention, kept off its slow path: the form that several operations fall back to."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Widths that torch's fused attention takes on a GPU are multiples of this.
STEP = 8


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    """q `(B, HQ, L, D)`, k `(B, H, L, D)`, v `(B, H, L, DV)` -> `(B, HQ, L, DV)`, differentiable."""
    if q.device.type != "cuda":
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return fused(q, k, v, scale)


def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    """The same for a GPU, whose fused kernels want equal widths that are multiples of 8 and, in float32, as many key
    heads as query heads. Otherwise torch writes all L x L weights to memory: 7 GB a row at 8,192 tokens and 28 heads.
    """
    dim, values = q.shape[3], v.shape[3]
    scale = dim**-0.5 if scale is None else scale
    width = -(-max(dim, values) // STEP) * STEP
    q, k, v = (F.pad(x, (0, width - x.shape[3])) if x.shape[3] < width else x for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    if q.dtype == torch.float32 and groups > 1:
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[..., :values]
