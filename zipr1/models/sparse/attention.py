"""The attention that transformers calls: dense as transformers' own, or whatever the pass's `SparseContext` does.

It is registered with transformers' `AttentionInterface` under the name `ATTENTION`; nothing of transformers is forked.
The context of a pass comes as the keyword `sparse_context`, which the patched decoder adds and decoder layers hand on
(patch.py). Without one, attention and its mask are transformers' SDPA path unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from zipr1.core.phases import phase
from zipr1.models.sparse.context import SparseContext

ATTENTION = "zipr1"


def zipr1_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sparse_context: SparseContext | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention signature; query `(B, HQ, Lq, D)`, key and value `(B, H, Lk, D)` -> `(B, Lq, HQ, D)`."""
    if sparse_context is None:
        with phase("attention"):
            return sdpa_attention_forward(
                module,
                query,
                key,
                value,
                attention_mask,
                dropout=dropout,
                scaling=scaling,
                **kwargs,
            )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer = int(module.layer_idx) if hasattr(module, "layer_idx") else 0  # type: ignore[arg-type]
    return sparse_context.attend(layer, query, key, value, scale), None


AttentionInterface.register(ATTENTION, zipr1_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
