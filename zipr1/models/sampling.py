"""Prefill, decoding steps and sampling: the code that training, evaluation and profiling share.

Functions of a transformers model, what its decoder takes, and a run of `sparse_attention`; None, or a run without a
request, is dense. Not here: how prompts become the decoder's inputs (policy.py), and how long it all takes
(zipr1/profiling).

Shapes: B rows, L slots, T answer tokens, D decoder layers, V vocabulary.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zipr1.core.errors import RunError
from zipr1.models.decoding import Steps
from zipr1.models.sparse.cache import PrunedCache, kv_bytes
from zipr1.models.sparse.hybrid import Choosing, select_rows
from zipr1.models.sparse.last_layer import last_column, slots_of
from zipr1.models.sparse.patch import SparseRun, finished_at
from zipr1.models.sparse.record import Record
from zipr1.models.sparse.request import PromptBatch
from zipr1.models.transfer import fetch, send

# Where a pruned cache gets room for all tokens before the first step. It costs a CPU the reading of empty slots.
FIXED = {"cuda": True}
# What is told of logits that are not finite.
OUTGROWN = (
    "the model's logits are NaN or infinite, though its weights are finite: numbers between its layers outgrow "
    "its dtype; set model.dtype=float32, or bfloat16 in place of float16"
)


@dataclass
class Answers:
    """What `Policy.generate` gives, a list entry per answer. tokens `(T,)` with the end token if one came; logprobs
    `(T,)` float32. counts `(B, D)`: prompt tokens in the physical cache (None when dense). kept[b][d]: ascending int32
    positions in the unpadded prompt. record: what `kept` is made of, on the device, a row per prompt. probe_audit_mass:
    `(b,)` score mass that held-out probes give to kept tokens, of audited prompts, on the device. kv_bytes: of the
    prompts' keys and values. prefill_seconds: of the whole batch, where it was asked for."""

    tokens: list[torch.Tensor]
    logprobs: list[torch.Tensor]
    counts: torch.Tensor | None
    kept: list[list[torch.Tensor]] | None
    record: Record | None
    probe_audit_mass: torch.Tensor | None
    kv_bytes: int
    prefill_seconds: float | None = None


def prefill(
    model: Any,
    inputs: dict[str, Any],
    valid: torch.Tensor,
    run: SparseRun | None = None,
    *,
    prompt: torch.Tensor | None = None,
    read_at: torch.Tensor | None = None,
    cache: bool = True,
) -> tuple[torch.Tensor, Any]:
    """One pass over prompts, or over prompts and their answers.

    Args:
        inputs: of the text decoder, `inputs_embeds` `(B, L, hidden)` among them.
        valid: `(B, L)` bool, False for padding; on the CPU, as all masks here. With a cache padding is on the left, and
            is masked; without one it is on the right, where causality alone hides it from every real token and no mask
            is built.
        run: sparse inside its block; only tokens of `prompt` `(B, L)` bool (None: all real ones) may be dropped.
        read_at: `(B, L)` bool, where the output is read; the last layer is finished there alone, unless a dense pass
            keeps a gradient. What is returned elsewhere means nothing. None: everywhere.

    Returns:
        Hidden states `(B, L, hidden)` after the last norm, and the cache of keys and values, or None.
    """
    decoder = model.get_decoder()
    if run is not None and run.request is not None:
        assert run.in_force, "the block of sparse_attention that this run belongs to has ended"
        batch = PromptBatch(valid, prompt, read_at)
        held = PrunedCache(Choosing.of(decoder)) if cache else None
        out = decoder(**inputs, sparse_batch=batch, past_key_values=held, use_cache=cache)
        return out.last_hidden_state, held
    device = inputs["inputs_embeds"].device
    narrow = contextlib.nullcontext()
    if read_at is not None and not torch.is_grad_enabled():
        narrow = finished_at(model, slots_of(read_at, device))  # type: ignore[assignment]
    mask = None if not cache or bool(valid.all()) else send(device, valid.long())[0]
    with narrow:
        out = decoder(**inputs, attention_mask=mask, use_cache=cache)
    return out.last_hidden_state, out.past_key_values if cache else None


def decode_step(
    model: Any, inputs: dict[str, Any], cache: Any, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """Hidden states `(B, n, hidden)` of n more tokens of each row, whose keys and values join the cache.

    Inside the run's block, if the cache is a pruned one. inputs: of the text decoder. valid: `(B, past + n)` bool of a
    dense cache, on the CPU; None: nothing is padding, or the cache is a pruned one, which knows.
    """
    mask = None
    if valid is not None and not bool(valid.all()):
        # A single token sees all that is real. A mask of four dimensions transformers takes as it is; in another it
        # looks for padding, and a GPU is waited for with every token.
        single = inputs["inputs_embeds"].shape[1] == 1
        seen = valid[:, None, None] if single else valid.long()
        (mask,) = send(inputs["inputs_embeds"].device, seen)
    out = model.get_decoder()(**inputs, attention_mask=mask, past_key_values=cache, use_cache=True)
    hidden: torch.Tensor = out.last_hidden_state
    return hidden


@torch.no_grad()
def sample(
    model: Any,
    inputs: dict[str, Any],
    valid: torch.Tensor,
    run: SparseRun,
    *,
    head: Callable[[torch.Tensor], torch.Tensor],
    positions: Callable[[torch.Tensor], torch.Tensor],
    end_ids: Sequence[int],
    max_new_tokens: int,
    uniforms: torch.Tensor | None = None,
    temperature: float = 1.0,
    greedy: torch.Tensor | None = None,
    timed: bool = False,
    owner: torch.Tensor | None = None,
) -> Answers:
    """Prefill of left-padded prompts, then a token of every answer at a time, until all have ended.

    Args:
        head: hidden states `(B, hidden)` -> float32 logits `(B, V)`.
        positions: number of a decoding step `(1,)`, from 0 -> `position_ids` of its tokens.
        uniforms: `(B, >= max_new_tokens)` in [0, 1): row b samples its t-th token by inverse CDF of uniforms[b, t], so
            that what a row samples does not depend on its batch. None: all rows are greedy.
        greedy: `(B,)` bool, rows that take the likeliest token all the same.
        timed: give `prefill_seconds`, for which a GPU is waited for once more.
        owner: `(B,)` int64 on the CPU, which of the prompts each answer is to; their cache's rows are repeated for it.
            None: one answer to each.

    Raises RunError where the model's output is not finite, which would pass for a wrong answer.
    """
    began = time.perf_counter()
    states, cache = prefill(model, inputs, valid, run, read_at=last_column(valid))
    if timed and states.device.type == "cuda":
        torch.cuda.synchronize(states.device)
    prefilled = time.perf_counter() - began
    hidden = states[:, -1]
    dense = run.request is None
    counts = None if dense else cache.prompt_counts()
    kept = None if run.record is None else run.record.kept_positions()
    held = kv_bytes(cache)
    if owner is not None:
        (index,) = send(hidden.device, owner)
        select_rows(cache, index)
        hidden, valid = hidden[index], valid[owner]
        counts = None if counts is None else counts[index]
        kept = None if kept is None else [kept[i] for i in owner.tolist()]
    rows = len(valid)
    fixed = not dense and FIXED.get(hidden.device.type, False)
    if fixed:
        cache.reserve(max_new_tokens)

    def advance(choice: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        nonlocal valid
        if dense:
            valid = torch.cat([valid, valid.new_ones(rows, 1)], dim=1)
        following = {
            "inputs_embeds": model.get_input_embeddings()(choice[:, None]),
            "position_ids": positions(step),
        }
        return decode_step(model, following, cache, valid if dense else None)[:, -1]

    steps = Steps(
        rows, max_new_tokens, hidden.device, head=head, advance=advance, end_ids=end_ids,
        uniforms=uniforms, temperature=temperature, greedy=greedy,
    )  # fmt: skip
    made = steps.run(hidden, fixed)
    tokens, logprobs, real, *besides = fetch(
        steps.tokens[:, :made],
        steps.logprobs[:, :made],
        steps.real[:, :made],
        *([] if counts is None else [counts]),
    )
    _check_finite(logprobs[real])
    lengths = real.sum(1).tolist()
    return Answers(
        tokens=[tokens[b, :n] for b, n in enumerate(lengths)],
        logprobs=[logprobs[b, :n] for b, n in enumerate(lengths)],
        counts=besides[0] if besides else None,
        kept=kept,
        record=run.record,
        probe_audit_mass=None if run.record is None else run.record.probe_audit_mass(),
        kv_bytes=held,
        prefill_seconds=prefilled if timed else None,
    )


def _check_finite(values: torch.Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise RunError(OUTGROWN)
