"""The parts of gpu.py, each for a process of its own: `python kernels/bench/gpu_parts.py PART [WHICH] --rows FILE ...`.

Here: the machine, and the checks of the kernels. Their times are in gpu_times.py, what runs zipr1 itself in
gpu_whole.py. A part writes rows as it goes and may be ended at any moment; it looks at `Context.left()` before it
begins something long.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent)]

import gpu_times  # noqa: E402
import gpu_whole  # noqa: E402
from cases import SHAPES, Problem, Run  # noqa: E402
from run import Clock  # noqa: E402
from zipr1_kernels import (  # noqa: E402
    Kept,
    kv_compact,
    norm_rope,
    pack_indices,
    packed_attention,
    probe_scores,
    ran,
    select_threshold,
    select_top_k,
    select_top_p,
    sparse_decode,
    sparse_prefill,
    use,
)

Choose = Callable[..., torch.Tensor]


class Context:
    """What every part is given: where rows go, how long it may take, and whether it is the small one."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.part, self.which, self.small = arguments.part, arguments.which, arguments.small
        self.rows, self.out = arguments.rows, arguments.out
        self.end = time.monotonic() + arguments.seconds
        self.device = "cpu" if self.small else "cuda"

    def left(self) -> float:
        return self.end - time.monotonic()

    def row(self, name: str, ok: bool | None = True, **values: Any) -> None:
        line = {"part": self.part, "which": self.which, "name": name, "ok": ok, **values}
        with self.rows.open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")
        print(json.dumps(line, default=str), flush=True)

    def broken(self) -> None:
        """Leave if the GPU is in error: nothing that this process does on it afterwards can be believed."""
        if self.device == "cuda":
            try:
                torch.cuda.synchronize()
            except Exception as error:  # noqa: BLE001
                sys.exit(f"the GPU is in error: {str(error).splitlines()[0]}")

    @contextlib.contextmanager
    def attempt(self, name: str, **values: Any) -> Iterator[None]:
        """What goes wrong inside is a row, and the part goes on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            said = (str(error).splitlines() or [""])[0][:200]
            self.row(name, False, note=f"{type(error).__name__}: {said}", **values)
            self.broken()


# The machine


def machine(context: Context) -> None:
    env = describe(context)
    (context.out / "env.json").write_text(json.dumps(env, indent=1, default=str) + "\n")
    context.row(
        "stack", **{k: env[k] for k in ("gpu", "torch", "triton", "transformers", "missing")}
    )
    clock, size = Clock(context.device), 256 if context.small else 8192
    x = torch.randn(size, size, device=context.device, dtype=torch.bfloat16)
    source = torch.empty(2**18 if context.small else 2**30, device=context.device)
    target = torch.empty_like(source)
    runs: dict[str, Run] = {"matmul": lambda: x @ x, "copy": lambda: target.copy_(source)}
    times = clock.turns(runs, 10, 1)
    flops, moved = 2 * size**3 / times["matmul"][1], 2 * source.nbytes / times["copy"][1]
    context.row("ceilings", matmul_tflops=flops / 1e9, copy_gb_s=moved / 1e6)
    small = torch.zeros(8, device=context.device)
    begin = time.perf_counter()
    for _ in range(1000):
        small.add_(1)
    launched = (time.perf_counter() - begin) * 1000
    begin = time.perf_counter()
    for _ in range(100):
        small[0].item()
    waited = (time.perf_counter() - begin) * 10000
    context.row("host", launch_us=launched, wait_us=waited)


def describe(context: Context) -> dict[str, Any]:
    """Versions, the card, and in which order torch tries its attentions. Nothing here may stop the rest."""
    import importlib.metadata as metadata

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return ""

    names = (
        "torch",
        "triton",
        "transformers",
        "numpy",
        "peft",
        "pydantic",
        "av",
        "decord",
        "typer",
    )
    env: dict[str, Any] = {"python": platform.python_version(), **{n: version(n) for n in names}}
    env["missing"] = ", ".join(n for n in names if not env[n]) or "nothing"
    env |= {"cpus": os.cpu_count(), "cuda": torch.version.cuda, "gpu": "none"}
    env["compiler"] = shutil.which("gcc") or shutil.which("clang")
    with contextlib.suppress(Exception):
        env["cudnn"] = torch.backends.cudnn.version()
        env["attention_order"] = [str(x) for x in torch._C._get_sdp_priority_order()]
    if context.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        env |= {"gpu": card.name, "capability": f"{card.major}.{card.minor}"}
        env |= {"multiprocessors": card.multi_processor_count, "memory": card.total_memory}
        with contextlib.suppress(Exception):
            done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=10)
            env["nvidia_smi"] = done.stdout.splitlines()[:15]
    with contextlib.suppress(Exception):
        ask = ["git", "rev-parse", "--short", "HEAD"]
        env["commit"] = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return env


# Is every kernel right?


def poison(context: Context) -> None:
    """Leave NaN in the memory that the next allocations get: what a kernel does not write must not look right."""
    if context.device == "cuda":
        sizes = [2**k for k in range(8, 26) for _ in range(4)]
        held = [torch.full((n,), torch.nan, device="cuda") for n in sizes]
        del held


def ops(context: Context) -> None:
    """One operation, ragged rows, by its kernel beside float64; outputs poisoned, and twice the same to the bit."""
    length = 40 if context.small else 1000
    dims = (32,) if context.small else (128, 64)
    for dim in dims:
        for dtype in (torch.bfloat16,) if context.small else (torch.bfloat16, torch.float16):
            case = f"D {dim} {str(dtype).removeprefix('torch.')}"
            if context.which == "select_top_p":
                if dtype == torch.bfloat16 and dim == dims[0]:
                    for tokens in (length, 9000 if context.small else 20_000):  # searched, sorted
                        selections(context, 3, tokens)
                continue
            with context.attempt(case, op=context.which):
                compare(context, case, length, dim, dtype)
    if context.left() > 0:
        context.row("all checks made")


def tensor(context: Context, *shape: int, seed: int) -> torch.Tensor:
    """`(B, H, L, D)`, laid out as projections lay them out, in float64."""
    generator = torch.Generator(context.device).manual_seed(seed)
    batch, heads, length, dim = shape
    x = torch.randn(batch, length, heads, dim, generator=generator, device=context.device)
    return x.double().transpose(1, 2)


def chosen(context: Context, rows: int, length: int) -> Kept:
    generator = torch.Generator(context.device).manual_seed(1)
    share = torch.linspace(0.1, 0.9, rows, device=context.device)[:, None]
    keep = torch.rand(rows, length, generator=generator, device=context.device) < share
    keep[:, length // 2] = True
    with use("torch"):
        return pack_indices(keep)


def problem_of(
    context: Context, length: int, dim: int
) -> tuple[Callable[..., Any], list[torch.Tensor], bool]:
    """The operation as a function of tensors, the tensors in float64, and whether it has gradients."""
    rows, q_heads, heads = 3, 8, 2
    kept = chosen(context, rows, length)
    q = tensor(context, rows, q_heads, length, dim, seed=2)
    k, v = (tensor(context, rows, heads, length, dim, seed=s) for s in (3, 4))
    op = context.which
    if op == "sparse_prefill":
        dropped = ~kept.keep[:, None, :, None]
        poisoned = [x.masked_fill(dropped, torch.nan) for x in (q, k, v)]
        return lambda *x: sparse_prefill(*x, kept), poisoned, True
    if op == "packed_attention":
        flat = [x.transpose(1, 2).flatten(0, 1).index_select(0, kept.flat) for x in (q, k, v)]
        return lambda *x: packed_attention(*x, kept), flat, True
    if op == "kv_compact":
        return lambda k, v: kv_compact(k, v, kept), [k, v], False
    if op == "norm_rope":
        cos, sin = (tensor(context, rows, 1, length, dim, seed=s)[:, 0] for s in (5, 6))
        weight = tensor(context, 1, 1, 1, dim, seed=7).flatten()
        return lambda x, *y: norm_rope(x, *y), [q.transpose(1, 2), cos, sin, weight], True
    if op == "sparse_decode":
        with use("torch"):
            small = kv_compact(k, v, kept)
        return lambda q, k, v: sparse_decode(q, k, v, kept.real), [q[:, :, :1], *small], False
    assert op == "probe_scores", op
    count = min(128, length)
    probes = torch.arange(length - count, length, device=context.device).expand(rows, -1)
    probes = probes - probes % 3
    probes[0, : count // 4] = -1
    every = torch.ones(rows, length, dtype=torch.bool, device=context.device)
    every[2, : length // 5] = False

    def score(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return probe_scores(q, k, probes, every)

    return score, [q[:, :, :count], k], True


def results(
    function: Callable[..., Any], inputs: list[torch.Tensor], path: str, graded: bool
) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_(graded) for x in inputs]
    with use(path):
        out = function(*leaves)
        outs = [out] if isinstance(out, torch.Tensor) else list(out)
        if graded:
            # The same for all dtypes; where nothing is to be read it is not read.
            grad = torch.linspace(-1, 1, outs[0].numel(), device=outs[0].device).view_as(outs[0])
            outs += torch.autograd.grad(outs[0], leaves, grad.to(outs[0].dtype))
    return [x.detach() for x in outs]


def compare(context: Context, case: str, length: int, dim: int, dtype: torch.dtype) -> None:
    """Off by at most twice what torch in the same dtype is off by, or by a unit in the last place of the largest."""
    op = context.which
    function, exact, graded = problem_of(context, length, dim)
    low = [x.to(dtype) for x in exact]
    right = results(function, [x.double() for x in low], "torch", graded)
    usual = results(function, low, "torch", graded)
    path = "auto" if op == "packed_attention" else "triton"
    poison(context)
    found = results(function, low, path, graded)
    taken = ran(op)
    poison(context)
    again = results(function, low, path, graded)
    names = {
        "kv_compact": ["output", "second output"],
        "norm_rope": ["output", "dx", "dcos", "dsin", "dweight"],
    }.get(op, ["output", "dq", "dk", "dv"])
    for name, a, b, c, d in zip(names, right, usual, found, again, strict=False):
        allowed = 2 * (b.double() - a).abs().max() + torch.finfo(dtype).eps * a.abs().max()
        error = (c.double() - a).abs().max()
        ok = bool(error <= allowed) and bool(c.isfinite().all())
        same = torch.equal(c, d)
        # torch's own backward pass adds up in an order that varies.
        ok = ok and (same or op == "packed_attention")
        context.row(
            f"{case} {name}", ok, op=op, error=float(error), allowed=float(allowed), twice_the_same=same, path=taken
        )  # fmt: skip


def selections(context: Context, rows: int, length: int) -> None:
    """The three rules and packing against plain torch; tokens may differ where their sums are within 1e-5."""
    generator = torch.Generator(context.device).manual_seed(7)

    def draw() -> torch.Tensor:
        return torch.rand(rows, length, generator=generator, device=context.device)

    scores, candidates, always = draw().pow(4), draw() < 0.95, draw() < 0.01
    p = torch.linspace(0.3, 0.97, rows, device=context.device)
    wishes: list[tuple[str, Choose, torch.Tensor]] = [
        ("select_top_p", select_top_p, p),
        ("select_top_k", select_top_k, (p * length / 2).long()),
        ("select_threshold", select_threshold, 2 * p),
    ]
    for op, choose, amount in wishes:
        case = f"{op} of {length}"
        with context.attempt(case, op=op):
            poison(context)
            with use("triton"):
                keep = choose(
                    scores.masked_fill(~candidates, torch.nan), amount, candidates, always
                )
            taken = ran(op)
            with use("torch"):
                near = torch.where(candidates, scores, 0).double()
                want = choose(near, amount, candidates, always)
                # Only what both neighbours of the amount agree on has to be the same.
                factors = (1, 1) if op == "select_top_k" else (1 - 1e-5, 1 + 1e-5)
                below, above = (choose(near, amount * f, candidates, always) for f in factors)
            sure = below == above
            wrong = int(((keep != want) & sure).sum())
            context.row(case, wrong == 0, op=op, wrong=wrong, kept=int(keep.sum()), path=taken)
    with context.attempt("packing", op="pack_indices"):
        poison(context)
        keep = candidates & (scores > 0.1)
        with use("triton"):
            got = pack_indices(keep)
        taken = ran("pack_indices")
        with use("torch"):
            want_kept = pack_indices(keep)
        same = [
            torch.equal(getattr(got, x), getattr(want_kept, x))
            for x in ("index", "count", "flat", "starts")
        ]
        context.row(f"packing of {length}", all(same), op="pack_indices", path=taken)


# Files under tests/ that have tests for a GPU; test_gpu_script.py sees that none is missing.
KERNEL_TESTS = (
    "kernels/test_triton.py", "kernels/test_large.py", "kernels/test_packed_attention.py", "kernels/test_dispatch.py",
)  # fmt: skip
OTHER_TESTS = ("models/test_waits.py",)


# pytest, which an interrupt ends wherever it was started from: a shell's background commands ignore one.
PYTEST = (
    "import signal, sys, pytest; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "sys.exit(pytest.main(sys.argv[1:]))"
)


def interrupted(process: subprocess.Popen[Any], grace: float) -> None:
    """pytest is ended, and writes what it has found so far; where a test hears no interrupt it is killed."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def tests(context: Context) -> None:
    """The kernels' own tests, on the kernels that will be used; and what a GPU waits for and captures."""
    target = context.out / "tests.xml"
    target.unlink(missing_ok=True)
    command = [sys.executable, "-c", PYTEST, "-q", "-p", "no:cacheprovider", f"--junitxml={target}"]
    command += [str(ROOT / "tests" / name) for name in (*KERNEL_TESTS, *OTHER_TESTS)]
    if importlib.util.find_spec("xdist") and not context.small:
        command += ["-n", "4"]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", "60"]
    others = " or ".join(Path(name).stem for name in OTHER_TESTS)
    # Of those that know no kernel only what needs a GPU: the rest counts on a CPU, with a stand-in.
    wanted = "compaction or by_hand or signature" if context.small else f"not ({others}) or gpu"
    command += ["-k", wanted]
    environment = {k: v for k, v in os.environ.items() if k != "ZIPR1_KERNELS"}
    process, cut = subprocess.Popen(command, cwd=ROOT, env=environment), ""
    grace = min(15.0, max(0.0, context.left()) / 4)
    try:
        process.wait(max(1.0, context.left() - grace))
    except subprocess.TimeoutExpired:
        cut = "ended by its time limit"
        interrupted(process, grace * 2 / 3)
    if not target.exists():
        context.row("pytest", False, note=cut or f"exit code {process.returncode}, no results")
        return
    found = xml.etree.ElementTree.parse(target).getroot()
    for case in found.iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            context.row(f"{case.get('classname')}::{case.get('name')}", False)
    counts = {
        k: sum(int(suite.get(k, 0)) for suite in found.iter("testsuite"))
        for k in ("tests", "failures", "errors", "skipped")
    }
    told = {"note": cut} if cut else {}
    context.row("pytest", counts["tests"] > 0 and not cut, **counts, **told)


def shapes(context: Context) -> None:
    """Real shapes, head dimension 128: sampled rows against float64."""
    places = [
        ("7b", 4096, 1),
        ("7b", 4096, 8),
        ("3b", 16384, 8),
        ("7b", 32768, 1),
        ("7b", 131072, 1),
    ]
    if context.small:
        places = [("7b", 96, 2)]
    for shape, length, batch in places:
        if context.left() < 12 and not context.small:
            context.row(f"{shape} {length}x{batch}", None, note="no time was left")
            continue
        with context.attempt(f"{shape} {length}x{batch}", op="sparse_prefill"):
            dtype = torch.float32 if context.small else torch.bfloat16
            problem = Problem(
                SHAPES[shape], length, 0.25, dtype, context.device, batch, ragged=batch > 1
            )
            sampled(context, f"{shape} {length}x{batch}", problem)
        if context.device == "cuda":
            torch.cuda.empty_cache()
    for length in (300,) if context.small else (131_072, 200_000):
        selections(context, 2, length)


def sampled(context: Context, name: str, problem: Problem) -> None:
    """64 kept queries of a row by each path, and the scores, beside float64."""
    b = problem.batch - 1
    count = int(problem.kept.count[b])
    slots = problem.kept.index[b, :count]
    places = torch.linspace(0, count - 1, min(64, count), device=context.device).long().unique()
    groups = problem.shape.q_heads // problem.shape.heads
    q = problem.q[b][:, slots[places]].double()
    k, v = (x[b][:, slots].double().repeat_interleave(groups, 0) for x in (problem.k, problem.v))
    logits = q @ k.mT * problem.shape.dim**-0.5
    late = torch.arange(count, device=context.device) > places[:, None]
    right = logits.masked_fill(late, -torch.inf).softmax(-1) @ v
    del logits, k, v
    tensors = (problem.q, problem.k, problem.v)
    eps = max(torch.finfo(problem.q.dtype).eps, 1e-5)
    for path in ("auto", "triton"):
        op = "sparse_prefill" if path == "triton" else "packed_attention"
        with context.attempt(f"{name} {path}", op=op), torch.no_grad(), use(path):
            poison(context)
            out = sparse_prefill(*tensors, problem.kept)
            found = out[b][:, slots[places]].double()
            error = float((found - right).abs().max() / right.abs().max())
            taken = ran("sparse_prefill")
            context.row(f"{name} {path}", error <= 2 * eps, op=op, relative=error, path=taken)
    with context.attempt(f"{name} scores", op="probe_scores"), torch.no_grad():
        with use("torch"):
            wide = Problem.score(problem).double()
        with use("triton"):
            scores = problem.score().double()
        error = (scores - wide).abs().max() / wide.abs().max()
        context.row(f"{name} scores", bool(error <= 2e-2), op="probe_scores", relative=float(error))
    with context.attempt(f"{name} decode", op="sparse_decode"), torch.no_grad():
        with use("torch"):
            plain = problem.decode().double()
        with use("triton"):
            error = (problem.decode().double() - plain).abs().max() / plain.abs().max()
        context.row(f"{name} decode", bool(error <= 4 * eps), op="sparse_decode", relative=float(error))  # fmt: skip


def memcheck(context: Context) -> None:
    """One small case of each kernel under the driver's memory checker."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        context.row("compute-sanitizer", None, note="not installed")
        return
    script = (
        f"import sys; sys.path[:0] = [{str(ROOT / 'tests' / 'kernels')!r}]; "
        "import test_dispatch; test_dispatch.every_operation(); print('ran')"
    )
    done = subprocess.run(
        [tool, "--tool", "memcheck", "--error-exitcode", "7", sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=max(1.0, context.left()),
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    print(done.stdout[-3000:], done.stderr[-3000:])
    said = [x for x in done.stdout.splitlines() if "ERROR SUMMARY" in x]
    ok = done.returncode == 0 and "ran" in done.stdout
    context.row("memcheck", ok, note=said[-1].strip("= ") if said else done.stdout[-120:])


PARTS: dict[str, Callable[[Context], None]] = {
    "machine": machine,
    "ops": ops,
    "tests": tests,
    "shapes": shapes,
    "memcheck": memcheck,
    "timing": gpu_times.timing,
    "waits": gpu_whole.waits,
    "profile": gpu_whole.profile,
    "tiny": gpu_whole.tiny,
    "step": gpu_whole.step,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("which", nargs="?", default="")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    PARTS[arguments.part](Context(arguments))


if __name__ == "__main__":
    main()
