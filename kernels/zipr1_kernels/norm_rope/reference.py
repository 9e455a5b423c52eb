"""Rotary positions in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def norm_rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    signed_sin: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """x `(B, L, H, D)`; cos, signed_sin `(B, L, D)`; weight `(D,)` or None."""
    if weight is not None:
        x = F.rms_norm(x, weight.shape, weight, eps)
    swapped = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos[:, :, None], swapped, signed_sin[:, :, None])
