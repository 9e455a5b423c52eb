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
from zipr1_kernels.causal import fused

from zipr1.core.phases import phase
from zipr1.models.sparse.context import SparseContext

ATTENTION = "zipr1"

# Kinds of device whose fused attention in float32 takes as many key heads as query heads, which transformers leaves to
# torch where there is no mask: torch would write all L x L weights to memory.
EXPANDS = {"cuda": True}


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
            if _to_expand(module, query, key, attention_mask, dropout, kwargs.get("is_causal")):
                return fused(query, key, value, scaling).transpose(1, 2).contiguous(), None
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


def _to_expand(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool | None,
) -> bool:
    """Whether it is plainly causal attention in float32, with shared heads, on a device of `EXPANDS`."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = mask is None and not dropout and causal and 1 < query.shape[2] == key.shape[2]
    shared = query.dtype == torch.float32 and query.shape[1] != key.shape[1]
    return plain and shared and EXPANDS.get(query.device.type, False)


AttentionInterface.register(ATTENTION, zipr1_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
