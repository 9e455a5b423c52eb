"""The KV cache whose prompt part was pruned: a different number of tokens in every layer and sample.

It tells transformers the *logical* length (positions, masks and stopping count every prompt token) and holds
only the kept tokens. Kept tokens of a batch are right-padded to the longest sample, so memory is that of the
longest; `valid` says which slots are real.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from zipr1_kernels import Kept

from zipr1.models.sparse.hybrid import Choosing


class PrunedLayer(DynamicLayer):
    """keys, values `(B, H, n, D)`; valid `(B, n)` bool or None: all are; cumulative_length: tokens seen, kept or not.

    New tokens are written behind the old ones, into `capacity`: keys and values with slots kept free, a ninth of what
    is held (at least 16 tokens). So a decoding step copies nothing but now and then.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.cumulative_length = 0
        self._valid: torch.Tensor | Kept | None = None
        self.incoming: torch.Tensor | None = None
        self.pruned = False
        self.prompt_counts: torch.Tensor | None = None
        self.capacity: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def valid(self) -> torch.Tensor | None:
        """`(B, n)` bool, or None: all are. Made of what was kept when somebody asks; a cache with room never does."""
        if isinstance(self._valid, Kept):
            self._valid = self._valid.real
        return self._valid

    @valid.setter
    def valid(self, valid: torch.Tensor | None) -> None:
        self._valid = valid

    # `(B,)` int64 on the device, of a layer whose slots are counted there: how many of each row are filled.
    filled: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Append `(B, H, q, D)`; slots are valid unless `incoming` `(B, q)` says that they are padding."""
        batch, _, new, _ = key_states.shape
        held = self.keys.shape[2] if self.is_initialized and self.keys.ndim == 4 else 0
        if held and not key_states.requires_grad:
            self._write(held, key_states, value_states)
        elif not held:  # of a prompt that is pruned next: not copied
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
        else:
            super().update(key_states, value_states, *args, **kwargs)
        fresh, self.incoming = self.incoming, None
        if fresh is not None and fresh.shape != (batch, new):
            fresh = None
        if self.valid is not None or fresh is not None:
            device = self.keys.device
            old = self.valid
            if old is None:
                old = torch.ones(batch, held, dtype=torch.bool, device=device)
            if fresh is None:
                fresh = torch.ones(batch, new, dtype=torch.bool, device=device)
            self.valid = torch.cat([old, fresh], dim=1)
        self.cumulative_length += new
        return self.keys, self.values

    def _write(self, held: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        end = held + keys.shape[2]
        if self.capacity is None or self.capacity[0].shape[2] < end:
            spare = max(16, end // 8)
            shapes = [(*x.shape[:2], end + spare, x.shape[3]) for x in (self.keys, self.values)]
            self.capacity = self.keys.new_empty(shapes[0]), self.values.new_empty(shapes[1])
            self.capacity[0][:, :, :held], self.capacity[1][:, :, :held] = self.keys, self.values
        self.capacity[0][:, :, held:end], self.capacity[1][:, :, held:end] = keys, values
        self.keys, self.values = (x[:, :, :end] for x in self.capacity)

    def prune(self, keys: torch.Tensor, values: torch.Tensor, kept: Kept) -> None:
        """Put the compacted prompt, `(B, H, n, D)`, in place of the whole one."""
        self.keys, self.values, self.capacity = keys, values, None
        self._valid = kept if kept.ragged else None
        self.prompt_counts = kept.count
        self.cumulative_length = kept.length
        self.pruned = True

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens; the pruned prompt itself cannot be cropped."""
        if tokens_to_remove > 0:
            raise ValueError("crop() takes a negative number of tokens to remove")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        keep = self.keys.shape[2] + tokens_to_remove
        if self.prompt_counts is not None and keep < int(self.prompt_counts.max()):
            raise RuntimeError(
                "crop() reached the pruned prompt; assisted decoding does not work with a pruned cache"
            )
        self.keys, self.values = self.keys[:, :, :keep], self.values[:, :, :keep]
        self.valid = None if self.valid is None else self.valid[:, :keep]
        self.cumulative_length += tokens_to_remove

    def _each(self, change: Any) -> None:
        if not self.is_initialized:
            return
        self.keys, self.values, self.capacity = change(self.keys), change(self.values), None
        if self.valid is not None:
            self.valid = change(self.valid)
        if self.prompt_counts is not None:
            self.prompt_counts = change(self.prompt_counts)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._each(lambda x: x[indices])

    def reset(self) -> None:
        super().reset()
        self.cumulative_length = 0
        self.valid = self.prompt_counts = self.capacity = None
        self.pruned = False


class FixedLayer(PrunedLayer):
    """A pruned layer with room for all tokens to come: keys and values `(B, H, capacity, D)` stay where they are, and
    each row's next token goes behind its last one, at a place that the device knows.

    filled: `(B,)` int64, slots of each row that count, the next token's among them; behind them is nothing that counts.
    """

    filled: torch.Tensor

    def __init__(
        self, layer: PrunedLayer, new: int, filled: torch.Tensor, place: torch.Tensor
    ) -> None:
        super().__init__()
        batch, heads, held, _ = layer.keys.shape
        shapes = [(batch, heads, held + new, x.shape[3]) for x in (layer.keys, layer.values)]
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys.new_zeros(shapes[0]), layer.values.new_zeros(shapes[1])
        self.keys[:, :, :held], self.values[:, :, :held] = layer.keys, layer.values
        self.filled, self.place = filled, place
        self.rows = torch.arange(batch, device=place.device)
        self.prompt_counts, self.pruned = layer.prompt_counts, True
        self.cumulative_length = layer.cumulative_length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Write `(B, H, 1, D)` to each row's place; all slots are returned."""
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            held.transpose(1, 2)[self.rows, self.place] = new[:, :, 0]
        self.cumulative_length += 1
        return self.keys, self.values


class PrunedCache(Cache):
    """One `PrunedLayer` for each decoder layer that chooses, made as layers are met; or `FixedLayer`s, after `reserve`.
    layers: of a decoder that has others besides, whose states lie between them."""

    def __init__(self, layers: Choosing | None = None) -> None:
        if layers is None or layers.config is None:
            super().__init__(layer_class_to_replicate=PrunedLayer)
        else:
            super().__init__(layers=layers.cache_layers(PrunedLayer))
        # `(2, D, B)` int64 of fixed layers: each row's next place, and how many slots are filled with it.
        self._places: torch.Tensor | None = None

    @classmethod
    def whole(cls, cache: Any) -> PrunedCache:
        """One that holds all that a transformers cache of a prompt holds: dense, with capacity to write into."""
        out = cls()
        for i, layer in enumerate(cache.layers):
            batch, _, length, _ = layer.keys.shape
            index = torch.arange(length, device=layer.keys.device).expand(batch, -1)
            count = torch.full((batch,), length, device=index.device)
            out.put(i, layer.keys, layer.values, Kept(index, count, length, length, batch * length))
        return out

    @staticmethod
    def replaces(cache: Any) -> bool:
        """Whether `cache` is an empty default cache that a sparse prefill may swap for a pruned one."""
        return isinstance(cache, DynamicCache) and cache.get_seq_length() == 0

    def put(self, layer: int, keys: torch.Tensor, values: torch.Tensor, kept: Kept) -> None:
        """The pruned prompt of a layer: compacted keys and values `(B, H, n, D)` of the `kept` tokens."""
        while len(self.layers) <= layer:
            self.layers.append(PrunedLayer())
        if not self.layers[layer].is_initialized:
            self.layers[layer].lazy_initialization(keys, values)
        self.layers[layer].prune(keys, values, kept)

    @property
    def pruned(self) -> list[PrunedLayer]:
        """The layers that hold keys and values."""
        return [layer for layer in self.layers if isinstance(layer, PrunedLayer)]

    def reserve(self, new: int) -> None:
        """Make room for `new` tokens of each row, which then come one by one, none of them padding. From then on a step
        has the same tensors at the same places as the one before, and can be captured as a CUDA graph."""
        counts = self.prompt_counts().T.contiguous()
        self._places = torch.stack([counts - 1, counts])
        waiting = iter(range(len(counts)))
        for number, layer in enumerate(self.layers):
            if isinstance(layer, PrunedLayer):
                place, filled = self._places[:, next(waiting)]
                self.layers[number] = FixedLayer(layer, new, filled, place)

    def expect(self, incoming: torch.Tensor | None) -> None:
        """A pass begins; which of its tokens are padding: `(B, q)` bool, True for real ones."""
        if self._places is not None:
            self._places += 1
            return
        for layer in self.pruned:
            layer.incoming = incoming

    def prompt_counts(self) -> torch.Tensor:
        """`(B, D)` int64: prompt tokens physically held, by sample and layer."""
        counts = [layer.prompt_counts for layer in self.pruned if layer.prompt_counts is not None]
        return torch.stack(counts, dim=1)

    def kv_bytes(self) -> int:
        """Bytes of keys and values held now, batch padding included."""
        return kv_bytes(self)


def kv_bytes(cache: Cache) -> int:
    """Bytes of keys and values that any cache of transformers holds now, batch padding included. States of linear
    attention, whose size no prompt changes, are not counted."""
    holding = [layer for layer in cache.layers if hasattr(layer, "keys")]
    return sum(t.nbytes for layer in holding for t in (layer.keys, layer.values))
