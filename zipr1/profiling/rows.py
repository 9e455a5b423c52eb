"""From measured times to the rows of profile.json: a number, its spread, what it is compared with, and its bound.

`bound` is what this machine could gain at most: the work that the card counts, at the rates of its own products, its
own dense attention and its own copies. `bound_counted` is the same at one rate for everything.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from zipr1_kernels import use

from zipr1.core import activity
from zipr1.models import cost
from zipr1.profiling import measure
from zipr1.profiling.counting import memory, operations
from zipr1.profiling.measure import Spread, Variant
from zipr1.profiling.rates import Rates, wait
from zipr1.profiling.subject import Inputs, Subject

Row = dict[str, Any]

# Of a sparse layer, what sparsity adds: choosing, moving rows and what Python does in between (and rotary embedding and
# residual sums, which nothing tells apart from it).
OVERHEAD = ("selection", "gathers", "other")


@dataclass
class Measurement:
    """Everything that was measured of one variant. keep: realised. flops, step_flops: 0 where not counted."""

    variant: Variant
    keep: float
    parts: dict[str, Spread]
    phases: dict[str, float]
    step: Spread
    kv_bytes: int
    peak_bytes: int
    flops: int = 0
    step_flops: int = 0


def take(
    subject: Subject,
    inputs: Inputs,
    keeps: Sequence[float | None],
    seconds: float,
    count: bool,
    what: str = "timing",
) -> list[Measurement]:
    """Dense first, then each keep ratio with each way to skip. count: operations too. Each `seconds` a variant.

    what: told to who waits.
    """
    activity.tell(f"{what}: warming up")
    variants = [measure.fastest_dense(subject, inputs)]
    for keep in keeps:
        for skip in ("attention", "layer"):
            variants.append(measure.sparse_variant(subject, inputs, skip, keep))
    times = measure.turns(
        [lambda v=v: measure.prefill(subject, inputs, v)[0] for v in variants],  # type: ignore[misc]
        seconds,
        f"{what}: prefill, turn",
    )
    activity.tell(f"{what}: prefill by phase")
    phases = measure.by_phase(subject, inputs, variants)
    steps = measure.decoding(subject, inputs, variants, seconds, f"{what}: decoding, turn")
    activity.tell(f"{what}: memory")
    out = []
    for variant, parts, by_phase, (step, size) in zip(variants, times, phases, steps, strict=True):
        with memory(subject.device) as used:
            measure.prefill(subject, inputs, variant)
        one = Measurement(variant, realised(variant), parts, by_phase, step, size, int(used.peak))
        if count:
            one.flops, one.step_flops = counted(subject, inputs, variant)
        out.append(one)
    return out


def realised(variant: Variant) -> float:
    return 1.0 if variant.record is None else float(variant.record.token_ratio().mean())


def counted(subject: Subject, inputs: Inputs, variant: Variant) -> tuple[int, int]:
    """Operations of the decoder in a prefill, and of a decoding step with its logits."""
    with use("torch"):
        with operations() as prefill:
            _, cache = measure.prefill(subject, inputs, variant)
        step = measure.stepper(subject, inputs, variant, cache)
        with operations() as one:
            step()
    logits = 2 * inputs.batch * subject.shape.hidden * subject.shape.vocab
    return prefill.flops - logits, one.flops


def vision(subject: Subject, inputs: Inputs, seconds: float) -> Spread | None:
    """Milliseconds of the tower for one prompt; None without pictures."""
    see = inputs.see
    if see is None:
        return None

    def run() -> dict[str, float]:
        wait(subject.device)
        start = time.perf_counter()
        with torch.no_grad():
            see()
        wait(subject.device)
        return {"vision": time.perf_counter() - start}

    return measure.turns([run], seconds, "timing the vision tower: turn")[0]["vision"]


def rows_of(
    subject: Subject,
    inputs: Inputs,
    measurements: Sequence[Measurement],
    seen: Spread | None,
    rates: Rates,
    python_ms: float,
) -> list[Row]:
    """All rows of one length and batch. measurements: dense first. seen: the tower's times, None without pictures.
    python_ms: what a decoding step takes at least, however small the model."""
    dense = measurements[0]
    rows: list[Row] = []
    for one in measurements:
        place = {
            "length": inputs.length,
            "batch": inputs.batch,
            "keep": round(one.keep, 4),
            "skip": one.variant.skip,
        }
        rows += _prefill_rows(subject, inputs, one, dense, rates, place)
        if seen is not None and one is dense:
            rows.append(_timed("vision", place, seen, seen, tokens=inputs.visual))
        rows.append(_first_token(subject, one, dense, seen, place))
        rows.append(_decode_row(subject, inputs, one, dense, rates, python_ms, place))
        rows.append(_cache_row(subject, one, dense, place))
    return rows


def _timed(
    phase: str, place: Row, spread: Spread, dense: Spread, scale: float = 1.0, **more: Any
) -> Row:
    """A row of times beside the dense ones. scale: what both are multiplied with, to be of one layer, say."""
    low, middle, high = (ms * scale for ms in spread.p20_p50_p80)
    dense_ms = dense.p20_p50_p80[1] * scale
    return {
        "phase": phase,
        **place,
        "ms": middle,
        "ms_p20": low,
        "ms_p80": high,
        "dense_ms": dense_ms,
        "speedup": dense_ms / middle,
        "turns": len(spread.ms),
        "noisy": spread.noisy or dense.noisy,
        **more,
    }


def _prefill_rows(
    subject: Subject, inputs: Inputs, one: Measurement, dense: Measurement, rates: Rates, place: Row
) -> list[Row]:
    """One decoder layer, and the whole prefill with the logits of the last token."""
    s = subject.shape
    probes = subject.sparse.probes.recent + subject.sparse.probes.random
    work, dense_work = (
        cost.layer(s, inputs.length, m.keep, m.variant.skip, probes, inputs.batch)
        for m in (one, dense)
    )
    logits = cost.Work(2.0 * inputs.batch * s.hidden * s.vocab, float(s.size * s.hidden * s.vocab))
    layer_s, dense_s = rates.seconds(work), rates.seconds(dense_work)
    logits_s = rates.seconds({"logits": logits})
    flops, decoder = cost.add(work.values()).flops, one.parts["decoder"]
    layer = _timed(
        "prefill_layer",
        place,
        decoder,
        dense.parts["decoder"],
        1 / s.layers,
        bound=dense_s / layer_s,
        bound_counted=cost.add(dense_work.values()).flops / flops,
        tflops=one.flops / decoder.p20_p50_p80[1] / 1e9 or None,
        card_flops=flops,
        counted_flops=one.flops / s.layers or None,
        phases=one.phases,
        overhead=overhead(one.phases) if one.variant.skip != "none" else None,
    )
    whole = _timed(
        "prefill",
        place,
        total(one.parts),
        total(dense.parts),
        bound=(s.layers * dense_s + logits_s) / (s.layers * layer_s + logits_s),
        layers=s.layers,
        peak_bytes=one.peak_bytes,
        kv_bytes=one.kv_bytes,
    )
    return [layer, whole]


def _decode_row(
    subject: Subject,
    inputs: Inputs,
    one: Measurement,
    dense: Measurement,
    rates: Rates,
    python_ms: float,
    place: Row,
) -> Row:
    s = subject.shape
    work, dense_work = (
        cost.decode(s, inputs.length, m.keep, m.variant.skip, inputs.batch) for m in (one, dense)
    )
    middle = one.step.p20_p50_p80[1]
    return _timed(
        "decode",
        place,
        one.step,
        dense.step,
        bound=dense_work.bytes / work.bytes,
        tokens_per_s=inputs.batch * 1000 / middle,
        python_ms=python_ms,
        tflops=one.step_flops / middle / 1e9 or None,
        card_flops=work.flops,
        counted_flops=one.step_flops or None,
        copy_share=work.bytes / (middle / 1e3) / rates.copy,
        layers=s.layers,
    )


def _cache_row(subject: Subject, one: Measurement, dense: Measurement, place: Row) -> Row:
    """Keys and values of all layers of the model, from those that were built."""
    layers, built = subject.all_layers, subject.shape.layers
    return {
        "phase": "kv_cache",
        **place,
        "kv_bytes": one.kv_bytes * layers // built,
        "dense_kv_bytes": dense.kv_bytes * layers // built,
        "bound": dense.kv_bytes / one.kv_bytes,
        "layers": layers,
    }


def total(parts: dict[str, Spread]) -> Spread:
    """The parts of each pass added up."""
    return Spread([sum(ms) for ms in zip(*(part.ms for part in parts.values()), strict=True)])


def overhead(phases: dict[str, float]) -> float:
    """Share of a sparse layer that is none of its products, scores, attention and norms."""
    return sum(phases.get(name, 0.0) for name in OVERHEAD) / sum(phases.values())


def _first_token(
    subject: Subject, one: Measurement, dense: Measurement, seen: Spread | None, place: Row
) -> Row:
    """Time to the first token with all layers: measured if all were built, else the layers' time times their number."""
    scale = subject.all_layers / subject.shape.layers
    extra = 0.0 if seen is None else seen.p20_p50_p80[1] * place["batch"]

    def ms(taken: Measurement) -> float:
        decoder, logits = (taken.parts[name].p20_p50_p80[1] for name in ("decoder", "logits"))
        return decoder * scale + logits + extra

    return {
        "phase": "ttft",
        **place,
        "ms": ms(one),
        "dense_ms": ms(dense),
        "speedup": ms(dense) / ms(one),
        "layers": subject.all_layers,
        "extrapolated": scale != 1,
    }
