"""Every swapped forward, method and setting of a transformers model, and how it is undone: the only file that swaps.

`sparse_attention` makes a model's forward passes and `generate` sparse inside a `with` block:

* the text decoder's forward starts each pass: it makes the pass's `SparseContext` (context.py), which transformers
  hands on to every layer's attention as a keyword, and swaps a pruned cache in;
* decoder layers choose before they run, if they are to be skipped whole (layer_skip.py);
* output projections and MLPs work on the tokens that the attention of their layer has named;
* norms are torch's own (norms.py), and features are added to the first layers' output by index;
* layers of linear attention work as they do, beside those that choose (hybrid.py).

Changes are attributes of single module objects, so other models are not touched, and all are gone when the block ends;
`features_at_slots` alone is there for good in the decoder of a `Policy` (policy.py), whose dense passes want it too.
With gradient checkpointing, run backward inside the block: layers are computed again there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.nn.modules import module as everywhere

from zipr1.core.errors import InputError
from zipr1.models.sparse import arguments, context
from zipr1.models.sparse.attention import ATTENTION
from zipr1.models.sparse.context import DecoderCall, Prefill, SparseContext
from zipr1.models.sparse.hybrid import Choosing, check_skip, reading_all
from zipr1.models.sparse.last_layer import finished, slots_of
from zipr1.models.sparse.layer_skip import skipping
from zipr1.models.sparse.norms import norms
from zipr1.models.sparse.packing import Handover, computed_at
from zipr1.models.sparse.record import Record
from zipr1.models.sparse.request import PromptBatch, Request

# Method of a decoder that adds features to the output of its first layers.
ADDING = "_deepstack_process"

# How a pass starts: `context.begin`, or `retain.begin` where conversations lose nothing.
Begin = Callable[[Request, DecoderCall, Handover, Choosing], tuple[SparseContext, Any]]


class SparseRun:
    """What `sparse_attention` yields. request: None where the passes inside are dense. record: what the last prefill
    kept; None before the first one, and where passes are dense. in_force: inside its block."""

    def __init__(self, request: Request | None) -> None:
        self.request = request
        self.record: Record | None = None
        self.in_force = False
        self.handover = Handover()


@contextlib.contextmanager
def sparse_attention(
    model: Any, request: Request | None, begin: Begin = context.begin
) -> Iterator[SparseRun]:
    """Make forward passes and `generate()` of a transformers model sparse; with None, or where `request` keeps
    everything, they stay dense.

    The model's text config must use the attention named `ATTENTION`. Blocks of one model may be nested, and the inner
    one counts; for blocks that overlap otherwise, and for threads, see session.py.
    """
    run = SparseRun(None if request is None or request.keeps_all else request)
    with contextlib.ExitStack() as undo:
        if run.request is not None:
            _patch(model, run, begin, undo)
        run.in_force = True
        undo.callback(setattr, run, "in_force", False)
        yield run


def _patch(model: Any, run: SparseRun, begin: Begin, undo: contextlib.ExitStack) -> None:
    decoder = model.get_decoder()
    arguments.check_config(decoder.config)
    if run.request is not None:
        check_skip(run.request.settings, decoder)
    undo.enter_context(attributes(decoder, forward=_passes(run, decoder, begin)))
    undo.enter_context(attributes(decoder, **features_at_slots(decoder)))
    choosing = Choosing.of(decoder)
    for number, layer in enumerate(decoder.layers):
        for norm, forward in norms(layer):
            undo.enter_context(attributes(norm, forward=forward))
        if number not in choosing.place:
            linear = layer.linear_attn
            undo.enter_context(attributes(linear, forward=reading_all(linear.forward)))
            continue
        undo.enter_context(attributes(layer, forward=skipping(layer, layer.forward)))
        for name, module in (("o_proj", layer.self_attn.o_proj), ("mlp", layer.mlp)):
            rows = _rows_of(run, number, name)
            undo.enter_context(attributes(module, forward=computed_at(module.forward, rows)))


def _passes(run: SparseRun, decoder: Any, begin: Begin) -> Callable[..., Any]:
    """The decoder's forward, which starts a context. sparse_batch: what the caller knows of the batch."""
    stock, request, layers = decoder.forward, run.request, Choosing.of(decoder)
    assert request is not None

    def forward(*args: Any, sparse_batch: PromptBatch | None = None, **kwargs: Any) -> Any:
        run.handover.clear()
        if "sparse_context" in kwargs:  # a block inside this one has started the pass
            return stock(*args, **kwargs)
        kwargs = arguments.named(decoder, args, kwargs)
        attention = decoder.config._attn_implementation
        if attention != ATTENTION:  # another one would read the mask below, and see every token
            raise InputError(
                f"the model's attention was changed to {attention!r} while it is sparse; change it outside of "
                "zipr1.sparse, or load the model again"
            )
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        if embeds is None:
            embeds = kwargs.get("input_ids")
        if embeds is None:
            return stock(**kwargs)  # which says that one of them is missing
        arguments.check(
            decoder, kwargs, request.settings.kv == "retain", ours=sparse_batch is not None
        )
        call = DecoderCall(
            embeds=embeds,
            cache=kwargs.get("past_key_values"),
            use_cache=bool(kwargs.get("use_cache")),
            real=None if mask is None else mask[:, -embeds.shape[1] :].bool(),
            batch=sparse_batch,
        )
        there = request.settled(decoder.embed_tokens.weight)
        current, cache = begin(there, call, run.handover, layers)
        if layers.config is not None:
            current.padding = call.padding
        if current.record is not None:
            run.record = current.record
        changed = {
            "past_key_values": cache,
            "sparse_context": current,
            # The context knows the padding. A mask of four dimensions is one that transformers takes as it is, so that
            # none is built; nobody reads it.
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeds.device),
        }
        if (
            isinstance(current, Prefill)
            and request.settings.skip == "layer"
            and _unseen(decoder, kwargs)
        ):
            current.own = True
            if kwargs.get("inputs_embeds") is not None:  # they are the caller's
                changed["inputs_embeds"] = kwargs["inputs_embeds"].clone(
                    memory_format=torch.contiguous_format
                )
        shown = kwargs.get("visual_pos_masks")
        if shown is not None and shown.dtype == torch.bool and hasattr(decoder, ADDING):
            changed["visual_pos_masks"] = slots_of(shown, embeds.device)
        out = stock(**{**kwargs, **changed})
        arguments.remember(kwargs, cache)
        return out

    return forward


def _unseen(decoder: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether nobody but the next layer sees what a layer is given, so that it may be written over: no gradient is
    wanted, nobody has hung up hooks, and no hidden states are asked for, which transformers collects by hooks that it
    may hang up later in this pass."""
    asked = kwargs.get("output_hidden_states")
    if torch.is_grad_enabled() or (decoder.config.output_hidden_states if asked is None else asked):
        return False
    return not (
        everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or any(module._forward_hooks or module._forward_pre_hooks for module in decoder.modules())
    )


def features_at_slots(decoder: Any) -> dict[str, Callable[..., torch.Tensor]]:
    """An attribute for a decoder that adds features to its first layers' output (deepstack), none for others: there
    `visual_pos_masks` may be slots `(n,)` int64 of the flattened batch. Of a mask `(B, L)` bool, as transformers' own
    code has it, a GPU is waited for twice a layer, for the number of its tokens."""
    stock = getattr(decoder, ADDING, None)
    if stock is None:
        return {}

    def add(hidden: torch.Tensor, where: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        if where.dtype == torch.bool:
            mixed: torch.Tensor = stock(hidden, where, features)
            return mixed
        flat = hidden.flatten(0, 1)
        return flat.index_add(0, where, features.to(flat)).view_as(hidden)

    return {ADDING: add}


def _rows_of(run: SparseRun, layer: int, name: str) -> Callable[[], torch.Tensor | None]:
    def rows() -> torch.Tensor | None:
        at: torch.Tensor | None = getattr(run.handover.find(layer), name)
        return at

    return rows


@contextlib.contextmanager
def finished_at(model: Any, slots: torch.Tensor) -> Iterator[None]:
    """Inside, a dense prefill finishes the last layer at `slots` of the flattened batch alone (last_layer.py); what it
    returns elsewhere means nothing. Without gradient: layers could be computed again in backward, when the patch is
    gone."""
    layer, rows = model.get_decoder().layers[-1], finished(slots)
    if not hasattr(
        layer, "self_attn"
    ):  # linear attention hands its state on before anything is left out
        with attributes(layer.mlp, forward=computed_at(layer.mlp.forward, lambda: rows.mlp)):
            yield
        return
    with (
        attributes(
            layer.self_attn.o_proj,
            forward=computed_at(layer.self_attn.o_proj.forward, lambda: rows.o_proj),
        ),
        attributes(layer.mlp, forward=computed_at(layer.mlp.forward, lambda: rows.mlp)),
    ):
        yield


@contextlib.contextmanager
def our_attention(model: Any) -> Iterator[None]:
    """Inside, the text part of a model uses the attention named `ATTENTION`."""
    before = model.config.get_text_config()._attn_implementation
    if before == ATTENTION:
        yield
        return
    model.set_attn_implementation({"text_config": ATTENTION})
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": before})


@contextlib.contextmanager
def attributes(target: Any, **values: Any) -> Iterator[None]:
    """Inside, an object has these attributes of its own; afterwards those of its own that it had, or its class's."""
    own = {name: target.__dict__[name] for name in values if name in target.__dict__}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name in values:
            if name in own:
                setattr(target, name, own[name])
            else:
                target.__dict__.pop(name, None)
