"""What one forward pass does in place of attention: its `SparseContext`, which every layer's attention is handed.

A pass over a prompt is a `Prefill`: each layer chooses its tokens (selection.py), attends among them and puts their
keys and values into the cache. With `skip: layer` a layer is run on the chosen tokens alone (layer_skip.py), and its
attention is handed the `PackedPrefill` of that choice. Tokens after a prompt are a `Decode`. A turn of a conversation
whose keys and values are all retained is a `Turn` (retain.py).

Contexts are no dataclasses: FSDP2 hands each layer copies of those, and what a layer writes into its copy is lost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from zipr1_kernels import (
    Kept,
    kv_compact,
    pack_indices,
    packed_attention,
    sparse_decode,
    sparse_prefill,
)

from zipr1.core.errors import InputError
from zipr1.core.phases import phase
from zipr1.models.sparse.cache import PrunedCache
from zipr1.models.sparse.gate import gated_attention, gated_prefill, straight_through
from zipr1.models.sparse.hybrid import Choosing
from zipr1.models.sparse.last_layer import finished, slots_of
from zipr1.models.sparse.packing import Handover, OutputRows, PackedRows
from zipr1.models.sparse.record import LayerRecord, Record
from zipr1.models.sparse.request import PromptBatch, Request
from zipr1.models.sparse.rotation import Place, Rotation
from zipr1.models.sparse.selection import Heads, ProbeRange, Selector
from zipr1.models.transfer import send


@dataclass(frozen=True, eq=False)
class DecoderCall:
    """What a text decoder was called with. embeds: `(B, q, hidden)`, or ids `(B, q)`. cache: past_key_values. real:
    `(B, q)` bool, real tokens among the q new ones by the attention mask; None: there was none. batch: what `prefill`
    (sampling.py) says of the batch."""

    embeds: torch.Tensor
    cache: Any
    use_cache: bool
    real: torch.Tensor | None
    batch: PromptBatch | None

    @property
    def valid(self) -> torch.Tensor:
        """`(B, q)` bool, real tokens among the new ones; on the CPU where there was no mask."""
        if self.real is not None:
            return self.real
        return torch.ones(self.embeds.shape[:2], dtype=torch.bool)

    @property
    def padding(self) -> torch.Tensor | None:
        """`(B, q)` bool on the device, False for padding among the new tokens; None: there is none."""
        valid = self.batch.valid if self.batch is not None else self.real
        if valid is None or self.embeds.shape[1] == 1 or bool(valid.all()):
            return None
        return valid.to(self.embeds.device)


class SparseContext(ABC):
    """One forward pass. handover: where a layer's attention says what the rest of that layer works on; the patched
    output projection and MLP read it (patch.py). padding: as of `DecoderCall`, for layers that choose nothing."""

    padding: torch.Tensor | None = None

    def __init__(self, handover: Handover) -> None:
        self.handover = handover

    @property
    def record(self) -> Record | None:
        """What the layers keep of the prompt, filled as they run; None where nothing is chosen."""
        return None

    @abstractmethod
    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attention of one layer: query `(B, HQ, Lq, D)`, key and value `(B, H, Lk, D)` -> `(B, Lq, HQ, D)`."""

    def pack(
        self, layer: int, rows: int, place: Place, heads: Callable[[Rotation], Heads]
    ) -> PackedPrefill | None:
        """The choice of a layer that is to run on its kept tokens alone; None: it runs on all that it is given. rows:
        B; place: cos and sin of its input."""
        return None


class Prefill(SparseContext):
    """A prompt, of which each layer that chooses keeps a part. cache: takes the kept keys and values; None: none are.
    layers: of the decoder, of which the last one is finished where `batch.read_at` says. own: whether layers may write
    into what they are given."""

    own = False

    def __init__(
        self,
        request: Request,
        batch: PromptBatch,
        cache: PrunedCache | None,
        handover: Handover,
        layers: Choosing,
        device: torch.device,
    ) -> None:
        super().__init__(handover)
        self.place = layers.place
        valid = batch.valid.cpu()
        prompt = valid if batch.prompt is None else batch.prompt.cpu()
        self.request = request
        asking = ProbeRange.of(prompt)
        self.selector = Selector(request, prompt, asking, len(layers.numbers), device)
        self.cache = cache
        self.last = layers.last
        self._rotation: Rotation | None = None
        self.slots = None if batch.read_at is None else slots_of(batch.read_at, device)
        # A choice that was recorded is known here already, counts and all: no GPU waits for them.
        self.known: list[Kept] | None = None
        answers = valid & ~prompt
        if request.replay is not None:
            self.known = [Kept.from_mask(keep.cpu() | answers) for keep in request.replay]
            if device.type != "cpu":
                self.known = _sent(device, self.known)
        self.answers = send(device, answers)[0] if bool(answers.any()) else None

    @property
    def record(self) -> Record:
        return self.selector.record

    def choose(self, layer: int, heads: Heads) -> tuple[Kept, LayerRecord]:
        """Tokens that take part in `layer`: what it keeps of the prompt, and the answers, which are never dropped."""
        place = self.place[layer]
        choice = self.selector.choose(place, heads)
        if self.known is not None:
            return self.known[place], choice
        with phase("selection"):
            keep = choice.keep if self.answers is None else choice.keep | self.answers
            return pack_indices(keep), choice

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        kept, choice = self.choose(layer, Heads.given(query, key, scale))
        out = self.among(kept, query, key, value, scale, self.gate_of(choice))
        if self.cache is not None:
            with phase("gathers"):
                self.cache.put(layer, *kv_compact(key, value, kept), kept)
        slots = self.read_in(layer)
        self.handover.leave(
            layer, OutputRows(o_proj=kept.flat) if slots is None else finished(slots)
        )
        return out.transpose(1, 2)

    def pack(
        self, layer: int, rows: int, place: Place, heads: Callable[[Rotation], Heads]
    ) -> PackedPrefill | None:
        if self.request.settings.skip != "layer":
            return None
        if self._rotation is None or self._rotation.place[0] is not place[0]:
            with phase("gathers"):
                self._rotation = Rotation(place, rows, self.selector.index)
        rotation = self._rotation
        with torch.set_grad_enabled(self.request.scores and torch.is_grad_enabled()):
            kept, choice = self.choose(layer, heads(rotation))
        with phase("gathers"):
            return PackedPrefill(self, PackedRows(kept, self.own), choice, rotation.at(kept.flat))

    def read_in(self, layer: int) -> torch.Tensor | None:
        """Slots of the flattened batch where the output of this layer is read; None: everywhere."""
        return self.slots if layer == self.last else None

    def gate_of(self, choice: LayerRecord) -> torch.Tensor | None:
        """`(B, L)` of `Request.through`; None without it."""
        if self.request.through is None:
            return None
        assert choice.cut is not None, "Request.through needs scores"
        return straight_through(choice.cut, *self.request.through)

    def among(
        self,
        kept: Kept,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        gate: torch.Tensor | None,
    ) -> torch.Tensor:
        """Causal attention among kept tokens, `(B, HQ, L, D)`, 0 elsewhere."""
        with phase("attention"):
            if gate is None:
                return sparse_prefill(query, key, value, kept, scale=scale)
            return gated_prefill(query, key, value, kept, gate, scale)


def _sent(device: torch.device, choices: Sequence[Kept]) -> list[Kept]:
    """The choices of all layers on a device, by one copy."""
    there = iter(send(device, *(part for kept in choices for part in kept.parts)))
    return [kept.moved(*(next(there) for _ in kept.parts)) for kept in choices]


class PackedPrefill(SparseContext):
    """One layer of a prefill that is run on its kept tokens alone: they come as the n tokens of a batch of one. place:
    their cos and sin."""

    def __init__(
        self, prefill: Prefill, rows: PackedRows, choice: LayerRecord, place: Place
    ) -> None:
        super().__init__(prefill.handover)
        self.place = place
        self.prefill = prefill
        self.rows = rows
        self.choice = choice

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        prefill, rows, kept = self.prefill, self.rows, self.rows.kept
        gate = prefill.gate_of(self.choice)
        heads = [x[0].transpose(0, 1) for x in (query, key, value)]  # (n, heads, D)
        with phase("attention"):
            if gate is None:
                out = packed_attention(heads[0], heads[1], heads[2], kept, scale=scale)
            else:
                gate = gate.flatten().index_select(0, kept.flat)
                out = gated_attention(heads[0], heads[1], heads[2], kept, gate, scale)
        if prefill.cache is not None:
            with phase("gathers"):
                prefill.cache.put(layer, *rows.by_row(heads[1], heads[2]), kept)
        slots = prefill.read_in(layer)
        self.handover.leave(layer, OutputRows() if slots is None else finished(slots, kept))
        return out[None]


class Decode(SparseContext):
    """Tokens after a prompt, which attend to what the cache holds; they are never dropped themselves."""

    def __init__(self, cache: PrunedCache, handover: Handover) -> None:
        super().__init__(handover)
        self.cache = cache

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        self.handover.leave(layer, OutputRows())
        with phase("attention"):
            held = self.cache.layers[layer]
            out = sparse_decode(query, key, value, held.valid, count=held.filled, scale=scale)
            return out.transpose(1, 2)


def begin(
    request: Request, call: DecoderCall, handover: Handover, layers: Choosing
) -> tuple[SparseContext, Any]:
    """The context of a call, a prompt or tokens after it, and the cache to go on with, if any. layers: of the decoder.

    Raises InputError for a cache in use that was not pruned.
    """
    cache = call.cache
    if isinstance(cache, PrunedCache) and cache.get_seq_length() > 0:
        cache.expect(call.real)
        return Decode(cache, handover), cache
    if PrunedCache.replaces(cache) or (cache is None and call.use_cache):
        cache = PrunedCache(layers)
    if cache is not None and not isinstance(cache, PrunedCache):
        raise InputError(
            f"sparse attention needs its own KV cache and got a {type(cache).__name__} that is in use; "
            "leave past_key_values and cache_implementation out"
        )
    batch = call.batch or PromptBatch(call.valid)
    return Prefill(request, batch, cache, handover, layers, call.embeds.device), cache
