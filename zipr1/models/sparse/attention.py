"""The bridge between transformers' decoders and the sparse operations.

Nothing of transformers is forked: `ATTENTION` is registered with its `AttentionInterface`, and hooks of the instance's
own choose tokens (`skip: layer`: layer_skip.py). All of it is gone when `sparse_attention` exits; outside of it, and
at p = 1 without a request, the model is transformers' SDPA path unchanged.

A prefill selects among prompt tokens and prunes the cache; later tokens are appended and attend to what is left.
With gradient checkpointing, run backward inside the context: layers are computed again there.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from zipr1_kernels import (
    Kept,
    cut_points,
    kv_compact,
    pack_indices,
    probe_scores,
    sparse_decode,
    sparse_prefill,
)

from zipr1.core.errors import InputError
from zipr1.core.phases import phase
from zipr1.core.recipe import Probes, Sparse
from zipr1.models.sparse import thresholds as efficiency
from zipr1.models.sparse.cache import PrunedCache
from zipr1.models.sparse.last_layer import ends, forwards, only_at
from zipr1.models.sparse.layer_skip import Heads, Rows, skipping
from zipr1.models.sparse.probes import probe_slots
from zipr1.models.sparse.record import LayerRecord, Record
from zipr1.models.sparse.rules import Draw, select

ATTENTION = "zipr1"

# The text config of the model whose sparse forward pass is under way: its mask is built inside and must be left out.
_state = threading.local()


@dataclass
class Request:
    """A wish for sparsity, for the forward passes run inside `sparse_attention`.

    thresholds: `(B, D)`, `(B, 1)` or None for `settings.p`. seed: of the probes. valid, prompt: `(B, L)` bool, real
    tokens and those of the prompt; None: from the attention mask, all of them prompt. replay: kept prompt slots per
    layer, `(B, L)` bool, taken instead of choosing. scores: record cut points with their gradient. audit: rows for
    which the mass kept for probes that did not choose is recorded. through: the range (low, high) of the thresholds;
    the kept tokens' keys and outputs then carry their chance of being kept as a factor of value 1, so that losses have
    a gradient in the scores. force: take the sparse path even where it keeps all. wanted: `(B, L)` bool, the places of
    a prefill whose output is read, all of them kept; None: all.
    record: what the last prefill kept.
    """

    settings: Sparse
    thresholds: torch.Tensor | None = None
    seed: int = 0
    valid: torch.Tensor | None = None
    prompt: torch.Tensor | None = None
    replay: list[torch.Tensor] | None = None
    scores: bool = False
    audit: Sequence[int] = ()
    through: tuple[float, float] | None = None
    force: bool = False
    wanted: torch.Tensor | None = None
    record: Record | None = None

    @property
    def keeps_all(self) -> bool:
        """Whether p is 1 everywhere and nothing is to be recorded: the dense model, taken as it is."""
        if self.force or self.scores or self.replay is not None:
            return False
        if self.thresholds is None:
            return self.settings.p >= 1
        return bool((self.thresholds >= 1).all())


class Pass:
    """One sparse prefill: what layers need to choose, and what they chose.

    No dataclass: FSDP2 hands each layer copies of those, and what a layer writes into its copy is lost.
    """

    def __init__(
        self,
        request: Request,
        valid: torch.Tensor,
        prompt: torch.Tensor,
        lengths: list[int],
        offsets: list[int],
        record: Record,
    ) -> None:
        self.request = request
        self.valid = valid
        self.prompt = prompt
        self.lengths = lengths
        self.offsets = offsets
        self.record = record

    @classmethod
    def start(cls, request: Request, valid: torch.Tensor) -> Pass:
        prompt = request.prompt if request.prompt is not None else valid
        lengths = prompt.sum(1)
        if not bool((lengths > 0).all()):
            raise InputError("a sample of the batch has no prompt token; give each at least one")
        offsets = prompt.int().argmax(1)
        return cls(request, valid, prompt, lengths.tolist(), offsets.tolist(), Record(lengths))

    def of(self, rows: torch.Tensor) -> Pass:
        """Some rows alone, to be scored; rows `(b,)` int64."""
        lengths, offsets = (
            [values[i] for i in rows.tolist()] for values in (self.lengths, self.offsets)
        )
        return Pass(
            self.request, self.valid[rows], self.prompt[rows], lengths, offsets, self.record
        )

    def threshold(self, layer: int) -> torch.Tensor:
        """`(B,)` p of each row at `layer`; beams and returned sequences repeat their row's."""
        rows, settings = self.prompt.shape[0], self.request.settings
        given = self.request.thresholds
        if given is None:
            p = torch.full((rows,), settings.p, device=self.prompt.device)
        else:
            p = given[:, min(layer, given.shape[1] - 1)].to(self.prompt.device)
            if rows % len(p):
                raise InputError(f"{len(p)} thresholds for {rows} rows; give one for each sample")
            p = p.repeat_interleave(rows // len(p))
        short = torch.tensor([n < settings.dense_below for n in self.lengths], device=p.device)
        return p.masked_fill(short, 1.0)

    def choose(self, layer: int, heads: Heads) -> torch.Tensor:
        """Kept slots `(B, L)` bool of `layer`, answer tokens included."""
        request = self.request
        replay = None if request.replay is None else request.replay[layer]
        scored = request.scores or (replay is None and request.settings.rule != "random")
        last = self.prompt.flip(1).cumsum(1).flip(1)
        always = self.prompt & (last <= request.settings.keep_last)
        scores = cut = None
        with torch.set_grad_enabled(request.scores and torch.is_grad_enabled()):
            if scored:
                scores = self.score(layer, request.seed, request.settings.probes, heads)
            if request.scores:
                assert scores is not None
                cut = cut_points(scores, self.prompt, always)
        if replay is not None:
            keep = replay
        else:
            base = (
                scores.detach()
                if scores is not None
                else torch.zeros(self.prompt.shape, device=self.prompt.device)
            )
            draw = Draw(request.seed, layer)
            with phase("selection"):
                p = self.threshold(layer)
                keep = select(request.settings.rule, base, p, self.prompt, always, draw)
        if layer == len(self.record.layers):
            # A recomputed layer (gradient checkpointing) finds its record already there.
            heldout = self.heldout(layer, heads, keep) if len(request.audit) else None
            self.record.layers.append(LayerRecord(keep, scores, cut, heldout))
        return keep | (self.valid & ~self.prompt)

    def gate(self, layer: int, low: float, high: float) -> torch.Tensor:
        """`(B, L)`, 0 with the gradient of each token's chance of being kept for p ~ U(low, high)."""
        cut = self.record.layers[layer].cut
        assert cut is not None, "Request.through needs scores"
        chance = efficiency.chance(cut, low, high)
        return chance - chance.detach()

    def score(
        self,
        layer: int,
        seed: int,
        probes: Probes,
        heads: Heads,
        others: bool = False,
    ) -> torch.Tensor:
        """Scores `(B, L)` by probes of `seed`; others: without those that are among the choosing ones."""

        def slots_of(seed: int, probes: Probes) -> tuple[torch.Tensor, torch.Tensor]:
            return probe_slots(self.lengths, self.offsets, layer, seed, probes, self.prompt.device)

        slots, real = slots_of(seed, probes)
        if others:
            chosen, _ = slots_of(self.request.seed, self.request.settings.probes)
            real = real & ~(slots[:, :, None] == chosen[:, None, :]).any(-1)
        query, key, normalise = heads.queries(slots), heads.keys(), self.request.settings.normalise
        with phase("scoring"):
            return probe_scores(
                query, key, slots, real, self.prompt, scale=heads.scale, normalise=normalise
            )

    @torch.no_grad()
    def heldout(self, layer: int, heads: Heads, keep: torch.Tensor) -> torch.Tensor:
        """Share of the score mass of fresh random probes that falls on kept tokens, of each row that is audited."""
        rows = torch.tensor(self.request.audit, device=keep.device)
        few = self.of(rows)
        fresh = Probes(recent=0, random=max(8, self.request.settings.probes.random))
        scores = few.score(layer, self.request.seed + 7919, fresh, heads.of(rows), others=True)
        total = scores.sum(1)
        # A prompt so short that every token is a probe has none left to ask.
        return torch.where(total > 0, (scores * keep[rows]).sum(1) / total.clamp_min(1e-12), 1.0)


def gated_prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: Kept,
    gate: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """`sparse_prefill` whose kept tokens weigh exp(gate) as keys and 1 + gate as outputs; gate `(B, L)` is 0.

    One more head dimension adds the gate to the logits, so that the attention itself need not know of it.
    """
    bias = (gate / scale).to(key.dtype)[:, None, :, None].expand(-1, key.shape[1], -1, 1)
    query = torch.cat([query, torch.ones_like(query[..., :1])], -1)
    out = sparse_prefill(query, torch.cat([key, bias], -1), value, kept, scale=scale)
    return out * (1 + gate).to(out.dtype)[:, None, :, None]


def zipr1_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    zip_pass: Pass | None = None,
    zip_cache: PrunedCache | None = None,
    zip_rows: Rows | None = None,
    zip_turn: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention signature; query `(B, HQ, Lq, D)`, key and value `(B, H, Lk, D)` -> `(B, Lq, HQ, D)`.

    zip_rows: the tensors hold only the kept tokens, flattened to one row.
    """
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer = int(module.layer_idx) if hasattr(module, "layer_idx") else 0  # type: ignore[arg-type]
    if zip_turn is not None:  # kv: retain, see retained.py
        return zip_turn.attend(layer, query, key, value, scale), None
    if zip_pass is not None:
        if zip_rows is None:
            keep = zip_pass.choose(layer, Heads.given(query, key, scale))
            with phase("selection"):
                kept = among = pack_indices(keep)
            _state.rows = Rows(kept)
        else:
            kept, among = zip_rows.kept, zip_rows.kept.packed
            query, key, value = (zip_rows.pad(x) for x in (query, key, value))
        through = zip_pass.request.through
        if through is None:
            with phase("attention"):
                out = sparse_prefill(query, key, value, among, scale=scale)
        else:
            gate = zip_pass.gate(layer, *through)
            gate = gate if zip_rows is None else gate.gather(1, kept.index)
            out = gated_prefill(query, key, value, among, gate, scale)
        if zip_cache is not None:
            with phase("gathers"):
                small = (key, value) if zip_rows is not None else kv_compact(key, value, kept)
                zip_cache.put(layer, *small, kept)
        return (out.transpose(1, 2) if zip_rows is None else zip_rows.strip(out)), None
    with phase("attention"):
        if zip_cache is not None:
            valid = zip_cache.layers[layer].valid
            out = sparse_decode(query, key, value, valid, scale=scale)
            return out.transpose(1, 2), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )


def zipr1_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """SDPA's own mask, or none at all for a sparse pass, which knows its padding."""
    under_way = getattr(_state, "sparse", None)
    if under_way is not None and kwargs.get("config") is under_way:
        return None
    return sdpa_mask(*args, **kwargs)


AttentionInterface.register(ATTENTION, zipr1_attention)
AttentionMaskInterface.register(ATTENTION, zipr1_mask)


def _before_decoder(
    request: Request | None, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]
) -> Any:
    """Pre-hook of the text decoder: decide between prefill, decode and dense; swap in a pruned cache."""
    cache, embeds = kwargs.get("past_key_values"), kwargs.get("inputs_embeds")
    if embeds is None:
        embeds = kwargs["input_ids"]
    batch, new = embeds.shape[0], embeds.shape[1]
    mask = kwargs.get("attention_mask")
    real = None if mask is None or mask.ndim != 2 else mask[:, -new:].bool()
    _state.sparse = module.config
    if isinstance(cache, PrunedCache) and cache.get_seq_length() > 0:
        cache.expect(real)
        if request is not None:
            request.wanted = None  # it was of the prefill
        return args, {**kwargs, "zip_cache": cache}
    if request is None:
        _state.sparse = None
        return args, kwargs
    if PrunedCache.replaces(cache) or (cache is None and kwargs.get("use_cache")):
        cache = PrunedCache()
    if cache is not None and not isinstance(cache, PrunedCache):
        raise InputError(
            f"sparse attention needs its own KV cache and got a {type(cache).__name__} that is in use; "
            "leave past_key_values and cache_implementation out"
        )
    valid = request.valid
    if valid is None or valid.shape != (batch, new):
        valid = (
            real
            if real is not None
            else torch.ones(batch, new, dtype=torch.bool, device=embeds.device)
        )
    current = Pass.start(request, valid)
    request.record = current.record
    return args, {**kwargs, "past_key_values": cache, "zip_pass": current, "zip_cache": cache}


def _projecting(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The output projection's forward: after a sparse attention on the kept rows alone, 0 for the others."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        rows: Rows | None = getattr(_state, "rows", None)
        if rows is None:
            return stock(x)
        _state.rows = None
        out = stock(rows.flatten(x))
        return rows.spread(out, out.new_zeros(*x.shape[:2], out.shape[-1]))

    return forward


def _read(request: Request, layer: int) -> Callable[[torch.Tensor], torch.Tensor | None]:
    """Where the output of the last layer, number `layer`, is read, for an input of one of its `ends`."""

    def places(x: torch.Tensor) -> torch.Tensor | None:
        wanted = request.wanted
        if wanted is None:
            return None
        _state.rows = None
        if request.settings.skip != "layer":
            return wanted
        # The layer was handed the kept tokens of all rows, one after the other; answers' are always kept.
        assert request.record is not None and request.valid is not None
        keep = request.record.layers[layer].keep
        if request.prompt is not None:
            keep = keep | (request.valid & ~request.prompt)
        return wanted[keep][None]

    return places


@contextlib.contextmanager
def sparse_attention(model: Any, request: Request | None) -> Iterator[Request | None]:
    """Make forward passes and `generate()` of a transformers model sparse; with None they are dense.

    The model's text config must use the attention named `ATTENTION`. Use one context per model at a time.
    """
    if request is None or request.keeps_all:
        yield request
        return
    decoder = model.get_decoder()

    def before(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        return _before_decoder(request, module, args, kwargs)

    swaps = [(layer, skipping(layer, layer.forward)) for layer in decoder.layers]
    if request.settings.skip != "layer":
        outputs = [layer.self_attn.o_proj for layer in decoder.layers]
        swaps = [(module, _projecting(module.forward)) for module in outputs]
    places = _read(request, len(decoder.layers) - 1)
    handle = decoder.register_forward_pre_hook(before, with_kwargs=True)
    try:
        # The last layer's own swaps come after those of all layers, and call them where `wanted` is None.
        with (
            forwards(swaps),
            forwards([(m, only_at(m.forward, places)) for m in ends(decoder)]),
        ):
            yield request
    finally:
        _state.sparse = _state.rows = None
        handle.remove()
