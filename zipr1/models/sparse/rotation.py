"""Cosines and sines of a pass's tokens, for layers that are run on some of them (layer_skip.py).

They are the same in every layer, so what can be taken out of them is taken out once: a GPU is given few launches.
"""

from __future__ import annotations

import torch

# cos and sin, `(B or 1, L, D)` each, as transformers hands them to a decoder layer.
Place = tuple[torch.Tensor, torch.Tensor]


class Rotation:
    """Of a batch of `rows`, whose probes in each layer are at the slots `probes` `(layers, n)` of the flattened batch;
    None: there are none."""

    def __init__(self, place: Place, rows: int, probes: torch.Tensor | None) -> None:
        self.place = place
        # Side by side, so that one launch takes both.
        self._table = torch.cat(place, -1).expand(rows, -1, -1).flatten(0, 1)
        self._probes = None
        if probes is not None:
            self._probes = self._table.index_select(0, probes.flatten()).view(*probes.shape, -1)

    def at(self, slots: torch.Tensor) -> Place:
        """At slots `(n,)` of the flattened batch: `(1, n, D)` each."""
        return _parted(self._table.index_select(0, slots))

    def of_probes(self, layer: int) -> Place:
        """At the layer's probes: `(1, n, D)` each."""
        assert self._probes is not None
        return _parted(self._probes[layer])


def _parted(both: torch.Tensor) -> Place:
    cos, sin = both[None].chunk(2, -1)
    return cos, sin
