"""Sparsity of a transformers model in memory: `zipr1.load`, `zipr1.sparse` and `zipr1.stats` stand on this.

A `SparseSession` belongs to one model object. Each block (`with zipr1.sparse(...)`, or `zipr1.load`, whose block never
ends) puts a token on its stack; the settings of the token on top are in force. A block that ends takes its own token
away, wherever in the stack it is, and the last one leaves the model as it was before the first.

Threads: the stack is the model's, so all threads that share a model run under the settings in force, whichever thread
began the block; a block that begins or ends waits for the pass under way. Passes of one model take turns. An answer
under way when the settings change goes on under the new ones, if its cache allows it. A pass that began before the
first block is not waited for: it ends dense. `stats` are each thread's own.
"""

from __future__ import annotations

import contextlib
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from zipr1.core.errors import InputError
from zipr1.core.recipe import Sparse
from zipr1.models.families import FAMILIES
from zipr1.models.sparse import arguments, context, generate, retain
from zipr1.models.sparse.cache import PrunedCache
from zipr1.models.sparse.hybrid import Choosing
from zipr1.models.sparse.patch import SparseRun, attributes, our_attention, sparse_attention
from zipr1.models.sparse.record import Record
from zipr1.models.sparse.request import Request, settled
from zipr1.models.sparse.retain import RetainedCache

# Of a sparse model: its `InForce`.
ATTRIBUTE = "_zipr1"


@dataclass(frozen=True)
class Stats:
    """What the last prefill kept. lengths: `(B,)` prompt tokens of each row; kept: `(B, D)` of them kept in each
    layer that chooses; both int64 on the CPU. Beams and returned sequences are rows of their own. settings: in force
    then."""

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
        below = self.settings.dense_below or 0
        short = int((self.lengths < below).sum())
        if short and self.settings.p < 1:
            text += f"; {short} stayed dense, being shorter than dense_below = {below}"
        return text


class Block:
    """The token of one block; two of the same settings are two."""

    def __init__(self, settings: Sparse) -> None:
        self.settings = settings


@dataclass
class InForce:
    """A sparse model's own attribute: the block that it is patched for, and how that is undone."""

    block: Block
    undo: contextlib.ExitStack

    @property
    def settings(self) -> Sparse:
        return self.block.settings


def _refuse_copy(memo: Any) -> None:
    raise InputError(
        "a sparse model cannot be copied: its hooks belong to the original; copy it outside of zipr1.sparse, "
        "or load it again"
    )


def _refuse_pickle(protocol: Any) -> None:
    raise InputError("a sparse model cannot be pickled; use model.save_pretrained, or zipr1 export")


class SparseSession:
    """The sparsity of one model. It knows the model weakly, so that a sparse model that nobody uses is freed."""

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)
        self._blocks: list[Block] = []
        # Held by the thread whose pass is under way, and while settings change.
        self._guard = threading.RLock()
        # What each thread's last prefill kept. Read and written here alone.
        self._last = threading.local()

    @property
    def settings(self) -> Sparse | None:
        """Those in force; None: the model is what it was."""
        top = self._blocks[-1:]  # in one step, for another thread may end a block
        return top[0].settings if top else None

    def enter(self, settings: Sparse) -> Block:
        """Begin a block; `leave` takes what it gives."""
        block = Block(settings)
        with self._guard:
            self._blocks.append(block)
            try:
                self._apply()
            except BaseException:
                self.leave(block)
                raise
        return block

    def leave(self, block: Block) -> None:
        """End a block; others, older or newer, go on."""
        with self._guard:
            self._blocks.remove(block)
            self._apply()

    def stats(self) -> Stats:
        """Of the last prompt that this thread showed to the model. Raises InputError if there is none."""
        last = getattr(self._last, "prefill", None)
        if last is None:
            raise InputError(
                "zipr1.stats: the model has not seen a prompt since it was made sparse, in this thread; call it first"
            )
        found, settings = last
        if isinstance(found, Record):
            kept = torch.stack([layer.counts for layer in found.layers], dim=1).cpu()
            return Stats(found.lengths.cpu(), kept, settings)
        lengths, layers = found
        return Stats(lengths, lengths[:, None].repeat(1, layers), settings)

    def _apply(self) -> None:
        """Patch the model for the block on top, unless it is already; the only place that does."""
        model = self._model()
        if model is None:  # its last block ends with nobody left to see it
            return
        top = self._blocks[-1] if self._blocks else None
        before: InForce | None = model.__dict__.get(ATTRIBUTE)
        if (None if before is None else before.block) is top:
            return
        if before is not None:
            before.undo.close()
        if top is None:
            return
        request = Request(top.settings)
        begin = retain.begin if top.settings.kv == "retain" else context.begin
        with contextlib.ExitStack() as undo:
            if not request.keeps_all:
                undo.enter_context(our_attention(model))
            run = undo.enter_context(sparse_attention(model, request, begin))
            decoder = model.get_decoder()
            passes = self._passes(run, decoder, top.settings)
            undo.enter_context(attributes(decoder, forward=passes))
            in_force = InForce(top, contextlib.ExitStack())
            own = {
                "generate": types.MethodType(generate.checked(model.generate, top.settings), model),
                "__deepcopy__": _refuse_copy,
                "__reduce_ex__": _refuse_pickle,
                ATTRIBUTE: in_force,
            }
            if not request.keeps_all:
                own["generate_batch"] = types.MethodType(generate.refused_batch, model)
            undo.enter_context(attributes(model, **own))
            in_force.undo = undo.pop_all()

    def _passes(self, run: SparseRun, decoder: Any, settings: Sparse) -> Callable[..., Any]:
        """The decoder's forward: one pass at a time, and what it kept is remembered for `stats`."""
        stock = decoder.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            kwargs = arguments.named(decoder, args, kwargs)
            with self._guard:
                if not run.in_force:  # the settings changed while this pass waited for its turn
                    return decoder.forward(**kwargs)
                if "sparse_context" in kwargs:  # a `sparse_attention` inside this block counts
                    return stock(**kwargs)
                cache = kwargs.get("past_key_values")
                # int: a cache of a fixed size counts in a tensor, which the pass changes.
                past = 0 if cache is None else int(cache.get_seq_length())
                if past and run.request is None and isinstance(cache, (PrunedCache, RetainedCache)):
                    raise InputError(
                        "past_key_values were pruned and budget is 1.0: what was dropped is gone; go on at the budget "
                        "they were made with, or send the conversation again"
                    )
                run.record = None
                out = stock(**kwargs)
                then = settled(settings, decoder.embed_tokens.weight)
                if run.record is not None:
                    self._last.prefill = run.record, then
                elif not past:
                    lengths = arguments.prompt_lengths(kwargs)
                    self._last.prefill = (lengths, len(Choosing.of(decoder).numbers)), then
                return out

        return forward


_sessions: weakref.WeakKeyDictionary[Any, SparseSession] = weakref.WeakKeyDictionary()
_sessions_lock = threading.Lock()


def session_of(model: Any) -> SparseSession:
    """The model's own `SparseSession`, made when first asked for. peft's models stand for what they wrap.

    Raises InputError for a model of a family that is not handled.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in FAMILIES or not hasattr(model, "generate"):
        raise InputError(
            f"the model is a {kind} ({type(model).__name__}); zipr1 handles the generating models of "
            f"{', '.join(FAMILIES)}"
        )
    with _sessions_lock:
        if model not in _sessions:
            _sessions[model] = SparseSession(model)
        return _sessions[model]


@contextlib.contextmanager
def sparse(model: Any, settings: Sparse) -> Iterator[Any]:
    """A block: `settings` in force inside, unless a newer block is."""
    session = session_of(model)
    block = session.enter(settings)
    try:
        yield model
    finally:
        session.leave(block)
