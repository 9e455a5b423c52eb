"""Whole-layer skipping: transformers' own decoder layer, run on its kept tokens alone.

Scoring needs the keys of all tokens and the queries of the probes; with the tokens chosen, the stock layer is handed
only them, packed over the batch to `(1, n, hidden)`, so norms, Q, V, O and the MLP of the others are truly not done.
The others pass through unchanged. The keys of the kept are computed a second time, by the stock layer: 1 % of it.

Written for layers of the Llama kind: `input_layernorm`, then `self_attn` with separate q_proj and k_proj, optional
q_norm and k_norm over a head's dimension, and `apply_rotary_pos_emb` in the attention's own module.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from zipr1.core.errors import InputError
from zipr1.models.sparse.context import SparseContext
from zipr1.models.sparse.rotation import Rotation
from zipr1.models.sparse.selection import Heads


def projections(layer: Any, hidden: torch.Tensor, rotation: Rotation) -> Heads:
    """Queries and keys of a decoder layer for its input `(B, L, hidden)`."""
    attention = layer.self_attn
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if rotate is None or not hasattr(layer, "input_layernorm") or not hasattr(attention, "k_proj"):
        raise InputError(
            f"skip: layer does not know {type(layer).__name__}; use sparse.skip: attention"
        )
    number = int(attention.layer_idx)

    @functools.cache
    def normed() -> torch.Tensor:
        out: torch.Tensor = layer.input_layernorm(hidden)
        return out

    def heads(x: torch.Tensor, kind: str) -> torch.Tensor:
        x = getattr(attention, f"{kind}_proj")(x)
        return x.unflatten(-1, (-1, attention.head_dim))

    def queries(slots: torch.Tensor) -> torch.Tensor:
        q = heads(normed().flatten(0, 1).index_select(0, slots)[None], "q")
        return rotation.probes(q, number, getattr(attention, "q_norm", None), rotate)[0]

    def keys() -> torch.Tensor:
        k = heads(normed(), "k")
        return rotation.keys(k, getattr(attention, "k_norm", None), rotate).transpose(1, 2)

    return Heads(queries, keys, attention.scaling)


def skipping(layer: Any, stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The layer's forward: `stock` on all tokens, or on the kept ones where its context packs them."""

    def forward(
        hidden_states: torch.Tensor,
        *args: Any,
        sparse_context: SparseContext | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if sparse_context is None:
            return stock(hidden_states, *args, **kwargs)
        packed = sparse_context.pack(
            int(layer.self_attn.layer_idx),
            len(hidden_states),
            kwargs["position_embeddings"],
            lambda rotation: projections(layer, hidden_states, rotation),
        )
        if packed is None:
            return stock(hidden_states, *args, sparse_context=sparse_context, **kwargs)
        rows = packed.rows
        kwargs |= {
            "position_embeddings": packed.place,
            "past_key_values": None,  # the context puts the kept keys and values into its cache
            "position_ids": None,
            "sparse_context": packed,
        }
        return rows.unpack(stock(rows.pack(hidden_states), *args, **kwargs), hidden_states)

    return forward
