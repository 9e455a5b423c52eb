"""`kv: retain`: conversations in which no key and value is ever dropped.

Each turn's prompt is a new choice among everything said so far: probes are the turn's own tokens, candidates all
tokens of all turns (selection.py). What is chosen is copied beside the whole, and attention of the turn and of its
answer reads the copy alone. Memory is that of the dense cache and the copy; the work is that of the chosen. A single
turn gives what `kv: evict` gives.

Not here: eviction (context.py, cache.py). Simplified: earlier tokens keep the keys and values of the turn they came
with; with `skip: layer`, those dropped then were not worked on by the layers that dropped them. Of a turn's dropped
tokens only the output projection and the MLP are skipped.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import Cache
from zipr1_kernels import Kept, kv_compact, pack_each, sparse_prefill

from zipr1.core.errors import InputError
from zipr1.models.sparse.attention import EXPANDS
from zipr1.models.sparse.cache import PrunedCache, PrunedLayer, kv_bytes
from zipr1.models.sparse.context import Decode, DecoderCall, SparseContext
from zipr1.models.sparse.hybrid import Choosing
from zipr1.models.sparse.packing import Handover, OutputRows
from zipr1.models.sparse.record import Record
from zipr1.models.sparse.request import Request
from zipr1.models.sparse.selection import Heads, ProbeRange, Selector


class RetainedLayer(PrunedLayer):
    """keys, values `(B, H, n, D)` and `valid`: what decoding reads, the chosen tokens and those since.

    whole: keys and values `(B, H, S, D)` of every token up to the last turn; real: `(B, S)` bool, False for padding.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.whole: tuple[torch.Tensor, torch.Tensor] | None = None
        self.real: torch.Tensor | None = None
        self.turn: torch.Tensor | None = None
        self.chosen = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """A turn's `(B, H, q, D)` join the whole, which is returned; an answer's join what decoding reads."""
        if self.turn is None:
            return super().update(key_states, value_states, *args, **kwargs)
        if self.whole is None:
            self.lazy_initialization(key_states, value_states)
            self.whole = key_states, value_states
        else:
            said = self.keys[:, :, self.chosen :], self.values[:, :, self.chosen :]
            new = key_states, value_states
            self.whole = (
                torch.cat([self.whole[0], said[0], new[0]], dim=2),
                torch.cat([self.whole[1], said[1], new[1]], dim=2),
            )
        self.real, self.turn = self.turn, None
        self.cumulative_length = self.whole[0].shape[2]
        return self.whole

    def choose(self, keys: torch.Tensor, values: torch.Tensor, kept: Kept) -> None:
        """What decoding reads from now on: copies `(B, H, n, D)` of the kept tokens."""
        self.keys, self.values, self._valid = keys, values, kept
        self.capacity = None  # of PrunedLayer: what it wrote behind the last turn's
        self.chosen = keys.shape[2]
        self.prompt_counts = kept.count

    def seen(self) -> torch.Tensor:
        """`(B, S)` bool of all tokens in order, answers since the last turn among them."""
        assert self.real is not None
        said = self.keys.shape[2] - self.chosen
        fresh = self.real.new_ones(len(self.real), said)
        if self.valid is not None:
            fresh = self.valid[:, self.chosen :]
        return torch.cat([self.real, fresh], dim=1)

    def _each(self, change: Any) -> None:
        super()._each(change)
        if self.whole is not None and self.real is not None:
            self.whole = change(self.whole[0]), change(self.whole[1])
            self.real = change(self.real)

    def reset(self) -> None:
        super().reset()
        self.whole = self.real = self.turn = None
        self.chosen = 0


class RetainedCache(Cache):
    """One `RetainedLayer` for each of a decoder's layers that chooses; the states of others lie between them."""

    def __init__(self, layers: Choosing) -> None:
        super().__init__(layers=layers.cache_layers(RetainedLayer))

    @property
    def retained(self) -> list[RetainedLayer]:
        return [layer for layer in self.layers if isinstance(layer, RetainedLayer)]

    def kv_bytes(self) -> int:
        """Bytes of all keys and values held now: the whole, and the copies that decoding reads."""
        wholes = [layer.whole for layer in self.retained if layer.whole is not None]
        return kv_bytes(self) + sum(t.nbytes for whole in wholes for t in whole)


class Turn(SparseContext):
    """One turn's prefill of q tokens after S others. valid: `(B, S + q)` bool, real tokens of all turns; the turn's own
    are the last q, and probes are drawn from them."""

    def __init__(
        self,
        request: Request,
        cache: RetainedCache,
        valid: torch.Tensor,
        past: int,
        handover: Handover,
        layers: Choosing,
        device: torch.device,
    ) -> None:
        super().__init__(handover)
        self.place = layers.place
        self.request = request
        self.cache = cache
        self.past = past
        valid = valid.cpu()
        asking = ProbeRange.of(valid[:, past:], past)
        self.selector = Selector(request, valid, asking, len(layers.numbers), device)

    @property
    def record(self) -> Record:
        return self.selector.record

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Choose, keep the choice for decoding, and attend: query `(B, HQ, q, D)`, key and value `(B, H, S + q, D)`
        -> `(B, q, HQ, D)`, 0 at tokens of the turn that were not chosen."""
        keep = self.selector.choose(self.place[layer], Heads.given(query, key, scale)).keep
        mine = keep[:, self.past :]
        whole = self.request.settings.skip == "layer"
        # Of a first turn both are the same.
        kept, *rest = pack_each(keep, mine) if whole and self.past else pack_each(keep)
        few = kv_compact(key, value, kept)
        self.cache.layers[layer].choose(*few, kept)
        rows = (rest[0] if rest else kept).flat if whole else None
        self.handover.leave(layer, OutputRows(o_proj=rows, mlp=rows))
        if not self.past:
            return sparse_prefill(query, key, value, kept, scale=scale).transpose(1, 2)
        place = self.past + torch.arange(query.shape[2], device=query.device)
        sees = (kept.index[:, None] <= place[:, None]) & kept.real[:, None]
        k, v = few
        if EXPANDS.get(
            query.device.type, False
        ):  # no fused kernel takes both a mask and shared heads
            k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in few)
        out = F.scaled_dot_product_attention(
            query, k, v, attn_mask=sees[:, None], scale=scale,
            enable_gqa=query.shape[1] != k.shape[1],
        )  # fmt: skip
        return torch.where(mine[:, :, None, None], out.transpose(1, 2), 0.0)


def begin(
    request: Request, call: DecoderCall, handover: Handover, layers: Choosing
) -> tuple[SparseContext, Any]:
    """As `context.begin`, with all keys and values retained from turn to turn."""
    cache = call.cache
    if PrunedCache.replaces(cache) or cache is None:
        cache = RetainedCache(layers)
    if not isinstance(cache, RetainedCache):
        raise InputError(
            f"kv: retain needs its own KV cache and got a {type(cache).__name__} that is in use; leave "
            "past_key_values and cache_implementation out"
        )
    if cache.get_seq_length() > 0 and call.embeds.shape[1] == 1:
        for layer in cache.retained:
            layer.incoming = call.real
        return Decode(cache, handover), cache
    new = call.valid.to(call.embeds.device)
    past = cache.retained[0].seen() if cache.get_seq_length() > 0 else new[:, :0]
    valid = torch.cat([past, new], dim=1)
    turn = Turn(request, cache, valid, past.shape[1], handover, layers, new.device)
    for layer in cache.retained:
        layer.turn = valid
    return turn, cache
