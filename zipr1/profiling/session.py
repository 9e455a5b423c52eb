"""What sparsity is worth for a model on this machine: counted by the card, measured beside dense, and never flattered.

Prompts of any length with exactly the wanted share of tokens kept, or a real picture or clip with what the model's own
p keeps. Dense and sparse take turns in one process; every row has its spread and its conditions.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch

from zipr1.core import activity, machine
from zipr1.core.errors import out_of_memory
from zipr1.core.text import reason
from zipr1.models import cost, memory
from zipr1.profiling import measure, rates, rows, subject
from zipr1.profiling.request import ProfileRequest, check
from zipr1.profiling.subject import Inputs, Subject

__all__ = ["ProfileRequest", "profile"]


def profile(request: ProfileRequest) -> dict[str, Any]:
    """profile.json. Raises InputError for what cannot be profiled."""
    check(request)
    activity.tell(f"opening {request.model}")
    built = subject.load(
        request.model, layers_of(request), request.device, request.dtype, request.probes
    )
    s = built.shape
    given = request.image is not None or request.video is not None
    synthetic = bool(request.lengths) or (built.policy is None and not given)
    keeps: Sequence[float | None] = request.keeps or ([0.25] if synthetic else [None])
    for keep in keeps:
        if keep is not None:
            cost.kept_tokens(1, keep)
    lengths = list(request.lengths) or default_lengths(built)
    cases: list[tuple[str, int, int]] = []
    for length in lengths if synthetic else [0]:
        for batch in request.batches:
            if synthetic:
                cost.layer(s, length, 1.0, "none", 1)  # is the length one that the model knows?
            cases.append((f"{length:,} tokens" if synthetic else "a real prompt", length, batch))
    tokens = max(lengths) if synthetic else 4096
    known = rates.measure(s, tokens, built.device, built.dtype, min(0.5, request.seconds))
    activity.tell("measuring what Python takes")
    python = {batch: measure.overhead_ms(built, batch) for batch in request.batches}
    found: list[rows.Row] = []
    for number, (name, length, batch) in enumerate(cases, start=1):
        what = f"{number} of {len(cases)}: {name}, batch {batch}"
        activity.tell(what)
        try:
            if synthetic:
                _check_memory(built, length, batch)
            inputs = built.random(length, batch) if synthetic else _real(request, built, batch)
            found += _case(built, inputs, keeps, known, python[batch], request, what)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            found.append(
                {"phase": "prefill", "length": length, "batch": batch, "error": reason(error, 160)}
            )
        gc.collect()
    return {
        "machine": {
            **machine.describe(device=str(built.device)),
            **known.row(),
        },
        "model": {
            "name": request.model,
            "weights": built.weights,
            "layers": s.layers,
            "all_layers": built.all_layers,
            "dtype": str(built.dtype).removeprefix("torch."),
            "probes": built.sparse.probes.recent + built.sparse.probes.random,
            "p": None if request.keeps or synthetic else built.sparse.p,
            "input": "random tokens" if synthetic else inputs_name(request),
            "counted": request.count,
        },
        "rows": found,
    }


def layers_of(request: ProfileRequest) -> int | None:
    """Decoder layers to build of a bundled config: those asked for; else 2 on a CPU, on a GPU all that fit."""
    if request.layers is not None or request.model not in cost.bundled():
        return request.layers
    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return 2
    s = cost.shape_of(request.model)
    size = 4 if request.dtype == "float32" else 2
    free = 0.6 * torch.cuda.mem_get_info(device)[0] - 2 * s.vocab * s.hidden * size
    return max(1, min(s.layers, int(free // (s.layer_weights * size))))


def default_lengths(built: Subject) -> list[int]:
    """Four lengths that take this device minutes, not hours."""
    wanted = (4096, 16384, 32768, 65536) if built.device.type == "cuda" else (512, 1024, 2048, 4096)
    return [n for n in wanted if n <= built.shape.limit] or [built.shape.limit]


def inputs_name(request: ProfileRequest) -> str:
    given = request.image or request.video
    return given.name if given is not None else "the embedded test clip with the longest prompt"


def _real(request: ProfileRequest, built: Subject, batch: int) -> Inputs:
    if request.image is not None or request.video is not None:
        return built.real(subject.given_prompt(request.image, request.video), batch)
    return built.real(built.longest_clip(), batch)


def _case(
    built: Subject,
    inputs: Inputs,
    keeps: Sequence[float | None],
    known: rates.Rates,
    python_ms: float,
    request: ProfileRequest,
    what: str,
) -> list[rows.Row]:
    taken = rows.take(built, inputs, keeps, request.seconds, request.count, what)
    seen = rows.vision(built, inputs, request.seconds)
    return rows.rows_of(built, inputs, taken, seen, known, python_ms)


def _check_memory(built: Subject, length: int, batch: int) -> None:
    """Raise MemoryError where a CPU would be killed instead: it hands out memory that it has not got."""
    if built.device.type != "cpu":
        return
    s = built.shape
    # The dense and the sparse cache are there at once, and what one layer makes.
    token = 2 * memory.cache_bytes(s, s.size) + memory.layer_bytes(s, s.size)
    need = length * batch * token
    free = machine.free_memory()
    if free is not None and need > 0.9 * free:
        raise MemoryError(
            f"needs about {need / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are free"
        )
