"""Time of the sparse operations beside dense attention, and the least that the machine could take.

    python kernels/bench/run.py [--device cpu] [--dtype float32 bfloat16] [--shape 3b] [--length 4096] [--keep 0.25]
                                [--batch 1 8] [--backward] [--append] [--limit 480] [--json]

First a gate: every dtype against a double-precision reference, exit code 1 if it fails. Then the machine's own matrix
rate and copy bandwidth, and from them each operation's floor. Then medians with the 20th and 80th percentile, the
providers of an operation and dense attention taking turns in one process; dense is the fastest of torch's ways.
`--append` adds rows to results.csv as they come and draws results.png beside it. Needs torch, triton (on a GPU), numpy,
matplotlib.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from cases import SHAPES, Case, Problem, Run, Shape  # noqa: E402
from zipr1_kernels import dispatch, ran, sparse_prefill, use  # noqa: E402

COLUMNS = (
    "op", "provider", "mode", "shape", "dtype", "length", "keep", "batch", "path", "p20_ms", "p50_ms", "p80_ms",
    "floor_ms", "dense", "dense_p50_ms", "speedup", "device", "torch", "triton", "commit", "date",
)  # fmt: skip
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Clock:
    """Times functions by turns. On a GPU with events, after the second-level cache was overwritten."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        if self.cuda:
            self.flush = torch.empty(2**26, dtype=torch.int32, device=device)

    def once(self, run: Run) -> float:
        """Milliseconds."""
        if not self.cuda:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1000
        self.flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))

    def turns(self, runs: dict[str, Run], repeats: int, budget_s: float) -> dict[str, np.ndarray]:
        """p20, p50, p80 of each, after one round of warming up; fewer rounds where a round is long, at least 5."""
        first = sum(self.once(run) for run in runs.values())
        first = min(first, sum(self.once(run) for run in runs.values()))
        rounds = max(5, min(repeats, int(budget_s * 1000 / max(first, 1e-3))))
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(self.once(run))
        return {name: np.percentile(found, (20, 50, 80)) for name, found in times.items()}


def machine(clock: Clock, dtype: torch.dtype, device: str) -> tuple[float, float]:
    """Matrix rate in operations and copy bandwidth in bytes (read and written) per millisecond.

    The rate is that of the faster of this dtype and float32, into which a CPU without bfloat16 units converts.
    """
    size = 8192 if device == "cuda" else 2048
    full = torch.randn(size, size, device=device)
    low = full.to(dtype)
    source = torch.empty(2**27 if device == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    runs = {
        "low": lambda: low @ low,
        "full": lambda: full @ full,
        "copy": lambda: target.copy_(source),
    }
    times = clock.turns(runs, 20, 5)
    product = min(times["low"][1], times["full"][1])
    return 2 * size**3 / product, 2 * source.nbytes / times["copy"][1]


def broken(device: str) -> list[str]:
    """The operations that raise on small problems, said as they are found; torch can do without them."""
    names = (
        "probe_scores",
        "select_top_p",
        "pack_indices",
        "kv_compact",
        "sparse_prefill",
        "sparse_decode",
    )
    found = []
    for op in names:
        with dispatch.without(*(name for name in names if name != op)):
            try:
                for dim in (64, 128):
                    shape = Shape("small", 4, 2, dim)
                    problem = Problem(shape, 300, 0.3, torch.bfloat16, device)
                    for runs in problem.runs().values():
                        runs["ours"]()
            except Exception as error:  # noqa: BLE001 - a kernel that does not compile raises what it likes
                print(f"left to torch: {op}: {told(error)}", flush=True)
                found.append(op)
    return found


def told(error: Exception) -> str:
    said = (str(error).splitlines() or [""])[0][:100]
    return f"{type(error).__name__}: {said}"


def gate(device: str, paths: tuple[str, ...] = ("auto",)) -> list[str]:
    """What is wrong, in each dtype and by each path, forward and backward, against masked attention in float64: rows
    of one length, and ragged ones of the models' head dimension. paths: of `use`; on a GPU `auto` takes a library's
    attention, and the kernel runs where it is forced."""
    wrong = []
    for (name, dtype), ragged, path in itertools.product(DTYPES.items(), (False, True), paths):
        dim = 128 if ragged else 64
        # Half a unit in the last place of the largest: gradients of shared heads are rounded once more here than there.
        floor = max(1e-5, torch.finfo(dtype).eps / 2) if ragged else 1e-5
        shape = Shape("small", 4, 2, dim)
        problem = Problem(shape, 1000, 0.3, dtype, device, batch=2, ragged=ragged)
        tensors = [problem.q, problem.k, problem.v]
        exact, plain = (
            answers(problem, tensors, kind, masked=True) for kind in (torch.float64, dtype)
        )
        rows = f"{dim}, {'ragged' if ragged else 'equal'} rows, {path}"
        try:
            with use(path):
                ours = answers(problem, tensors, dtype, masked=False)
                with torch.no_grad():  # another way than the one that has a gradient
                    alone = sparse_prefill(*tensors, problem.kept).double()
        except Exception as error:
            if path == "auto":  # what everything timed goes through
                raise
            print(f"left out: {name} ({rows}): {told(error)}", flush=True)
            continue
        names = ("output", "dq", "dk", "dv", "output without gradient")
        for what, right, usual, found in zip(
            names, [*exact, exact[0]], [*plain, plain[0]], [*ours, alone], strict=True
        ):
            allowed = 2 * (usual - right).abs().max() + floor * right.abs().max()
            error = (found - right).abs().max()
            if not error <= allowed:
                wrong.append(f"{name} {what}: off by {error:.2e}, allowed {allowed:.2e} ({rows})")
    return wrong


def answers(
    problem: Problem, tensors: list[torch.Tensor], dtype: torch.dtype, masked: bool
) -> list[torch.Tensor]:
    """Output and gradients in float64, computed in `dtype`, by torch's attention with a mask or by ours."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in tensors]
    if masked:
        q, k, v = inputs
        keep = problem.kept.keep
        seen = keep[:, None, None] & torch.ones_like(problem.every[0]).expand(q.shape[2], -1).tril()
        # Rows that are dropped look at the first token, so that no row is empty; what they find is dropped too.
        seen = seen | (torch.arange(q.shape[2], device=q.device) == 0)
        seen = torch.where(keep[:, None, :, None], seen & keep[:, None, None], seen)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        out = out.masked_fill(~keep[:, None, :, None], 0)
    else:
        out = sparse_prefill(*inputs, problem.kept)
    return [
        x.detach().double()
        for x in (out, *torch.autograd.grad(out, inputs, problem.grad.to(out.dtype)))
    ]


def rows_of(
    case: Case,
    dense: dict[str, Run],
    clock: Clock,
    rates: tuple[float, float],
    repeats: int,
    budget_s: float,
) -> list[dict[str, Any]]:
    """One row a provider; dense attention is beside every operation but selection, where it would say nothing."""
    times = clock.turns(
        {**case.run, **{f"dense {k}": v for k, v in dense.items()}}, repeats, budget_s
    )
    best = min(
        (name for name in times if name.startswith("dense ")),
        key=lambda n: times[n][1],
        default=None,
    )
    floor = max(case.work.flops / rates[0], case.work.bytes / rates[1])
    rows = []
    for name, run in case.run.items():
        run()
        path = ran("sparse_prefill" if case.op == "total" else case.op) or ""
        low, middle, high = times[name]
        base = times[best][1] if best else None
        rows.append(
            {
                "op": case.op, "provider": name, "mode": case.mode,
                "path": path if name == "ours" and case.mode == "forward" else "",
                "p20_ms": round(float(low), 4), "p50_ms": round(float(middle), 4), "p80_ms": round(float(high), 4),
                "floor_ms": round(floor, 4), "dense": best.removeprefix("dense ") if best else "",
                "dense_p50_ms": None if base is None else round(float(base), 4),
                "speedup": None if base is None else round(float(base / middle), 3),
            }
        )  # fmt: skip
    return rows


def measure(
    arguments: argparse.Namespace, keep: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """All rows. keep: is handed those of one problem as soon as they are there. No problem is begun after
    `arguments.limit` seconds."""
    device, began = arguments.device, time.monotonic()
    clock = Clock(device)
    rows: list[dict[str, Any]] = []
    for dtype in arguments.dtype:
        rates = machine(clock, DTYPES[dtype], device)
        print(
            f"{dtype}: matrix rate {rates[0] / 1e9:.3f} TFLOP/s, copy {rates[1] / 1e6:.1f} GB/s",
            flush=True,
        )
        for place in itertools.product(
            arguments.shape, arguments.length, arguments.keep, arguments.batch
        ):
            if time.monotonic() - began > arguments.limit:
                print(f"left out: {dtype}, {place}: --limit of {arguments.limit:g} seconds is over")
                continue
            try:
                found = problem_rows(arguments, clock, rates, dtype, *place)
            except Exception as error:  # noqa: BLE001 - a kernel that does not compile raises what it likes
                print(f"left out: {dtype}, {place}: {told(error)}", flush=True)
                continue
            fill(found)
            keep(found)
            rows += found
    return rows


def problem_rows(
    arguments: argparse.Namespace,
    clock: Clock,
    rates: tuple[float, float],
    dtype: str,
    shape: str,
    length: int,
    keep: float,
    batch: int,
) -> list[dict[str, Any]]:
    """Rows of one problem. Several rows in a batch keep different numbers of tokens."""
    device, repeats, seconds = arguments.device, arguments.repeats, arguments.seconds
    place = {"shape": shape, "dtype": dtype, "length": length, "keep": keep}
    problem = Problem(
        SHAPES[shape],
        length,
        keep,
        DTYPES[dtype],
        device,
        batch,
        arguments.decode,
        ragged=batch > 1,
    )
    dense = working(problem.dense(problem.q, problem.k, problem.v))
    rows = []
    with torch.no_grad():
        for case in problem.cases():
            case.run = working(case.run)
            beside = dense if case.op in ("sparse_prefill", "total") else {}
            if beside and device == "cpu" and case.op == "sparse_prefill":
                beside = {}  # `total` has it: a dense pass at this length is long
            found = rows_of(case, beside, clock, rates, repeats, seconds)
            held = problem.decode_batch if case.op == "sparse_decode" else batch
            rows += [{**place, "batch": held, **row} for row in found]
    if arguments.backward:
        case, dense = problem.backward()
        case.run = working(case.run)
        found = rows_of(case, working(dense), clock, rates, repeats, seconds)
        rows += [{**place, "batch": batch, **row} for row in found]
    return rows


def working(runs: dict[str, Run]) -> dict[str, Run]:
    """Those that run here; what a provider cannot do is said. A kernel that does not compile raises what it likes.

    Leaves if the GPU itself is in error: nothing that runs on it afterwards can be believed.
    """
    found = {}
    for name, run in runs.items():
        try:
            run()
        except Exception as error:  # noqa: BLE001
            print(f"left out: {name}: {told(error)}", flush=True)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        else:
            found[name] = run
    return found


def fill(rows: list[dict[str, Any]]) -> None:
    """Operations that were not timed beside dense attention are set against what it took beside `total`."""
    dense = {
        key(row): row
        for row in rows
        if row["dense_p50_ms"] is not None and row["mode"] == "forward"
    }
    for row in rows:
        if row["op"] == "sparse_decode":  # a prefill is no measure of a step
            continue
        if row["dense_p50_ms"] is None and key(row) in dense:
            row["dense"] = dense[key(row)]["dense"]
            row["dense_p50_ms"] = dense[key(row)]["dense_p50_ms"]
            row["speedup"] = round(row["dense_p50_ms"] / row["p50_ms"], 3)


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["shape"], row["dtype"], row["length"], row["keep"], row["batch"]


def provenance(device: str) -> dict[str, str]:
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = ""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True
    )
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{torch.get_num_threads()} CPU threads"
    )
    return {
        "device": name, "torch": torch.__version__, "triton": version, "commit": done.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def append(rows: list[dict[str, Any]]) -> None:
    """Add rows to results.csv; each is there, whatever happens to the next."""
    path = HERE / "results.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def draw(path: Path) -> None:
    """Whole sparse attention against dense, over length, for every device and dtype of the file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves: dict[str, dict[int, float]] = {}
    for row in csv.DictReader(path.open()):
        if row["op"] == "total" and row["provider"] == "ours":
            label = (
                f"{row['device']}, {row['dtype']}, {row['shape']}, {float(row['keep']):.0%} kept"
            )
            curves.setdefault(label, {})[int(row["length"])] = float(row["speedup"])
    figure, axes = plt.subplots(figsize=(7, 4))
    for label, points in sorted(curves.items()):
        axes.plot(*zip(*sorted(points.items()), strict=True), "o-", label=label)
    axes.axhline(1, color="0.6", linewidth=1)
    lengths = [n for points in curves.values() for n in points]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    powers = range(math.floor(math.log2(min(lengths))), math.ceil(math.log2(max(lengths))) + 1)
    axes.set_xticks([2**n for n in powers], [f"{2**n:,}" for n in powers])
    axes.yaxis.set_major_formatter("{x:g}x")
    axes.set(xlabel="prompt tokens", ylabel="as fast as dense attention")
    axes.set_title("Scoring, selection and attention together, forward")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=150)


def show(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'op':15} {'provider':14} {'mode':8} {'dtype':8} {'length':>6} {'keep':>5} "
        f"{'p50 ms':>8} {'p20':>8} {'p80':>8} {'floor':>7} {'dense':>8} {'speed-up':>8}"
    )
    for r in rows:
        shown = r["op"] in ("probe_scores", "sparse_prefill", "total")
        against = (
            ("", "")
            if not shown or r["dense_p50_ms"] is None
            else (f"{r['dense_p50_ms']:.1f}", f"{r['speedup']:.2f}x")
        )
        print(
            f"{r['op']:15} {r['provider']:14} {r['mode']:8} {r['dtype']:8} {r['length']:6} {r['keep']:5.0%} "
            f"{r['p50_ms']:8.3f} {r['p20_ms']:8.3f} {r['p80_ms']:8.3f} {r['floor_ms']:7.3f} "
            f"{against[0]:>8} {against[1]:>8}"
        )


def break_even(rows: list[dict[str, Any]]) -> list[str]:
    """From which of the measured lengths on the whole sparse attention takes less time than dense attention."""
    found: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in rows:
        if row["op"] == "total":
            place = row["shape"], row["dtype"], row["keep"]
            found.setdefault(place, {})[row["length"]] = row["speedup"]
    said = []
    for (shape, dtype, keep), speed in found.items():
        slow = [length for length, times in speed.items() if times <= 1]
        pays = [length for length in sorted(speed) if length > max(slow, default=0)]
        where = f"from {pays[0]} tokens on" if pays else "at none of these lengths"
        said.append(f"{shape}, {dtype}, {keep:.0%} kept: sparsity pays {where}")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES))
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES))
    parser.add_argument("--length", type=int, nargs="+")
    parser.add_argument("--keep", type=float, nargs="+")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--decode", type=int, default=1, help="rows of the decode batch")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=8, help="aim of each operation")
    parser.add_argument("--limit", type=float, default=480, help="seconds to begin problems in")
    parser.add_argument("--backward", action="store_true", help="time gradients too")
    parser.add_argument("--append", action="store_true", help="add rows to results.csv")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    gpu = arguments.device == "cuda"
    if gpu and not cuda:
        parser.error("--device cuda: no CUDA device was found; use --device cpu")
    if any(not 0 < keep <= 1 for keep in arguments.keep or []):
        parser.error(f"--keep {arguments.keep}: give shares in (0, 1]")
    arguments.dtype = arguments.dtype or (["bfloat16"] if gpu else ["float32", "bfloat16"])
    arguments.shape = arguments.shape or (["7b"] if gpu else ["3b"])
    arguments.length = arguments.length or ([4096, 16384, 32768, 131072] if gpu else [4096])
    arguments.keep = arguments.keep or [0.25]
    torch.manual_seed(0)
    with dispatch.without(*broken(arguments.device)):
        timed(arguments, gpu)


def timed(arguments: argparse.Namespace, gpu: bool) -> None:
    """Rows and figure, if the results are right."""
    wrong = gate(arguments.device, ("auto", "triton") if gpu else ("auto",))
    if wrong:
        print("wrong results, nothing was timed:", *wrong, sep="\n  ")
        sys.exit(1)
    print("right in " + ", ".join(DTYPES) + ", forward and backward")
    known = provenance(arguments.device)

    def complete(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{c: {**row, **known}.get(c) for c in COLUMNS} for row in rows]

    def keep(rows: list[dict[str, Any]]) -> None:
        if arguments.append:
            append(complete(rows))

    rows = complete(measure(arguments, keep))
    show(rows)
    if len(arguments.length) > 1:
        print(*break_even(rows), sep="\n")
    if arguments.append:
        draw(HERE / "results.csv")
    if arguments.json:
        print(json.dumps({"rows": rows, "machine": known}))


if __name__ == "__main__":
    main()
