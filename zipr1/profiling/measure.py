"""Times of prefill and decoding, dense and sparse taking turns in one process.

What is timed is the code that training and evaluation sample with (zipr1/models/sampling.py), but for one thing: all of
the last layer is done here. A profile speaks of a mean layer, and the layers that were built often stand for many more.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from zipr1.core import activity
from zipr1.core.errors import RunError
from zipr1.core.phases import Stopwatch
from zipr1.models import sampling
from zipr1.models.cost import Skip, kept_tokens
from zipr1.models.loading import random_model
from zipr1.models.sparse.cache import PrunedCache, kv_bytes
from zipr1.models.sparse.patch import SparseRun, sparse_attention
from zipr1.models.sparse.record import Record
from zipr1.models.sparse.request import Request
from zipr1.profiling.rates import wait
from zipr1.profiling.subject import Inputs, Subject

# A median of fewer turns is no median; more than these say nothing new.
LEAST, MOST = 5, 30
# Backends of torch's fused attention that a GPU may have; a CPU has one.
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
MODULES = {
    "q_proj": "projections",
    "k_proj": "projections",
    "v_proj": "projections",
    "o_proj": "projections",
    "mlp": "mlp",
    "input_layernorm": "norms",
    "post_attention_layernorm": "norms",
    "norm": "norms",
    "rotary_emb": "norms",
}


@dataclass
class Variant:
    """One way to run the same prompts. keep: the share that is kept, None for what the model's own p keeps.

    request: None is dense. backend: of dense attention, None for torch's choice. record: what the last prefill kept.
    """

    skip: Skip
    keep: float | None
    request: Request | None = None
    backend: SDPBackend | None = None
    record: Record | None = None

    @contextlib.contextmanager
    def running(self, model: Any) -> Iterator[SparseRun]:
        with contextlib.ExitStack() as stack:
            if self.backend is not None:
                stack.enter_context(sdpa_kernel(self.backend))
            yield stack.enter_context(sparse_attention(model, self.request))


@dataclass
class Spread:
    """Milliseconds of every turn. noisy: half of p20 to p80 is over 10 % of the median, or the medians of the first and
    the last half of the turns differ by more than p20 to p80."""

    ms: list[float] = field(default_factory=list)

    @property
    def p20_p50_p80(self) -> tuple[float, float, float]:
        low, middle, high = np.percentile(self.ms, (20, 50, 80))
        return float(low), float(middle), float(high)

    @property
    def noisy(self) -> bool:
        half = len(self.ms) // 2
        low, middle, high = self.p20_p50_p80
        apart = abs(float(np.median(self.ms[:half])) - float(np.median(self.ms[half:])))
        return high - low > 0.2 * middle or apart > max(high - low, 0.02 * middle)


def sparse_variant(subject: Subject, inputs: Inputs, skip: Skip, keep: float | None) -> Variant:
    """A variant that keeps exactly ceil(keep * length) tokens in every layer and row, by top-p thresholds of its own.

    The thresholds lie between the cut points of a pass that keeps that many by rank, so the timed passes do what a
    trained model does at that ratio. Raises RunError where scores are too equal for it.
    """
    settings = subject.sparse.model_copy(update={"skip": skip, "rule": "top_p"})
    if keep is None:
        return Variant(skip, None, Request(subject.sparse.model_copy(update={"skip": skip})))
    if keep == 1:
        return Variant(skip, keep, Request(settings.model_copy(update={"p": 1.0}), force=True))
    n = kept_tokens(inputs.length, keep)
    settings = settings.model_copy(update={"keep_last": min(settings.keep_last, n)})
    ranked = Request(settings.model_copy(update={"rule": "top_k", "p": keep}), scores=True)
    trial = Variant(skip, keep, ranked)
    prefill(subject, inputs, trial)
    assert trial.record is not None
    cuts = [layer.cut.sort(1).values for layer in trial.record.layers if layer.cut is not None]
    between = [(cut[:, n - 1] + cut[:, n]) / 2 for cut in cuts]
    variant = Variant(skip, keep, Request(settings, torch.stack(between, 1)))
    prefill(subject, inputs, variant)
    assert variant.record is not None
    if any(bool((layer.counts != n).any()) for layer in variant.record.layers):
        raise RunError(
            f"{keep:g} of {inputs.length} tokens cannot be kept exactly: scores of neighbours are equal; "
            "use another keep ratio, or --dtype float32"
        )
    return variant


@torch.no_grad()
def prefill(subject: Subject, inputs: Inputs, variant: Variant) -> tuple[dict[str, float], Any]:
    """Seconds of the decoder and of the last token's logits, and the cache."""
    model = subject.model
    with variant.running(model) as run:
        wait(subject.device)
        start = time.perf_counter()
        hidden, cache = sampling.prefill(model, inputs.arguments, inputs.valid, run)
        wait(subject.device)
        middle = time.perf_counter()
        model.lm_head(hidden[:, -1]).argmax(-1)
        wait(subject.device)
        end = time.perf_counter()
        variant.record = run.record
    return {"decoder": middle - start, "logits": end - middle}, cache


def turns(
    runs: Sequence[Callable[[], dict[str, float]]], seconds: float, what: str = "timing: turn"
) -> list[dict[str, Spread]]:
    """Each run's parts in milliseconds: one round to warm up, then by turns for about `seconds` a run.

    what: told to who waits, between the turns.
    """
    first = time.perf_counter()
    for run in runs:
        run()
    round_s = time.perf_counter() - first
    rounds = max(LEAST, min(MOST, int(seconds * len(runs) / max(round_s, 1e-6))))
    found: list[dict[str, Spread]] = [{} for _ in runs]
    for _ in activity.counted(what, range(rounds)):
        for run, parts in zip(runs, found, strict=True):
            for name, took in run().items():
                parts.setdefault(name, Spread()).ms.append(took * 1000)
    return found


def fastest_dense(subject: Subject, inputs: Inputs) -> Variant:
    """Dense with the fastest of torch's attention backends here."""
    choices = [Variant("none", 1.0)]
    if subject.device.type == "cuda":
        choices += [Variant("none", 1.0, backend=backend) for backend in BACKENDS]
    usable: list[tuple[float, int]] = []
    last = RuntimeError()
    for i, choice in enumerate(choices):
        try:
            prefill(subject, inputs, choice)
            took = min(sum(prefill(subject, inputs, choice)[0].values()) for _ in range(2))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # no kernel of this backend for this shape
            last = error
            continue
        usable.append((took, i))
    if not usable:
        raise last
    return choices[min(usable)[1]]


@contextlib.contextmanager
def watched(subject: Subject) -> Iterator[Stopwatch]:
    """Inside, a stopwatch hears the phases of the decoder's layers: products, norms and what the bridge tells of."""
    device = subject.device
    watch = Stopwatch((lambda: wait(device)) if device.type == "cuda" else None)
    handles = []
    for name, module in subject.model.get_decoder().named_modules():
        phase = MODULES.get(name.rsplit(".", 1)[-1])
        if phase is not None:
            handles.append(
                module.register_forward_pre_hook(lambda m, a, phase=phase: watch.enter(phase))
            )
            handles.append(module.register_forward_hook(lambda m, a, o: watch.leave()))
    try:
        with watch.listening():
            yield watch
    finally:
        for handle in handles:
            handle.remove()


def by_phase(
    subject: Subject, inputs: Inputs, variants: Sequence[Variant]
) -> list[dict[str, float]]:
    """Milliseconds of a decoder layer by phase, medians of turns; `other` is what no phase claims.

    Of passes of their own, since on a GPU each phase waits for the device.
    """
    found: list[dict[str, list[float]]] = [{} for _ in variants]
    for turn in range(4):
        for variant, times in zip(variants, found, strict=True):
            with watched(subject) as watch:
                took = prefill(subject, inputs, variant)[0]["decoder"]
            watch.seconds["other"] = took - sum(watch.seconds.values())
            if turn:
                for name, seconds in watch.seconds.items():
                    times.setdefault(name, []).append(seconds * 1000 / subject.shape.layers)
    return [{name: float(np.median(ms)) for name, ms in times.items()} for times in found]


@torch.no_grad()
def decoding(
    subject: Subject, inputs: Inputs, variants: Sequence[Variant], seconds: float, what: str
) -> list[tuple[Spread, int]]:
    """Milliseconds of a decoding step and bytes of the cache before it, for each variant.

    A dense cache is run twice, as transformers grows it (a copy a step) and with room to write into: the faster counts.
    """
    caches: list[tuple[Variant, Any]] = []
    for variant in variants:
        cache = prefill(subject, inputs, variant)[1]
        if variant.request is None:
            roomy = Variant("none", 1.0, Request(subject.sparse, force=True))
            caches += [(variant, cache), (roomy, PrunedCache.whole(cache))]
        else:
            caches.append((variant, cache))
    sizes = [kv_bytes(cache) for _, cache in caches]
    runs = [stepper(subject, inputs, variant, cache) for variant, cache in caches]
    spreads = [parts["step"] for parts in turns(runs, seconds, what)]
    out = []
    i = 0
    for variant in variants:
        if variant.request is None:
            out.append((min(spreads[i : i + 2], key=lambda s: s.p20_p50_p80[1]), sizes[i]))
            i += 2
        else:
            out.append((spreads[i], sizes[i]))
            i += 1
    return out


def stepper(
    subject: Subject, inputs: Inputs, variant: Variant, cache: Any, waiting: bool = True
) -> Callable[[], dict[str, float]]:
    model, device = subject.model, subject.device
    arguments = inputs.next()

    @torch.no_grad()
    def run() -> dict[str, float]:
        with variant.running(model):
            wait(device)
            start = time.perf_counter()
            hidden = sampling.decode_step(model, arguments, cache)
            model.lm_head(hidden[:, -1]).argmax(-1)
            if waiting:
                wait(device)
            return {"step": time.perf_counter() - start}

    return run


def overhead_ms(subject: Subject, batch: int) -> float:
    """Milliseconds that Python and torch's dispatch take at least in a decoding step over a pruned cache.

    A step of a model of the same family and depth, so narrow that nothing is left to compute; on a GPU, until the
    last launch.
    """
    config, s = subject.model.config, subject.shape
    tower = config.vision_config.to_dict()
    text = {
        "hidden_size": 8 * s.q_heads,
        "num_attention_heads": s.q_heads,
        "num_key_value_heads": s.heads,
        "intermediate_size": 16,
        "vocab_size": 64,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    values: dict[str, Any] = {
        "model_type": config.model_type,
        "vision_config": {k: v for k, v in tower.items() if "hidden_size" not in k},
    }
    turned = {"mrope_section": [1, 1, 2]}
    if s.head_norms:  # Qwen3-VL reads its sizes in a section of their own alone
        rope = {"rope_type": "default", "mrope_interleaved": True, **turned}
        values["text_config"] = {**text, "head_dim": 8, "rope_scaling": rope}
    else:
        values |= {**text, "rope_scaling": {"type": "mrope", **turned}}
    dtype = str(subject.dtype).removeprefix("torch.")
    model = random_model(values, s.layers, subject.device, dtype)
    narrow = Subject(model, s, s.layers, subject.sparse, "random")
    inputs = narrow.random(32, batch)
    settings = subject.sparse.model_copy(update={"skip": "layer"})
    variant = Variant("layer", None, Request(settings))
    run = stepper(narrow, inputs, variant, prefill(narrow, inputs, variant)[1], waiting=False)
    return min(run()["step"] for _ in range(50)) * 1000
