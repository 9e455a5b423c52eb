"""`generate` of a model that is sparse: what it refuses by name, and later turns of a conversation.

Sampling, beams and streaming are transformers' own. Refused is what a pruned cache cannot serve.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NoReturn

from zipr1.core.errors import InputError
from zipr1.core.recipe import Sparse
from zipr1.models.families import FAMILIES

# Arguments of generate(), and of generation configs, that a pruned cache cannot serve.
ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


def checked(stock: Callable[..., Any], settings: Sparse) -> Callable[..., Any]:
    """A model's `generate` under `settings`; stock: what it is otherwise, bound to the model. What it cannot do is
    refused by name before anything runs."""

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(stock).bind_partial(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        kwargs = _go_on(self, given, kwargs)
        if settings.p < 1:
            config = given.get("generation_config") or self.generation_config

            def asked(name: str) -> Any:
                return given[name] if given.get(name) is not None else getattr(config, name, None)

            trouble = _trouble(self, asked)
            if trouble:
                raise InputError(
                    f"generate: {trouble}; leave it out, or answer densely inside zipr1.sparse(model, budget=1.0)"
                )
        return stock(*args, **kwargs)

    return generate


def refused_batch(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
    """In place of `generate_batch`."""
    raise InputError(
        "generate_batch: continuous batching has a paged cache of its own and does not work with sparsity; use "
        "generate() with a padded batch"
    )


# What a first turn brings along and a later one, whose cache knows it already, must not bring again.
PIXELS = ("pixel_values", "pixel_values_videos")
GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
SIZES = ("image_sizes", "batch_num_images", "pixel_attention_mask")


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
    mrope = FAMILIES[model.config.model_type].mrope
    if ids is not None and not mrope:
        types = ids == model.config.image_token_id
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
    if mrope:
        grids = {name: given[name] for name in GRIDS if given.get(name) is not None}
        _, model.model.rope_deltas = model.model.get_rope_index(
            ids, mm_token_type_ids=types, attention_mask=given.get("attention_mask"), **grids
        )
    return {k: value for k, value in kwargs.items() if k not in (*PIXELS, *GRIDS, *SIZES)}


def _trouble(model: Any, asked: Callable[[str], Any]) -> str | None:
    """Why the arguments that were `asked` for cannot be served, or None."""
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
