"""Probe scores in plain PyTorch, fp32 softmax. Arguments as in `probe_scores/__init__.py`."""

from __future__ import annotations

import torch

# Most attention weights held at once by one product; larger problems go one key head at a time.
CHUNK = 2**26


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
    batch, q_heads, count, dim = q_probe.shape
    heads, length = k.shape[1], k.shape[2]
    scale = dim**-0.5 if scale is None else scale
    dtype = torch.promote_types(q_probe.dtype, torch.float32)
    real = probes >= 0
    if rows is not None:
        k, candidates = k.index_select(0, rows), candidates.index_select(0, rows)

    # Zeroed, not only masked after the product: 0 * NaN would poison the gradients.
    q = q_probe.masked_fill(~real[:, None, :, None], 0).to(dtype) * scale
    k = k.masked_fill(~candidates[:, None, :, None], 0).to(dtype)
    q = q.reshape(batch, heads, -1, dim)  # (B, H, G*R, D)
    groups = q_heads // heads

    slots = torch.arange(length, device=k.device)
    visible = candidates[:, None, :] & (slots <= probes[:, :, None])  # (B, R, L)
    counted = real & visible.any(-1)
    hidden = ~visible.repeat(1, groups, 1)[:, None]  # (B, 1, G*R, L)
    weight = counted.to(dtype).repeat(1, groups)[:, None, None]  # (B, 1, 1, G*R)

    step = heads if batch * q_heads * count * length <= CHUNK else 1
    total = torch.zeros(batch, length, dtype=dtype, device=k.device)
    for h in range(0, heads, step):
        logits = q[:, h : h + step] @ k[:, h : h + step].transpose(-1, -2)
        # The least float rather than -inf: a row that sees nothing turns uniform, not NaN, and its
        # weight is 0. For every other row exp() makes hidden columns exactly 0.
        logits = logits.masked_fill_(hidden, torch.finfo(dtype).min)
        weights = logits.softmax(-1)
        total = total + (weight @ weights).sum((1, 2))
    total = total.masked_fill(~candidates, 0)
    if not normalise:
        return total
    seen = (visible & counted[:, :, None]).sum(1)  # (B, L)
    return total / seen.clamp_min(1)
