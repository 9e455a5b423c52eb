"""Sparsity of a transformers model in memory: `zipr1.load`, `zipr1.sparse` and `zipr1.stats` stand on this.

All of it belongs to one model object and goes when sparsity is switched off: hooks on its decoder, its own
`generate` that refuses by name what cannot work, and the attention its text part uses. Other models in the process
are not touched. Threads may share a model: their forward passes take turns.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from zipr1.core.errors import InputError
from zipr1.core.recipe import Sparse
from zipr1.models.families import FAMILIES
from zipr1.models.sparse.attention import ATTENTION, Request, sparse_attention
from zipr1.models.sparse.cache import PrunedCache
from zipr1.models.sparse.retain import RetainedCache, retained_attention

ATTRIBUTE = "_zipr1"


@dataclass(frozen=True)
class Stats:
    """What the last prefill kept. lengths: `(B,)` prompt tokens of each row; kept: `(B, D)` of them kept in each
    layer; both int64 on the CPU. Beams and returned sequences are rows of their own. settings: in force then."""

    lengths: torch.Tensor
    kept: torch.Tensor
    settings: Sparse

    @property
    def layer_ratio(self) -> torch.Tensor:
        """`(D,)` share of the prompt kept in each layer, mean over rows."""
        return (self.kept / self.lengths[:, None]).mean(0)

    @property
    def token_ratio(self) -> float:
        """Mean over rows and layers of kept / prompt tokens, in (0, 1]."""
        return float((self.kept / self.lengths[:, None]).mean())

    def __str__(self) -> str:
        low, high = int(self.lengths.min()), int(self.lengths.max())
        tokens = f"{low}" if low == high else f"{low} to {high}"
        layers = ", ".join(f"{100 * ratio:.0f}" for ratio in self.layer_ratio.tolist())
        rows = "1 prompt" if len(self.lengths) == 1 else f"{len(self.lengths)} prompts"
        text = f"{rows} of {tokens} tokens, {self.token_ratio:.1%} kept (by layer: {layers} %)"
        short = int((self.lengths < self.settings.dense_below).sum())
        if short and self.settings.p < 1:
            text += f"; {short} stayed dense, being shorter than dense_below = {self.settings.dense_below}"
        return text


class Live:
    """The sparsity of one model. settings: those in force last; `switch` puts others in force."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.decoder = model.get_decoder()
        self.settings: Sparse | None = None
        self.lock = threading.Lock()
        self.owner: int | None = None
        self.last = threading.local()
        self.undo = contextlib.ExitStack()

    def switch(self, settings: Sparse | None) -> None:
        """Put `settings` in force; None makes the model what it was before."""
        self.undo.close()
        self.settings = settings
        if settings is None:
            return
        plain = self.model.config.get_text_config()._attn_implementation
        if settings.p < 1 and plain != ATTENTION:
            self.model.set_attn_implementation({"text_config": ATTENTION})
            self.undo.callback(self.model.set_attn_implementation, {"text_config": plain})
        self._hook(self.decoder.register_forward_pre_hook(self._enter))
        if settings.kv == "retain" and settings.p < 1:
            self.undo.enter_context(retained_attention(self.model, settings))
        else:
            self.undo.enter_context(sparse_attention(self.model, Request(settings)))
        self._hook(self.decoder.register_forward_pre_hook(self._note, with_kwargs=True))
        self._hook(self.decoder.register_forward_hook(self._leave, always_call=True))
        for name, method in (("generate", _generate), ("generate_batch", _generate_batch)):
            setattr(self.model, name, types.MethodType(method, self.model))
            self.undo.callback(delattr, self.model, name)

    def stats(self) -> Stats:
        record = getattr(self.last, "record", None)
        if record is None:
            raise InputError(
                "zipr1.stats: the model has not seen a prompt since it was made sparse, in this thread; call it first"
            )
        lengths, kept, settings = record
        if not isinstance(kept, torch.Tensor):
            kept = torch.stack([layer.counts for layer in kept.layers], dim=1).cpu()
        return Stats(lengths.cpu(), kept, settings)

    def _hook(self, handle: Any) -> None:
        self.undo.callback(handle.remove)

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        """One pass at a time: with kv: retain, hooks find the one under way where all threads see it."""
        me = threading.get_ident()
        if self.owner != me:  # it is where Ctrl-C ended a pass of this thread
            self.lock.acquire()
            self.owner = me

    def _leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if self.owner == threading.get_ident():
            self.owner = None
            self.lock.release()

    def _note(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Remember a prefill for `stats`: its record is filled as the layers run."""
        current, cache = (
            kwargs.get("zip_turn", kwargs.get("zip_pass")),
            kwargs.get("past_key_values"),
        )
        if current is not None:
            self.last.record = current.record.lengths, current.record, self.settings
            return
        if cache is not None and cache.get_seq_length() > 0:
            if isinstance(cache, (PrunedCache, RetainedCache)) and kwargs.get("zip_cache") is None:
                raise InputError(
                    "past_key_values were pruned and budget is 1.0: what was dropped is gone; go on at the budget they "
                    "were made with, or send the conversation again"
                )
            return
        embeds = kwargs.get("inputs_embeds")
        tokens = embeds if embeds is not None else kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2:
            lengths = mask.sum(1)
        else:
            lengths = torch.full((tokens.shape[0],), tokens.shape[1])
        kept = lengths.cpu()[:, None].repeat(1, len(self.decoder.layers))
        self.last.record = lengths, kept, self.settings

    def __deepcopy__(self, memo: Any) -> None:
        """A dense model's copy starts without one."""
        if self.settings is not None:
            raise InputError(
                "a sparse model cannot be copied: its hooks belong to the original; copy it outside of zipr1.sparse, "
                "or load it again"
            )

    def __reduce__(self) -> Any:
        if self.settings is not None:
            raise InputError(
                "a sparse model cannot be pickled; use model.save_pretrained, or zipr1 export"
            )
        return type(None), ()


def live_of(model: Any) -> Live:
    """The model's own `Live`, made when first asked for. peft's models stand for what they wrap.

    Raises InputError for a model of a family that is not handled.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    found = getattr(model, "__dict__", {}).get(ATTRIBUTE)
    if found is None:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        if kind not in FAMILIES or not hasattr(model, "generate"):
            raise InputError(
                f"the model is a {kind} ({type(model).__name__}); zipr1 handles the generating models of "
                f"{', '.join(FAMILIES)}"
            )
        found = Live(model)
        setattr(model, ATTRIBUTE, found)
    return found


@contextlib.contextmanager
def sparse(model: Any, settings: Sparse) -> Iterator[Any]:
    """`settings` in force inside the block, and what was in force before after it."""
    live = live_of(model)
    before = live.settings
    live.switch(settings)
    try:
        yield model
    finally:
        live.switch(before)


# Arguments of generate(), and of generation configs, that a pruned cache cannot serve.
ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' `generate` of a sparse model; what it cannot do is refused by name before anything runs."""
    live: Live = self.__dict__[ATTRIBUTE]
    whole = type(self).generate
    given = inspect.signature(whole).bind_partial(self, *args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    kwargs = _go_on(self, given, kwargs)
    if live.settings is not None and live.settings.p < 1:
        config = given.get("generation_config") or self.generation_config

        def asked(name: str) -> Any:
            return given[name] if given.get(name) is not None else getattr(config, name, None)

        trouble = _trouble(self, asked)
        if trouble:
            raise InputError(
                f"generate: {trouble}; leave it out, or answer densely inside zipr1.sparse(model, budget=1.0)"
            )
    return whole(self, *args, **kwargs)


# What a first turn brings along and a later one, whose cache knows it already, must not bring again.
PIXELS = ("pixel_values", "pixel_values_videos")
GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")


def _go_on(model: Any, given: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A later turn: the whole conversation came with its pictures, and the cache holds the first part of it.

    The pictures are taken out, and positions go on from where the conversation's own pictures put them:
    transformers remembers those of whichever conversation the model saw last.
    """
    cache = given.get("past_key_values")
    past = 0 if cache is None else cache.get_seq_length()
    if not past or not any(given.get(name) is not None for name in PIXELS):
        return kwargs
    ids, types = given.get("input_ids", given.get("inputs")), given.get("mm_token_type_ids")
    trouble = None
    if ids is None or types is None:
        trouble = "input_ids or mm_token_type_ids are missing; make the inputs with the processor"
    elif len(ids) > 1:
        trouble = f"{len(ids)} conversations cannot go on together, for their turns differ in length; take one"
    elif ids.shape[1] <= past:
        trouble = f"past_key_values hold {past} tokens and the conversation has {ids.shape[1]}; give all of its turns"
    elif bool(types[:, past:].any()):
        trouble = "a later turn brings a picture, and a cache in use takes text alone; leave past_key_values out"
    if trouble:
        raise InputError(f"generate: {trouble}")
    grids = {name: given[name] for name in GRIDS if given.get(name) is not None}
    _, model.model.rope_deltas = model.model.get_rope_index(
        ids, mm_token_type_ids=types, attention_mask=given.get("attention_mask"), **grids
    )
    return {name: value for name, value in kwargs.items() if name not in (*PIXELS, *GRIDS)}


def _trouble(model: Any, asked: Any) -> str | None:
    for name in ASSISTED:
        if asked(name):
            return f"assisted decoding ({name}) takes tokens back from the prompt, and a pruned cache has no way back"
    cache = asked("cache_implementation")
    if cache not in (None, "dynamic"):
        return f"cache_implementation={cache!r}: sparsity keeps its own cache, whose layers differ in length"
    if asked("prefill_chunk_size"):
        return "chunked prefill (prefill_chunk_size) shows a part of the prompt, and tokens are chosen among all of it"
    if asked("use_cache") is False:
        return "use_cache=False would choose tokens anew at every step, answers among them"
    # The older name is deprecated where the newer one exists.
    newer = getattr(model, "is_activation_checkpointing", None)
    if model.training and (model.is_gradient_checkpointing if newer is None else newer):
        return "gradient checkpointing in training mode makes transformers drop the cache; call model.eval() first"
    return None


def _generate_batch(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise InputError(
        "generate_batch: continuous batching has a paged cache of its own and does not work with sparsity; use "
        "generate() with a padded batch"
    )
