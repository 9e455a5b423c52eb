"""From measured turns to the rows of profile.json: a number, its spread, what it is compared with, and its bound.

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

from zipr1.models import cost
from zipr1.profiling import measure
from zipr1.profiling.counting import memory, operations
from zipr1.profiling.measure import Spread, Variant
from zipr1.profiling.rates import Rates
from zipr1.profiling.subject import Inputs, Subject

Row = dict[str, Any]

# Of a sparse layer, what sparsity adds: choosing, moving rows and what Python does in between (and rotary embedding and
# residual sums, which nothing tells apart from it).
OVERHEAD = ("selection", "gathers", "other")


@dataclass
class Taken:
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
    subject: Subject, inputs: Inputs, keeps: Sequence[float | None], seconds: float, count: bool
) -> list[Taken]:
    """Dense first, then each keep ratio with each way to skip. count: operations too. Each `seconds` a variant."""
    variants = [measure.fastest_dense(subject, inputs)]
    for keep in keeps:
        for skip in ("attention", "layer"):
            variants.append(measure.sparse_variant(subject, inputs, skip, keep))
    times = measure.turns(
        [lambda v=v: measure.prefill(subject, inputs, v)[0] for v in variants],  # type: ignore[misc]
        seconds,
    )
    phases = measure.by_phase(subject, inputs, variants)
    steps = measure.decoding(subject, inputs, variants, seconds)
    out = []
    for variant, parts, found, (step, size) in zip(variants, times, phases, steps, strict=True):
        with memory(subject.device) as used:
            measure.prefill(subject, inputs, variant)
        taken = Taken(variant, realised(variant), parts, found, step, size, int(used.peak))
        if count:
            taken.flops, taken.step_flops = counted(subject, inputs, variant)
        out.append(taken)
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
        measure.wait(subject.device)
        start = time.perf_counter()
        with torch.no_grad():
            see()
        measure.wait(subject.device)
        return {"vision": time.perf_counter() - start}

    return measure.turns([run], seconds)[0]["vision"]


def rows_of(
    subject: Subject,
    inputs: Inputs,
    taken: Sequence[Taken],
    seen: Spread | None,
    rates: Rates,
    python_ms: float,
) -> list[Row]:
    """All rows of one length and batch."""
    s, dense = subject.shape, taken[0]
    probes = subject.sparse.probes.recent + subject.sparse.probes.random
    length, batch = inputs.length, inputs.batch
    rows: list[Row] = []

    def work(one: Taken) -> dict[str, cost.Work]:
        return cost.layer(s, length, one.keep, one.variant.skip, probes, batch)

    def step_work(one: Taken) -> cost.Work:
        return cost.decode(s, length, one.keep, one.variant.skip, batch)

    slow, slow_step = work(dense), step_work(dense)
    logits = cost.Work(2.0 * batch * s.hidden * s.vocab, float(s.size * s.hidden * s.vocab))
    logits_s = rates.seconds({"logits": logits})
    dense_layer_s = rates.seconds(slow)

    for one in taken:
        sparse = one.variant.skip != "none"
        place = {
            "length": length,
            "batch": batch,
            "keep": round(one.keep, 4),
            "skip": one.variant.skip,
        }

        def row(
            phase: str,
            spread: Spread,
            against: Spread,
            scale: float = 1.0,
            place: Row = place,
            **more: Any,
        ) -> Row:
            low, middle, high = (x * scale for x in spread.p20_p50_p80)
            usual = against.p20_p50_p80[1] * scale
            return {
                "phase": phase,
                **place,
                "ms": middle,
                "ms_p20": low,
                "ms_p80": high,
                "dense_ms": usual,
                "speedup": usual / middle,
                "turns": len(spread.ms),
                "noisy": spread.noisy or against.noisy,
                **more,
            }

        ours = work(one)
        layer_s = rates.seconds(ours)
        whole, usual = total(one.parts), total(dense.parts)
        flops = one.flops / s.layers
        rows.append(
            row(
                "prefill_layer",
                one.parts["decoder"],
                dense.parts["decoder"],
                1 / s.layers,
                bound=dense_layer_s / layer_s,
                bound_counted=cost.add(slow.values()).flops / cost.add(ours.values()).flops,
                tflops=one.flops / one.parts["decoder"].p20_p50_p80[1] / 1e9 or None,
                card_flops=cost.add(ours.values()).flops,
                counted_flops=flops or None,
                phases=one.phases,
                overhead=overhead(one.phases) if sparse else None,
            )
        )
        rows.append(
            row(
                "prefill",
                whole,
                usual,
                bound=(s.layers * dense_layer_s + logits_s) / (s.layers * layer_s + logits_s),
                layers=s.layers,
                peak_bytes=one.peak_bytes,
                kv_bytes=one.kv_bytes,
            )
        )
        if seen is not None and not sparse:
            rows.append(row("vision", seen, seen, tokens=inputs.visual))
        rows.append(_first_token(subject, one, dense, seen, place))
        step, usual_step = step_work(one), slow_step
        middle = one.step.p20_p50_p80[1]
        rows.append(
            row(
                "decode",
                one.step,
                dense.step,
                bound=usual_step.bytes / step.bytes,
                tokens_per_s=batch * 1000 / middle,
                python_ms=python_ms,
                tflops=one.step_flops / middle / 1e9 or None,
                card_flops=step.flops,
                counted_flops=one.step_flops or None,
                copy_share=step.bytes / (middle / 1e3) / rates.copy,
                layers=s.layers,
            )
        )
        rows.append(
            {
                "phase": "kv_cache",
                **place,
                "kv_bytes": one.kv_bytes * subject.all_layers // s.layers,
                "dense_kv_bytes": dense.kv_bytes * subject.all_layers // s.layers,
                "bound": dense.kv_bytes / one.kv_bytes,
                "layers": subject.all_layers,
            }
        )
    return rows


def total(parts: dict[str, Spread]) -> Spread:
    """The parts of each turn added up."""
    return Spread([sum(ms) for ms in zip(*(part.ms for part in parts.values()), strict=True)])


def overhead(phases: dict[str, float]) -> float:
    """Share of a sparse layer that is none of its products, scores, attention and norms."""
    return sum(phases.get(name, 0.0) for name in OVERHEAD) / sum(phases.values())


def _first_token(
    subject: Subject, one: Taken, dense: Taken, seen: Spread | None, place: Row
) -> Row:
    """Time to the first token with all layers: measured if all were built, else the layers' time times their number."""
    scale = subject.all_layers / subject.shape.layers
    extra = 0.0 if seen is None else seen.p20_p50_p80[1] * place["batch"]

    def ms(taken: Taken) -> float:
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
