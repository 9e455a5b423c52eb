"""`kv: retain`: conversations in which no key and value is ever dropped.

Each turn's prompt is a new choice among everything said so far: probes are the turn's own tokens, candidates all
tokens of all turns. What is chosen is copied beside the whole, and attention of the turn and of its answer reads the
copy alone. Memory is that of the dense cache and the copy; the work is that of the chosen. A single turn gives what
`kv: evict` gives.

Not here: eviction (attention.py, cache.py). Simplified: earlier tokens keep the keys and values of the turn they came
with; with `skip: layer`, those dropped then were not worked on by the layers that dropped them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Cache
from zipr1_kernels import Kept, kv_compact, pack_indices, probe_scores, sparse_prefill

from zipr1.core.errors import InputError
from zipr1.core.recipe import Sparse
from zipr1.models.sparse import attention
from zipr1.models.sparse.cache import PrunedCache, PrunedLayer, kv_bytes
from zipr1.models.sparse.probes import probe_slots
from zipr1.models.sparse.record import LayerRecord, Record
from zipr1.models.sparse.rules import Draw, select


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
        self.keys, self.values, self.valid = keys, values, kept.real
        self.room = None  # of PrunedLayer: what it wrote behind the last turn's
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
    """One `RetainedLayer` per decoder layer, made as layers are met."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=RetainedLayer)

    def kv_bytes(self) -> int:
        """Bytes of all keys and values held now: the whole, and the copies that decoding reads."""
        return kv_bytes(self) + sum(t.nbytes for layer in self.layers for t in layer.whole)


@dataclass
class Turn:
    """One turn's prefill. valid: `(B, S + q)` bool over all tokens; past: S; fresh, offsets: real tokens of the turn in
    each row, and the first of them among its q; rows: of the flattened `(B * q)` that the layer under way works on."""

    settings: Sparse
    cache: RetainedCache
    valid: torch.Tensor
    past: int
    fresh: list[int]
    offsets: list[int]
    record: Record
    rows: torch.Tensor | None = None

    @classmethod
    def start(cls, settings: Sparse, cache: RetainedCache, new: torch.Tensor) -> Turn:
        """new: `(B, q)` bool, the turn's real tokens."""
        fresh = new.sum(1)
        if not bool((fresh > 0).all()):
            raise InputError("a sample of the batch has no prompt token; give each at least one")
        held = cache.get_seq_length() > 0
        valid = torch.cat([cache.layers[0].seen(), new], dim=1) if held else new
        return cls(
            settings, cache, valid, valid.shape[1] - new.shape[1], fresh.tolist(), new.int().argmax(1).tolist(),
            Record(valid.sum(1)),
        )  # fmt: skip

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Choose, keep the choice for decoding, and attend: query `(B, HQ, q, D)`, key and value `(B, H, S + q, D)`
        -> `(B, q, HQ, D)`, 0 at tokens of the turn that were not chosen."""
        keep = self.choose(layer, query, key, scale)
        kept = pack_indices(keep)
        few = kv_compact(key, value, kept)
        self.cache.layers[layer].choose(*few, kept)
        mine = keep[:, self.past :]
        if self.settings.skip == "layer":
            self.rows = mine.flatten().nonzero()[:, 0]
        if not self.past:
            return sparse_prefill(query, key, value, kept, scale=scale).transpose(1, 2)
        place = self.past + torch.arange(query.shape[2], device=query.device)
        sees = (kept.index[:, None] <= place[:, None]) & kept.real[:, None]
        out = F.scaled_dot_product_attention(
            query, *few, attn_mask=sees[:, None], scale=scale, enable_gqa=True
        )
        return torch.where(mine[:, :, None, None], out.transpose(1, 2), 0.0)

    def choose(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Kept slots `(B, S + q)` bool among all tokens of all turns."""
        settings, device = self.settings, query.device
        slots, real = probe_slots(self.fresh, self.offsets, layer, 0, settings.probes, device)
        index = slots[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        scores = probe_scores(
            query.gather(2, index), key, slots + self.past, real, self.valid, scale=scale,
            normalise=settings.normalise,
        )  # fmt: skip
        lengths = self.record.lengths.to(device)
        p = torch.full(lengths.shape, settings.p, device=device)
        p = p.masked_fill(lengths < settings.dense_below, 1.0)
        last = self.valid.flip(1).cumsum(1).flip(1)
        always = self.valid & (last <= settings.keep_last)
        keep = select(settings.rule, scores, p, self.valid, always, Draw(0, layer))
        self.record.layers.append(LayerRecord(keep, scores))
        return keep


@contextlib.contextmanager
def retained_attention(model: Any, settings: Sparse) -> Iterator[None]:
    """Make forward passes and `generate()` sparse, with all keys and values retained from turn to turn.

    As `sparse_attention`: the text config must use the attention `ATTENTION`, and everything is gone on exit.
    """
    decoder = model.get_decoder()
    now: list[Turn | None] = [None]

    def before(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        cache, embeds = kwargs.get("past_key_values"), kwargs.get("inputs_embeds")
        embeds = kwargs["input_ids"] if embeds is None else embeds
        if PrunedCache.replaces(cache) or cache is None:
            cache = RetainedCache()
        if not isinstance(cache, RetainedCache):
            raise InputError(
                f"kv: retain needs its own KV cache and got a {type(cache).__name__} that is in use; leave "
                "past_key_values and cache_implementation out"
            )
        attention._state.sparse = module.config
        now[0] = None
        batch, new = embeds.shape[:2]
        mask = kwargs.get("attention_mask")
        real = torch.ones(batch, new, dtype=torch.bool, device=embeds.device)
        if mask is not None and mask.ndim == 2:
            real = mask[:, -new:].bool()
        if cache.get_seq_length() > 0 and new == 1:
            for layer in cache.layers:
                layer.incoming = real
            return args, {**kwargs, "zip_cache": cache}
        now[0] = turn = Turn.start(settings, cache, real)
        if not cache.layers:
            cache.layers.extend(RetainedLayer() for _ in decoder.layers)
        for layer in cache.layers:
            layer.turn = turn.valid
        return args, {**kwargs, "past_key_values": cache, "zip_turn": turn}

    def gather(module: torch.nn.Module, args: Any) -> Any:
        turn = now[0]
        if turn is None or turn.rows is None:
            return None
        return (args[0].flatten(0, 1)[turn.rows][None], *args[1:])

    def scatter(last: bool, output: torch.Tensor) -> torch.Tensor | None:
        turn = now[0]
        if turn is None or turn.rows is None:
            return None
        rows, shape = turn.rows, (len(turn.valid), turn.valid.shape[1] - turn.past)
        if last:
            turn.rows = None
        full = output.new_zeros(shape[0] * shape[1], output.shape[-1])
        return full.index_copy(0, rows, output[0]).unflatten(0, shape)

    with contextlib.ExitStack() as undo:
        undo.callback(setattr, attention._state, "sparse", None)
        hooks = [decoder.register_forward_pre_hook(before, with_kwargs=True)]
        if settings.skip == "layer":
            for layer in decoder.layers:
                for module, last in ((layer.self_attn.o_proj, False), (layer.mlp, True)):
                    hooks.append(module.register_forward_pre_hook(gather))
                    hooks.append(
                        module.register_forward_hook(
                            lambda m, a, out, last=last: scatter(last, out)
                        )
                    )
        for hook in hooks:
            undo.callback(hook.remove)
        yield
