"""Whole-layer skipping: transformers' own decoder layer, run on its kept tokens alone.

Scoring needs the keys of all tokens and the queries of the probes; with the tokens chosen, the stock layer is handed
only them, flattened over the batch to `(1, n, hidden)`, so norms, Q, V, O and the MLP of the others are truly not done.
The others pass through unchanged. The keys of the kept are computed a second time, by the stock layer: 1 % of it.

Written for layers of the Llama kind: `input_layernorm`, then `self_attn` with separate q_proj and k_proj, optional
q_norm and k_norm over a head's dimension, and `apply_rotary_pos_emb` in the attention's own module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from zipr1_kernels import Kept, pack_indices

from zipr1.core.errors import InputError
from zipr1.core.phases import phase

if TYPE_CHECKING:
    from zipr1.models.sparse.attention import Pass


@dataclass(frozen=True)
class Heads:
    """What choosing asks of a layer, computed when it is asked for.

    queries: slots `(B, R)` -> `(B, HQ, R, D)`. keys: -> `(B, H, L, D)`. of: rows `(b,)` -> the same of these rows
    alone. scale: of the logits.
    """

    queries: Callable[[torch.Tensor], torch.Tensor]
    keys: Callable[[], torch.Tensor]
    of: Callable[[torch.Tensor], Heads]
    scale: float

    @classmethod
    def given(cls, query: torch.Tensor, key: torch.Tensor, scale: float) -> Heads:
        """Of queries and keys that are there already, `(B, HQ, L, D)` and `(B, H, L, D)`."""

        def queries(slots: torch.Tensor) -> torch.Tensor:
            index = slots[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
            return query.gather(2, index)

        def of(rows: torch.Tensor) -> Heads:
            return cls.given(query[rows], key[rows], scale)

        return cls(queries, lambda: key, of, scale)


@dataclass(frozen=True)
class Rows:
    """The kept tokens as rows of a flattened batch, `sum of counts` in all."""

    kept: Kept

    def flatten(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, L, ...)` -> `(1, n, ...)`, the kept ones."""
        with phase("gathers"):
            return x.flatten(0, 1).index_select(0, self.kept.flat)[None]

    def spread(self, rows: torch.Tensor, over: torch.Tensor) -> torch.Tensor:
        """`over` `(B, L, hidden)` with `rows` `(1, n, hidden)` in their places."""
        with phase("gathers"):
            return over.flatten(0, 1).index_copy(0, self.kept.flat, rows[0]).view_as(over)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """Heads of the rows `(1, H, n, D)` -> `(B, H, longest, D)`; padding repeats a sample's last token."""
        if not self.kept.ragged:
            return x[0].unflatten(1, (len(self.kept.count), -1)).transpose(0, 1)
        with phase("gathers"):
            start = self.kept.count.cumsum(0) - self.kept.count
            places = start[:, None] + self.kept.packed.index
            rows = x[0].transpose(0, 1).index_select(0, places.flatten())
            return rows.unflatten(0, places.shape).transpose(1, 2)

    def strip(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, H, longest, D)` -> `(1, n, H, D)`, without the padding."""
        x = x.transpose(1, 2)
        with phase("gathers"):
            x = x.flatten(0, 1)
            return (x.index_select(0, self.kept.packed.flat) if self.kept.ragged else x)[None]


def projections(layer: Any, hidden: torch.Tensor, place: tuple[torch.Tensor, ...]) -> Heads:
    """Queries and keys of a decoder layer for its input `(B, L, hidden)`; place: cos and sin, `(B or 1, L, D)`."""
    attention = layer.self_attn
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if rotate is None or not hasattr(layer, "input_layernorm") or not hasattr(attention, "k_proj"):
        raise InputError(
            f"skip: layer does not know {type(layer).__name__}; use sparse.skip: attention"
        )
    normed = layer.input_layernorm(hidden)
    batch = torch.arange(len(hidden), device=hidden.device)[:, None]

    def heads(x: torch.Tensor, kind: str) -> torch.Tensor:
        x = getattr(attention, f"{kind}_proj")(x)
        x = x.unflatten(-1, (-1, attention.head_dim))
        norm = getattr(attention, f"{kind}_norm", None)
        return (x if norm is None else norm(x)).transpose(1, 2)

    def queries(slots: torch.Tensor) -> torch.Tensor:
        q = heads(normed[batch, slots], "q")
        cos, sin = (x.expand(len(hidden), -1, -1)[batch, slots] for x in place)
        rotated: torch.Tensor = rotate(q, q[:, :0], cos, sin)[0]
        return rotated

    def keys() -> torch.Tensor:
        k = heads(normed, "k")
        rotated: torch.Tensor = rotate(k[:, :0], k, *place)[1]
        return rotated

    def of(rows: torch.Tensor) -> Heads:
        cos, sin = (x.expand(len(hidden), -1, -1)[rows] for x in place)
        return projections(layer, hidden[rows], (cos, sin))

    return Heads(queries, keys, of, attention.scaling)


def skipping(layer: Any, stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The layer's forward: `stock` on all tokens, or within a sparse prefill (`zip_pass`) on the kept ones."""

    def forward(
        hidden_states: torch.Tensor, *args: Any, zip_pass: Pass | None = None, **kwargs: Any
    ) -> torch.Tensor:
        if zip_pass is None:
            return stock(hidden_states, *args, **kwargs)
        place = kwargs["position_embeddings"]
        with torch.set_grad_enabled(zip_pass.request.scores and torch.is_grad_enabled()):
            keep = zip_pass.choose(
                int(layer.self_attn.layer_idx), projections(layer, hidden_states, place)
            )
        with phase("selection"):
            rows = Rows(pack_indices(keep))
        kwargs |= {
            "position_embeddings": tuple(
                rows.flatten(x.expand(len(hidden_states), -1, -1)) for x in place
            ),
            "past_key_values": None,  # the attention puts the kept keys and values into zip_cache
            "position_ids": None,
            "zip_pass": zip_pass,
            "zip_rows": rows,
        }
        return rows.spread(stock(rows.flatten(hidden_states), *args, **kwargs), hidden_states)

    return forward
