"""Rotary positions of a pass's tokens, for layers that are run on some of them (layer_skip.py).

Cosines and sines are the same in every layer, so what can be taken out of them is taken out once, and what is scored
is normed and turned by one kernel: a GPU is given few launches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from zipr1_kernels import dispatch, norm_rope

from zipr1.models.sparse.norms import weight_of

# A layer's norm of heads, if it has one.
Norm = Callable[[torch.Tensor], torch.Tensor] | None
# cos and sin, `(B or 1, L, D)` each, as transformers hands them to a decoder layer.
Place = tuple[torch.Tensor, torch.Tensor]


class Rotation:
    """Of a batch of `rows`, whose probes in each layer are at the slots `probes` `(layers, n)` of the flattened batch;
    None: there are none."""

    def __init__(self, place: Place, rows: int, probes: torch.Tensor | None) -> None:
        self.place = place
        cos, sin = place
        low, high = sin.chunk(2, -1)
        # Side by side, so that one launch takes them; the last with the signs of the halves that change places.
        table = torch.cat([cos, sin, -low, high], -1).expand(rows, -1, -1)
        flat = table.flatten(0, 1)
        self._keys, self._table = table, flat[:, : 2 * cos.shape[-1]]
        self._probes = None
        if probes is not None:
            self._probes = flat.index_select(0, probes.flatten()).view(*probes.shape, -1)

    def at(self, slots: torch.Tensor) -> Place:
        """At slots `(n,)` of the flattened batch: `(1, n, D)` each."""
        cos, sin = self._table.index_select(0, slots)[None].chunk(2, -1)
        return cos, sin

    def keys(self, x: torch.Tensor, norm: Norm, rotate: Callable[..., Any]) -> torch.Tensor:
        """All keys `(B, L, H, D)`, normed and turned. rotate: the model's own `apply_rotary_pos_emb`."""
        return _turned(x, self._keys, norm, rotate)

    def probes(
        self, x: torch.Tensor, layer: int, norm: Norm, rotate: Callable[..., Any]
    ) -> torch.Tensor:
        """Queries `(1, n, HQ, D)` of the layer's probes, normed and turned."""
        assert self._probes is not None
        return _turned(x, self._probes[layer][None], norm, rotate)


def _turned(
    x: torch.Tensor, table: torch.Tensor, norm: Norm, rotate: Callable[..., Any]
) -> torch.Tensor:
    """Heads `(B, n, H, D)` by a table `(B, n, 3 D)`."""
    cos, sin, signed = table.chunk(3, -1)
    halves = cos.shape[-1] == x.shape[-1] and _by_halves(rotate)
    if halves and cos.dtype == x.dtype and (x.device.type != "cpu" or dispatch.forced("triton")):
        known = None if norm is None else weight_of(norm, x.dtype)
        if norm is not None and known is None:
            x = norm(x)
        return norm_rope(x, cos, signed, *(known or ()))
    x = x if norm is None else norm(x)
    if halves:  # to the bit what the model has
        swapped = x.roll(x.shape[-1] // 2, -1)
        return x * cos[:, :, None] + swapped * signed[:, :, None]
    x = x.transpose(1, 2)
    turned: torch.Tensor = rotate(x, x[:, :0], cos, sin)[0]
    return turned.transpose(1, 2)


@functools.cache
def _by_halves(rotate: Callable[..., Any]) -> bool:
    """Whether a model's function turns the first half of a head against the second, as that of the Llama kind does:
    tried on numbers, for each family has a copy of its own."""
    x, cos, sin = torch.arange(3 * 2 * 8, dtype=torch.float32, device="cpu").view(3, 1, 2, 8)
    rolled = torch.cat([-x[..., 4:], x[..., :4]], -1)
    heads = x[:, None]
    try:
        found = rotate(heads, heads[:, :0], cos, sin)[0][:, 0]
    except (TypeError, RuntimeError, IndexError):  # it wants other shapes
        return False
    return torch.equal(found, x * cos + rolled * sin)
