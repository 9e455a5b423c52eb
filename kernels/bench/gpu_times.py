"""The parts of gpu.py that time: every operation by every provider, with nothing beside it on the machine."""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from cases import SHAPES, Problem, Run
from run import Clock
from torch.nn.attention import SDPBackend, sdpa_kernel
from zipr1_kernels import kv_compact, norm_rope, packed_attention, ran, sparse_prefill, use

if TYPE_CHECKING:
    from gpu_parts import Context


def timing(context: Context) -> None:
    which = {
        "attention": attention,
        "scoring": scoring,
        "decoding": decoding,
        "configurations": configurations,
    }
    which[context.which](context, Clock(context.device))


def each(context: Context, work: Callable[[Problem], None]) -> None:
    """Do it for problems in the order of their worth, as long as there is time."""
    wanted = [(4096, 1), (32768, 1), (16384, 1), (4096, 8), (131072, 1), (16384, 8), (32768, 8)]
    for length, batch in [(128, 1), (128, 2)] if context.small else wanted:
        if context.left() < 3 and not context.small:
            context.row(f"{length}x{batch}", None, note="no time was left")
            continue
        dtype = torch.float32 if context.small else torch.bfloat16
        with context.attempt(f"{length}x{batch}"), torch.no_grad():
            ragged = batch > 1
            work(Problem(SHAPES["7b"], length, 0.25, dtype, context.device, batch, ragged=ragged))
        if context.device == "cuda":
            torch.cuda.empty_cache()


def timed(
    context: Context, clock: Clock, problem: Problem, op: str, runs: dict[str, Run], budget: float
) -> None:
    """Providers take turns; what does not run is a row of its own."""
    place = {"length": problem.length, "batch": problem.batch}
    good: dict[str, Run] = {}
    for name, run in runs.items():
        with context.attempt(f"{op}: {name}", **place):
            run()
            good[name] = run
    if not good:
        return
    budget = 0.01 if context.small else budget
    for name, (low, middle, high) in clock.turns(good, 30, budget).items():
        row = {"p50_ms": float(middle), "p20_ms": float(low), "p80_ms": float(high), **place}
        context.row(f"{op}: {name}", path=ran(op) if name == "ours" else "", **row)


def backend(kind: SDPBackend, run: Run) -> Run:
    def pinned() -> object:
        with sdpa_kernel(kind):
            return run()

    return pinned


def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = True) -> Run:
    grouped = q.shape[1] != k.shape[1]
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)


def attention(context: Context, clock: Clock) -> None:
    """Prefill of kept tokens by every provider, and dense attention over all of them."""
    gpu = context.device == "cuda"

    def work(problem: Problem) -> None:
        kept, tensors = problem.kept, (problem.q, problem.k, problem.v)
        rows = [x.transpose(1, 2).flatten(0, 1).index_select(0, kept.flat) for x in tensors]
        small = [kv_compact(x, x, kept)[0].contiguous() for x in tensors]
        runs: dict[str, Run] = {
            "ours": lambda: sparse_prefill(*tensors, kept),
            "packed rows alone": lambda: packed_attention(rows[0], rows[1], rows[2], kept),
            "padded": fused(*small),
        }
        if gpu:
            runs["triton"] = problem.forced("triton", *tensors)
            runs["padded, flash"] = backend(SDPBackend.FLASH_ATTENTION, fused(*small))
            runs["padded, cudnn, one plan"] = backend(SDPBackend.CUDNN_ATTENTION, fused(*small))
        timed(context, clock, problem, "sparse_prefill", runs, 0.6)
        if gpu:
            fresh(context, problem, small)
        plain = fused(*(x.contiguous() for x in tensors))
        dense: dict[str, Run] = {"torch": plain}
        if gpu:
            for kind in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
                dense[kind.name.lower()] = backend(kind, plain)
        timed(context, clock, problem, "dense", dense, 0.4)
        if problem.batch == 1 and problem.length in (128, 4096, 16384):
            case, _ = problem.backward()
            timed(context, clock, problem, "sparse_prefill backward", case.run, 0.4)

    each(context, work)


def fresh(context: Context, problem: Problem, small: list[torch.Tensor]) -> None:
    """cuDNN at eight numbers of tokens that it has not seen: what each prompt and layer would pay."""
    times = []
    place = {"length": problem.length, "batch": problem.batch}
    name = "sparse_prefill: padded, cudnn, new plan"
    with context.attempt(name, **place):
        for i in range(1, 9):
            part = [x[:, :, : x.shape[2] - i].contiguous() for x in small]
            torch.cuda.synchronize()
            begin = time.perf_counter()
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                fused(*part)()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) * 1000)
        times.sort()
        context.row(name, p50_ms=times[4], p20_ms=times[1], p80_ms=times[6], **place)


def scoring(context: Context, clock: Clock) -> None:
    def work(problem: Problem) -> None:
        runs = problem.runs()
        selecting = dict(runs["select_top_p"])
        if context.device == "cuda":
            selecting["searched"] = searched(10**9, selecting["ours"])
            selecting["sorted"] = searched(0, selecting["ours"])
            selecting["torch"] = forced("torch", selecting["ours"])
        timed(context, clock, problem, "probe_scores", runs["probe_scores"], 0.3)
        timed(context, clock, problem, "select_top_p", selecting, 0.4)
        timed(context, clock, problem, "kv_compact", runs["kv_compact"], 0.2)
        keys, place = problem.k.transpose(1, 2), problem.v[:, 0].contiguous()
        turn = functools.partial(norm_rope, keys, place, place, place[0, 0])
        turning = {"ours": turn, "torch": forced("torch", turn)}
        timed(context, clock, problem, "norm_rope", turning, 0.1)
        timed(context, clock, problem, "total", {"ours": problem.whole}, 0.3)

    each(context, work)


def forced(path: str, run: Run) -> Run:
    def inside() -> object:
        with use(path):
            return run()

    return inside


def searched(longest: int, run: Run) -> Run:
    """With rows of up to `longest` tokens searched and longer ones sorted."""
    kernel = importlib.import_module("zipr1_kernels.select_top_p.kernel")

    def inside() -> object:
        shipped, kernel.LONGEST = kernel.LONGEST, longest
        try:
            return run()
        finally:
            kernel.LONGEST = shipped

    return inside


def decoding(context: Context, clock: Clock) -> None:
    """A step over the kept tokens, and over all of them; the query heads of a key head are rows, read once."""

    def work(problem: Problem) -> None:
        rows = problem.query.unflatten(1, (problem.shape.heads, -1)).flatten(2, 3)
        cache = [x[: len(rows)].contiguous() for x in (problem.k, problem.v)]
        dense = {"heads folded": fused(rows, *cache, causal=False)}
        timed(context, clock, problem, "sparse_decode", problem.runs()["sparse_decode"], 0.3)
        timed(context, clock, problem, "dense decode", dense, 0.3)

    each(context, work)


def configurations(context: Context, clock: Clock) -> None:
    """The configurations that resources.py finds worth trying, each put in the place of the shipped one."""
    from resources import CANDIDATES  # which needs Triton, as no other part does
    from zipr1_kernels import launch

    length = 128 if context.small else 16384
    dtype = torch.float32 if context.small else torch.bfloat16
    problem = Problem(SHAPES["7b"], length, 0.25, dtype, context.device)
    case, _ = problem.backward()
    runs: dict[str, Run] = {
        "sparse_prefill FORWARD": problem.forced("triton", problem.q, problem.k, problem.v),
        "sparse_prefill QUERIES": case.run.get("triton", case.run["ours"]),
        "sparse_prefill KEYS": case.run.get("triton", case.run["ours"]),
        "probe_scores FORWARD": problem.score,
        "probe_scores COLUMNS": problem.score,
        "probe_scores QUERIES": problem.score_backward(),
        "probe_scores KEYS": problem.score_backward(),
        "sparse_decode FORWARD": problem.decode,
    }
    arch = launch.capability(problem.q.device)
    with torch.no_grad():
        for (op, table), configs in CANDIDATES.items():
            run = runs.get(f"{op} {table}")
            if run is None:
                continue
            if context.small and op == "sparse_prefill":
                run = problem.forced("torch", problem.q, problem.k, problem.v)
            tables = getattr(importlib.import_module(f"zipr1_kernels.{op}.kernel"), table)
            shipped = tables[arch][128]
            for config in dict.fromkeys([shipped, *configs]):
                if context.left() < 4 and not context.small:
                    context.row(f"{op} {table} {tuple(config)}", None, note="no time was left")
                    continue
                tables[arch][128] = config
                timed(context, clock, problem, f"{op} {table}", {str(tuple(config)): run}, 0.3)
            tables[arch][128] = shipped
