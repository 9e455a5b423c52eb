"""What a text decoder may be called with while it is sparse; everything else that changes a dense pass is refused here.

A sparse pass has an attention of its own. Of the masks that transformers takes it reads the one of padding, `(B, L)`,
and it sees a row as one causal sequence. Not here: arguments of `generate` (generate.py).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from zipr1.core.errors import InputError
from zipr1.models.sparse.cache import PrunedCache
from zipr1.models.sparse.retain import RetainedCache

# What a sparse pass reads, or hands to code of transformers that reads it as in a dense pass.
READ = (
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache",
    "output_hidden_states", "return_dict", "visual_pos_masks", "deepstack_visual_embeds",
)  # fmt: skip
# What transformers' attentions read, and a sparse one does not. Of `is_causal` only False is another attention.
REFUSED = {
    "output_attentions": "a sparse pass makes no matrix of attention weights",
    "cu_seq_lens_q": "packed sequences are not taken apart",
    "cu_seq_lens_k": "packed sequences are not taken apart",
    "max_length_q": "packed sequences are not taken apart",
    "max_length_k": "packed sequences are not taken apart",
    "seq_idx": "packed sequences are not taken apart",
    "block_sequence_ids": "tokens see those before them, never those behind",
    "position_bias": "a sparse attention adds nothing to its scores",
    "softcap": "a sparse attention does not cap its scores",
    "s_aux": "a sparse attention has no sinks",
    "sliding_window": "a sparse attention reaches all kept tokens",
    "cache": "a paged cache is not read",
}
# Of a cache that a pass has swapped for its own.
_SWAPPED = "_zipr1_swapped"
# Of a cache in use: the mask of padding that its last pass was given, `(B, seen)` bool.
_MASK = "_zipr1_mask"


def named(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of a decoder's own forward by name."""
    if not args:
        return kwargs
    _, *names = inspect.signature(type(decoder).forward).parameters  # without self
    return {**dict(zip(names, args, strict=False)), **kwargs}


def check_config(config: Any) -> None:
    """Raise InputError for a text config whose layers do not see all tokens before them. config: of the decoder."""
    known = {"full_attention", "linear_attention"}  # the second chooses nothing (hybrid.py)
    kinds = set(getattr(config, "layer_types", None) or known) - known
    if not kinds and getattr(config, "layer_types", None) is None:
        kinds = {n for n in ("sliding_window", "attention_chunk_size") if getattr(config, n, None)}
    if kinds:
        raise _refused(
            f"the model has layers of {', '.join(sorted(kinds))} (config.json), whose tokens see only some of those "
            "before them"
        )


def check(decoder: Any, call: dict[str, Any], retains: bool, ours: bool) -> None:
    """Raise InputError for an argument of a decoder's call that a sparse pass would pass over.

    call: all arguments by name. retains: `kv: retain`. ours: the caller says by itself what is padding
    (`sparse_batch`).
    """
    for name, why in REFUSED.items():
        value = call.get(
            name, getattr(decoder.config, name, None) if name == "output_attentions" else None
        )
        if value is not None and value is not False:
            raise _refused(f"{name}: {why}")
    if call.get("is_causal") is False or getattr(decoder.config, "is_causal", True) is False:
        raise _refused("is_causal=False: tokens see those before them, never those behind")
    if decoder.training and getattr(decoder.config, "attention_dropout", 0.0):
        raise _refused(
            f"attention_dropout={decoder.config.attention_dropout} in training mode: a sparse attention drops no "
            "weights; set it to 0 in the config, or call model.eval()"
        )
    mask, cache = call.get("attention_mask"), call.get("past_key_values")
    tokens = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]
    past = 0 if cache is None else int(cache.get_seq_length())
    if not past and getattr(cache, _SWAPPED, False):
        raise _refused(
            "past_key_values: the keys of an earlier pass are not in this cache, but in the one that the pass "
            "returned; go on with past_key_values of its output"
        )
    if past and not isinstance(cache, RetainedCache if retains else PrunedCache):
        return  # a cache that is refused as a whole (context.py, retain.py)
    if mask is not None:
        _check_mask(mask, past, tuple(tokens.shape[:2]), getattr(cache, _MASK, None))
    elif not past and not ours and tokens.shape[1] > 1:
        _check_positions(call.get("position_ids"))


def prompt_lengths(call: dict[str, Any]) -> torch.Tensor:
    """`(B,)` int64 on the CPU: prompt tokens of each row of a dense pass, for which a mask may have any form.

    Of a mask of four dimensions, which `generate` makes for caches of a fixed size, they are what the last token sees.
    """
    tokens = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]
    mask = call.get("attention_mask")
    if isinstance(mask, dict):  # by kind of layer
        mask = mask.get("full_attention")
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        last = mask[:, 0, -1]
        mask = last if mask.dtype == torch.bool else last == 0
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return torch.full((tokens.shape[0],), tokens.shape[1])
    return mask.bool().sum(1).cpu().expand(tokens.shape[0])


def remember(call: dict[str, Any], cache: Any) -> None:
    """Keep what `check` compares a later pass with. cache: what the pass went on with in place of the call's."""
    given, mask = call.get("past_key_values"), call.get("attention_mask")
    if given is not None and cache is not given:
        setattr(given, _SWAPPED, True)
    if cache is not None and mask is not None:
        setattr(cache, _MASK, mask.bool())


def _check_mask(mask: Any, past: int, shape: tuple[int, int], before: torch.Tensor | None) -> None:
    """Raise InputError unless it is one of padding, `(B, past + q)`, that says of the past what was said before."""
    rows, new = shape
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        what = f"a {type(mask).__name__}"
        if isinstance(mask, torch.Tensor):
            what = f"a tensor of {mask.ndim} dimensions {tuple(mask.shape)}"
        raise _refused(f"attention_mask: {what}; allowed: a mask of padding (rows, tokens)")
    if tuple(mask.shape) != (rows, past + new):
        raise _refused(
            f"attention_mask: {tuple(mask.shape)}; allowed here: {(rows, past + new)}, of {past} tokens in the cache "
            f"and {new} new ones"
        )
    if before is None or not past or len(before) != rows:
        return
    both = min(past, before.shape[1])
    if not torch.equal(mask[:, :both].bool(), before[:, :both].to(mask.device)):
        raise _refused(
            "attention_mask: says of tokens in the cache what it did not say when they came; they can be masked in "
            "their own pass alone"
        )


def _check_positions(positions: torch.Tensor | None) -> None:
    """Raise InputError where transformers would see several sequences in a row: text positions not going up by 1."""
    if positions is None or (positions.ndim == 3 and positions.shape[0] != 4) or positions.ndim > 3:
        return
    text = positions[0] if positions.ndim == 3 else positions
    if bool((text.diff(dim=-1) != 1).any()):
        raise _refused(
            "position_ids: restart or jump within a row, as those of packed sequences; a row is one sequence here, so "
            "give each a row of its own (and an attention_mask of padding)"
        )


def _refused(what: str) -> InputError:
    return InputError(
        f"sparse attention: {what}; or run it dense, inside zipr1.sparse(model, budget=1.0)"
    )
