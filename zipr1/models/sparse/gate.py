"""Attention whose kept tokens carry their chance of being kept as a factor of value 1 (the method `through`).

The value of the attention does not change; its gradient reaches the scores (thresholds.py says what that estimates).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from zipr1_kernels import Kept, packed_attention, sparse_prefill

from zipr1.models.sparse.thresholds import chance

# Widths of heads for which torch has fused attention, on GPUs: multiples of this.
ALIGNMENT = 8


def straight_through(cut: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """0 with the gradient of each token's chance of being kept for p ~ U(low, high), of the shape of `cut`."""
    kept = chance(cut, low, high)
    return kept - kept.detach()


def gated_prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: Kept,
    gate: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """`sparse_prefill` whose kept tokens weigh exp(gate) as keys and 1 + gate as outputs; gate `(B, L)` is 0.

    query `(B, HQ, L, D)`, key `(B, H, L, D)`, value `(B, H, L, DV)` -> `(B, HQ, L, DV)`.
    """
    return _gated(sparse_prefill, query, key, value, kept, gate[:, None, :, None], scale)


def gated_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: Kept,
    gate: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The same by `packed_attention`, of the kept tokens alone: query `(n, HQ, D)`, key `(n, H, D)`, value `(n, H, DV)`
    and gate `(n,)` -> `(n, HQ, DV)`."""
    return _gated(packed_attention, query, key, value, kept, gate[:, None, None], scale)


def _gated(
    attend: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: Kept,
    gate: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """`attend` with the gate, of the dimensions of its output, as weight of keys and outputs.

    One more head dimension adds the bias of each key to the logits, so that the attention itself need not know of it;
    zeros fill all three up to one width that is a multiple of 8, for torch has no fused attention for others and its
    plain one holds L x L weights.
    """
    bias = (gate / scale).to(key.dtype).expand(*key.shape[:-1], 1)
    widest = max(query.shape[-1] + 1, value.shape[-1])
    width = -(-widest // ALIGNMENT) * ALIGNMENT
    query = _filled(torch.cat([query, torch.ones_like(query[..., :1])], -1), width)
    key = _filled(torch.cat([key, bias], -1), width)
    out = attend(query, key, _filled(value, width), kept, scale=scale)
    return out[..., : value.shape[-1]] * (1 + gate).to(out.dtype)


def _filled(x: torch.Tensor, width: int) -> torch.Tensor:
    return F.pad(x, (0, width - x.shape[-1]))
