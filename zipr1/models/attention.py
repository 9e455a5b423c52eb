"""The bridge between transformers' decoders and the sparse operations.

Nothing of transformers is forked: `ATTENTION` is registered with its `AttentionInterface`, a pre-hook on the text
decoder hands each forward pass its `Pass`, and with `skip: layer` a pair of hooks around the output projection
and the MLP gathers the kept rows, lets the module run on them alone, and scatters the result. All hooks are the
instance's own and are gone when `sparse_attention` exits; outside of it, and at p = 1 without a request, the
model is transformers' SDPA path unchanged.

A prefill selects among prompt tokens and prunes the cache; later tokens are appended and attend to what is left.
With gradient checkpointing, run backward inside the context: layers are computed again there.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
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

from zipr1 import efficiency
from zipr1.errors import InputError
from zipr1.models.cache import PrunedCache
from zipr1.recipe import Probes, Sparse
from zipr1.sparsity import Draw, LayerRecord, Record, probe_slots, select

ATTENTION = "zipr1"

# Which kind of forward pass is under way: the mask is built inside it and must be left out for sparse ones.
_state = threading.local()


@dataclass
class Request:
    """A wish for sparsity, for the forward passes run inside `sparse_attention`.

    thresholds: `(B, D)`, `(B, 1)` or None for `settings.p`. seed: of the probes. valid, prompt: `(B, L)` bool, real
    tokens and those of the prompt; None: from the attention mask, all of them prompt. replay: kept prompt slots
    per layer, `(B, L)` bool, taken instead of choosing. scores: record cut points with their gradient.
    audit: record the mass kept for probes that did not choose. through: the range (low, high) of the thresholds; the
    kept tokens' keys and outputs then carry their chance of being kept as a factor of value 1, so that losses have a
    gradient in the scores. force: take the sparse path even where it keeps all.
    record: what the last prefill kept.
    """

    settings: Sparse
    thresholds: torch.Tensor | None = None
    seed: int = 0
    valid: torch.Tensor | None = None
    prompt: torch.Tensor | None = None
    replay: list[torch.Tensor] | None = None
    scores: bool = False
    audit: bool = False
    through: tuple[float, float] | None = None
    force: bool = False
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

    def choose(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Kept slots `(B, L)` bool of `layer`, answer tokens included. query `(B, HQ, L, D)`, key `(B, H, L, D)`."""
        request = self.request
        replay = None if request.replay is None else request.replay[layer]
        scored = request.scores or (replay is None and request.settings.rule != "random")
        last = self.prompt.flip(1).cumsum(1).flip(1)
        always = self.prompt & (last <= request.settings.keep_last)
        scores = cut = None
        with torch.set_grad_enabled(request.scores and torch.is_grad_enabled()):
            if scored:
                scores = self.score(layer, request.seed, request.settings.probes, query, key, scale)
            if request.scores:
                assert scores is not None
                cut = cut_points(scores, self.prompt, always)
        if replay is not None:
            keep = replay
        else:
            base = (
                scores.detach()
                if scores is not None
                else torch.zeros(self.prompt.shape, device=key.device)
            )
            draw = Draw(request.seed, layer)
            keep = select(
                request.settings.rule, base, self.threshold(layer), self.prompt, always, draw
            )
        if layer == len(self.record.layers):
            # A recomputed layer (gradient checkpointing) finds its record already there.
            heldout = self.heldout(layer, query, key, scale, keep) if request.audit else None
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
        query: torch.Tensor,
        key: torch.Tensor,
        scale: float,
        others: bool = False,
    ) -> torch.Tensor:
        """Scores `(B, L)` by probes of `seed`; others: without those that are among the choosing ones."""

        def slots_of(seed: int, probes: Probes) -> tuple[torch.Tensor, torch.Tensor]:
            return probe_slots(self.lengths, self.offsets, layer, seed, probes, query.device)

        slots, real = slots_of(seed, probes)
        if others:
            chosen, _ = slots_of(self.request.seed, self.request.settings.probes)
            real = real & ~(slots[:, :, None] == chosen[:, None, :]).any(-1)
        index = slots[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        picked = query.gather(2, index)
        normalise = self.request.settings.normalise
        return probe_scores(picked, key, slots, real, self.prompt, scale=scale, normalise=normalise)

    @torch.no_grad()
    def heldout(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, scale: float, keep: torch.Tensor
    ) -> torch.Tensor:
        """`(B,)` share of the score mass of fresh random probes that falls on kept tokens."""
        fresh = Probes(recent=0, random=max(8, self.request.settings.probes.random))
        scores = self.score(layer, self.request.seed + 7919, fresh, query, key, scale, others=True)
        total = scores.sum(1)
        # A prompt so short that every token is a probe has none left to ask.
        return torch.where(total > 0, (scores * keep).sum(1) / total.clamp_min(1e-12), 1.0)


@dataclass(frozen=True)
class KeptRows:
    """Rows of the flattened `(B * L)` batch that a layer computes. index `(n,)` int64."""

    index: torch.Tensor
    shape: tuple[int, int]


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
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention signature; query `(B, HQ, Lq, D)`, key and value `(B, H, Lk, D)` -> `(B, Lq, HQ, D)`."""
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer = int(module.layer_idx) if hasattr(module, "layer_idx") else 0  # type: ignore[arg-type]
    if zip_pass is not None:
        keep = zip_pass.choose(layer, query, key, scale)
        kept = pack_indices(keep)
        if zip_pass.request.settings.skip == "layer":
            module.zip_rows = KeptRows(kept.flat, (keep.shape[0], keep.shape[1]))  # type: ignore[assignment]
        through = zip_pass.request.through
        if through is None:
            out = sparse_prefill(query, key, value, kept, scale=scale)
        else:
            out = gated_prefill(query, key, value, kept, zip_pass.gate(layer, *through), scale)
        if zip_cache is not None:
            zip_cache.layers[layer].prune(*kv_compact(key, value, kept), kept.count)
        return out.transpose(1, 2), None
    if zip_cache is not None:
        out = sparse_decode(query, key, value, zip_cache.layers[layer].valid, scale=scale)
        return out.transpose(1, 2), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


def zipr1_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """SDPA's own mask, or none at all for a sparse pass, which knows its padding."""
    return None if getattr(_state, "sparse", False) else sdpa_mask(*args, **kwargs)


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
    _state.sparse = True
    if isinstance(cache, PrunedCache) and cache.get_seq_length() > 0:
        cache.expect(real)
        return args, {**kwargs, "zip_cache": cache}
    if request is None:
        _state.sparse = False
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


def _gather_rows(attention: torch.nn.Module, module: torch.nn.Module, args: Any) -> Any:
    rows: KeptRows | None = getattr(attention, "zip_rows", None)
    if rows is None:
        return None
    flat = args[0].reshape(rows.shape[0] * rows.shape[1], -1)
    return (flat[rows.index][None], *args[1:])


def _scatter_rows(
    attention: torch.nn.Module, last: bool, module: torch.nn.Module, args: Any, output: Any
) -> Any:
    rows: KeptRows | None = getattr(attention, "zip_rows", None)
    if rows is None:
        return None
    if last:
        attention.zip_rows = None  # type: ignore[assignment]
    full = output.new_zeros(rows.shape[0] * rows.shape[1], output.shape[-1])
    return full.index_copy(0, rows.index, output[0]).view(*rows.shape, -1)


@contextlib.contextmanager
def sparse_attention(model: Any, request: Request | None) -> Iterator[Request | None]:
    """Make forward passes and `generate()` of a transformers model sparse; with None they are dense.

    The model's text config must use the attention named `ATTENTION`. Use one context per model at a time.
    """
    if request is None or request.keeps_all:
        yield request
        return
    decoder = model.get_decoder()
    attentions = [layer.self_attn for layer in decoder.layers]

    def before(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        return _before_decoder(request, module, args, kwargs)

    handles = [decoder.register_forward_pre_hook(before, with_kwargs=True)]
    if request.settings.skip == "layer":
        for layer, attention in zip(decoder.layers, attentions, strict=True):
            for module, last in ((attention.o_proj, False), (layer.mlp, True)):
                handles.append(module.register_forward_pre_hook(_bind(_gather_rows, attention)))
                handles.append(module.register_forward_hook(_bind(_scatter_rows, attention, last)))
    try:
        yield request
    finally:
        _state.sparse = False
        for handle in handles:
            handle.remove()
        for attention in attentions:
            attention.zip_rows = None


def _bind(hook: Any, *bound: Any) -> Any:
    return lambda *args: hook(*bound, *args)
