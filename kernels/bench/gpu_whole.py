"""The parts of gpu.py that run zipr1 itself: through its command line, and through `Policy.generate`, by which rollouts
and evaluation decode."""

from __future__ import annotations

import collections
import contextlib
import gc
import io
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from gpu_parts import Context

ROOT = Path(__file__).resolve().parents[2]

# Decoders: Qwen2.5-VL-3B's, and one for a CPU that only has to run.
TEXT = {
    "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
    "num_key_value_heads": 2, "max_position_embeddings": 128000, "vocab_size": 151936,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
}  # fmt: skip
SMALL_TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "vocab_size": 700,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}  # fmt: skip


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "zipr1", *words]


def inside(*words: str) -> dict[str, Any] | None:
    """The command line in this process, where its memory and its waits can be seen; its last line as JSON."""
    said, before = io.StringIO(), sys.argv
    sys.argv = ["zipr1", *words]
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_module("zipr1", run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise RuntimeError(f"zipr1 {words[0]} ended with {end.code}") from None
    finally:
        sys.argv = before
    lines = [line for line in said.getvalue().splitlines() if line.startswith("{")]
    found: dict[str, Any] | None = json.loads(lines[-1]) if lines else None
    return found


# What the host waits for


class Counted(TorchDispatchMode):
    """Operations, and those of them that make a GPU wait for the host: values that Python reads, sizes that depend on
    values. Without a GPU that is what can be counted."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.operations += 1
        self.waits += any(name in str(func) for name in self.WAITS)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def watched(found: collections.Counter[str]) -> Iterator[None]:
    """Counts, by file and line of ours, every time that torch makes the host wait for the GPU."""

    def seen(message: Any, *rest: Any, **more: Any) -> None:
        if "synchroniz" not in str(message):
            return
        frames = [f for f in traceback.extract_stack() if str(ROOT) in f.filename]
        ours = [f for f in frames if "/bench/" not in f.filename]
        for frame in (ours or frames)[-1:]:
            found[f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = seen
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def write_config(context: Context, folder: Path, layers: int | None = None) -> None:
    """A model folder without weights: the embedded model's, with another decoder. Its tower has two small blocks."""
    shutil.copytree(ROOT / "zipr1" / "assets" / "tiny", folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"] | (SMALL_TEXT if context.small else TEXT)
    text["num_hidden_layers"] = layers or text["num_hidden_layers"]
    text["layer_types"] = ["full_attention"] * text["num_hidden_layers"]
    config["text_config"] = text
    config["vision_config"]["out_hidden_size"] = text["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))


def random_weights(context: Context, folder: Path, dtype: torch.dtype) -> Any:
    """A model of that folder, made where it is used: a CPU takes half a minute for three billion random numbers."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder)
    with torch.random.fork_rng(), torch.device(context.device):
        torch.manual_seed(0)
        return AutoModelForImageTextToText.from_config(config, dtype=dtype)


def waits(context: Context) -> None:
    """Waits and launches of a prefill and of a decoding step, and the waits of a training step."""
    layers, length, batch = (2, 96, 2) if context.small else (8, 4096, 2)
    with (
        context.attempt("prefill and decoding"),
        tempfile.TemporaryDirectory() as folder,
        random_instead_of_loaded(context),
    ):
        write_config(context, Path(folder), layers)
        generated(context, folder, layers, length, batch)
    with context.attempt("training step"):
        update(context)


def generated(context: Context, folder: str, layers: int, length: int, batch: int) -> None:
    """Counted launched piece by piece, which is what a captured step repeats; timed both ways."""
    from zipr1.core.recipe import Model, Sparse
    from zipr1.models import decoding
    from zipr1.models.policy import load_policy
    from zipr1.models.processors import Encoded
    from zipr1.models.sparse.request import Request

    dtype = "float32" if context.small else "bfloat16"
    policy = load_policy(Model(path=folder, dtype=dtype), context.device)
    policy.processor.end_ids = [-1]  # no answer ends early
    encoded = []
    for row in range(batch):
        own = length - row * length // (4 * batch)
        places = torch.arange(own).expand(3, -1)
        encoded.append(Encoded(torch.randint(7, 400, (own,)), places, own, (), str(row)))
    features = policy.encode_vision(encoded)
    request = Request(Sparse(p=0.9, skip="layer", dense_below=0))

    def answer(tokens: int) -> None:
        policy.generate(encoded, features, request, tokens)

    answer(3)
    one, many = (counts(context, lambda n=n: answer(n)) for n in (1, 9))  # type: ignore[misc]
    context.row("prefill", layers=layers, tokens=length, rows=batch, waits=one[0], launches=one[1])
    wait, launch = ((b - a) / 8 for a, b in zip(one[:2], many[:2], strict=True))
    context.row("decoding step", layers=layers, rows=batch, waits=wait, launches=launch)
    for place, times in one[2].most_common(12):
        context.row(f"waits in prefill at {place}", times=times)
    for place, times in (many[2] - one[2]).most_common(6):
        context.row(f"waits in eight steps at {place}", times=times)
    stock = decoding.CAPTURED
    ways = (
        {"captured": stock, "eager": sys.maxsize} if context.device == "cuda" else {"eager": stock}
    )
    for way, least in ways.items():
        with context.attempt(f"32 tokens, {way}"):
            decoding.CAPTURED = least
            try:
                seconds = [timed(context, lambda n=n: answer(n)) for n in (1, 33)]  # type: ignore[misc]
            finally:
                decoding.CAPTURED = stock
            prefill, whole = (1e3 * x for x in seconds)
            told = {"prefill_ms": prefill, "decoding_ms": whole - prefill}
            context.row(f"32 tokens, {way}", layers=layers, rows=batch, **told)
    if context.device == "cuda":
        seen = traced(lambda: answer(2))
        path = context.out / "trace.json"
        seen.export_chrome_trace(str(path))
        if path.stat().st_size > 15 * 2**20:  # more does not come back from a lent machine
            path.unlink()


def timed(context: Context, run: Callable[[], object]) -> float:
    """Seconds, the better of two; what is captured is captured each time, and counted."""
    found = []
    for _ in range(2):
        begin = time.perf_counter()
        run()
        if context.device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return min(found)


def traced(run: Callable[[], object]) -> Any:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    return seen


def counts(
    context: Context, run: Callable[[], object]
) -> tuple[int, int, collections.Counter[str]]:
    """Waits, launches, and where the waits are."""
    places: collections.Counter[str] = collections.Counter()
    if context.device == "cpu":
        with Counted() as seen:
            run()
        return seen.waits, seen.operations, places
    launches = sum(e.count for e in traced(run).key_averages() if "LaunchKernel" in e.key)
    with watched(places):
        run()
    return sum(places.values()), launches, places


def update(context: Context) -> None:
    """A training step on the embedded model, its waits by line."""
    words = [
        "train",
        str(ROOT / "recipes" / "tiny.yaml"),
        "train.steps=1",
        "train.save_every=0",
        "--json",
    ]
    words += [
        "data.prompts=32",
        "data.heldout_prompts=4",
        "evaluation.before=false",
        "evaluation.after=false",
    ]
    words += ["train.prompts_per_step=4", "--device", context.device]
    places: collections.Counter[str] = collections.Counter()
    watching = watched(places) if context.device == "cuda" else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as folder, watching:
        inside(*words, "--output", f"{folder}/run")
    context.row("training run of one step", waits=sum(places.values()))
    for place, times in places.most_common(15):
        context.row(f"waits in training at {place}", times=times)


# The whole


def profile(context: Context) -> None:
    """`zipr1 profile`: dense and sparse side by side, with the models' real widths."""
    wishes = {
        "3b": ["--model", "qwen2.5-vl-3b", "--lengths", "4096,16384", "--batch", "1,4", "--seconds", "1"],
        "7b, 8 layers": ["--model", "qwen2.5-vl-7b", "--lengths", "32768", "--layers", "8", "--seconds", "1"],
        "3b without cudnn": ["--model", "qwen2.5-vl-3b", "--lengths", "4096", "--seconds", "0.5"],
    }  # fmt: skip
    if context.small:
        wishes = {"tiny": ["--model", "tiny", "--lengths", "64", "--seconds", "0"]}
    found: dict[str, Any] = {}
    for name, wish in wishes.items():
        if context.left() < 8 and not context.small:
            context.row(name, None, note="no time was left")
            continue
        with context.attempt(name), tempfile.TemporaryDirectory() as folder:
            words = ["profile", *wish, "--json", "--output", folder, "--device", context.device]
            script = command(*words)
            if "cudnn" in name:  # dense decoding builds a plan for each token by it
                off = "import runpy, sys, torch; torch.backends.cuda.enable_cudnn_sdp(False)"
                run = f"sys.argv = {['zipr1', *words]!r}; runpy.run_module('zipr1', run_name='__main__')"
                script = [sys.executable, "-c", f"{off}; {run}"]
            done = subprocess.run(
                script, capture_output=True, text=True, timeout=max(1.0, context.left())
            )
            print(done.stderr[-3000:])
            if done.returncode:
                raise RuntimeError(done.stderr.strip().splitlines()[-1])
            found[name] = json.loads(done.stdout.strip().splitlines()[-1])
            (context.out / "profile.json").write_text(json.dumps(found) + "\n")
            for row in found[name]["rows"]:
                wanted = (
                    "length",
                    "batch",
                    "keep",
                    "skip",
                    "ms",
                    "speedup",
                    "bound",
                    "peak_bytes",
                    "error",
                )
                told = {k: row[k] for k in wanted if row.get(k) is not None}
                context.row(f"{name}: {row['phase']}", "error" not in row, **told)


def tiny(context: Context) -> None:
    """`zipr1 train` on the embedded model: finite, seconds a step, and the tokens that the CPU keeps."""
    steps = 2 if context.small else 30
    words = [
        "train",
        str(ROOT / "recipes" / "tiny.yaml"),
        f"train.steps={steps}",
        "train.save_every=0",
        "--json",
    ]
    words += ["data.prompts=512", "data.heldout_prompts=64"]
    if context.small:
        words[-2:] = [
            "data.prompts=32",
            "data.heldout_prompts=4",
            "train.prompts_per_step=4",
            "evaluation.before=false",
        ]
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        beside = None
        if not context.small:
            cpu = command(*words, "--device", "cpu", "--output", str(folder / "cpu"))
            few = {**os.environ, "OMP_NUM_THREADS": "4"}  # the other one needs its host
            beside = subprocess.Popen(
                cpu, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=few
            )
        try:
            run = command(*words, "--device", context.device, "--output", str(folder / "run"))
            done = subprocess.run(
                run, capture_output=True, text=True, timeout=max(1.0, context.left())
            )
            print(done.stderr[-3000:])
            if done.returncode:
                raise RuntimeError(done.stderr.strip().splitlines()[-1])
            shutil.copy(folder / "run" / "run.json", context.out / "run.json")
            lines = metrics(folder / "run")
            first = None
            while beside is not None and first is None and context.left() > 2:
                first = next(iter(metrics(folder / "cpu")), None)
                time.sleep(0.2)
        finally:
            if beside is not None:
                beside.kill()
                beside.wait()
    losses = [line["loss"] for line in lines]
    context.row("finite", all(map(math.isfinite, losses)) and len(lines) == steps, steps=len(lines))
    phases(context, "seconds", lines)
    if first is not None:
        ratios = lines[0]["token_ratio"], first["token_ratio"]
        context.row(
            "kept in step 0", abs(ratios[0] - ratios[1]) < 0.01, here=ratios[0], cpu=ratios[1]
        )


def metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return (
        [json.loads(x) for x in path.read_text().splitlines() if x.endswith("}")]
        if path.exists()
        else []
    )


def phases(context: Context, name: str, lines: list[dict[str, Any]], **more: Any) -> None:
    """Seconds of a step by phase; the first, which compiles and warms up, apart."""
    steps = [line["seconds"] for line in lines]
    later = steps[1:] or steps
    mean = {k: sum(s[k] for s in later) / len(later) for k in later[0]}
    context.row(name, step=sum(mean.values()), **mean, first=sum(steps[0].values()), **more)


def step(context: Context) -> None:
    """Reinforcement learning at the size of a 3B: seconds a step by phase, and memory beside what is counted."""
    with tempfile.TemporaryDirectory() as text, random_instead_of_loaded(context):
        folder = Path(text)
        recipe = big_recipe(context, folder)
        device = ["--device", context.device, "--json"]
        plan = None
        with context.attempt("plan"):
            plan = inside("train", str(recipe), "--dry-run", *device)
        for name, change in (
            ("step", ()),
            ("step with through", ("efficiency.method=pathwise+through",)),
        ):
            if context.left() < 10 and not context.small:
                context.row(name, None, note="no time was left")
                continue
            with context.attempt(name):
                gc.collect()
                if context.device == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                output = folder / name.replace(" ", "-")
                inside("train", str(recipe), *change, "--output", str(output), *device)
                peak = torch.cuda.max_memory_allocated() if context.device == "cuda" else 0
                counted = ((plan or {}).get("memory") or {}).get("peak", 0)
                lines = metrics(output)
                phases(context, name, lines, peak_gib=peak / 2**30, counted_gib=counted / 2**30)
                context.row(f"{name}: finite", all(math.isfinite(x["loss"]) for x in lines))


@contextlib.contextmanager
def random_instead_of_loaded(context: Context) -> Iterator[None]:
    """transformers' loader gives random weights: reinforcement learning wants a folder, and none of 6 GB lies here."""
    from transformers import AutoModelForImageTextToText as Auto

    stock = Auto.from_pretrained

    def made(folder: str, *rest: Any, dtype: torch.dtype, **options: Any) -> Any:
        keys = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        nothing: dict[str, list[str]] = {key: [] for key in keys}
        return random_weights(context, Path(folder), dtype), nothing

    Auto.from_pretrained = made
    try:
        yield
    finally:
        Auto.from_pretrained = stock


def big_recipe(context: Context, folder: Path) -> Path:
    """A recipe (JSON is YAML) and its rows: pictures of 1,280 tokens, answers of 32, 4 questions by 4 budgets."""
    import numpy as np
    from PIL import Image

    high, wide = (96, 64) if context.small else (640, 512)  # 16 x 16 pixels a token
    random = np.random.default_rng(0)
    rows = []
    for i in range(4):
        pixels = random.integers(0, 255, (high, wide, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": "<image>what is here", "answer": "one"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_config(context, folder / "model")
    recipe = {
        "model": {
            "path": str(folder / "model"), "dtype": "float32" if context.small else "bfloat16",
            "gradient_checkpointing": True, "lora": {"rank": 4 if context.small else 64, "alpha": 128},
            "min_pixels": high * wide, "max_pixels": high * wide,
        },
        "data": {
            "source": str(folder / "rows.jsonl"), "heldout": str(folder / "rows.jsonl"), "heldout_prompts": 4,
            "max_prompt_tokens": 2048,
        },
        "sparse": {"p": 0.9, "skip": "layer", "dense_below": 0},
        "budgets": {"num_generations": 4},
        "efficiency": {"method": "pathwise", "max_accuracy_drop": None},
        "ppo": {"kl_coef": 0.5, "kl_estimator": "full"},
        "optim": {"lr": 1.0e-4},
        "train": {
            "steps": 2 if context.small else 3, "prompts_per_step": 4, "micro_batch": 4,
            "max_new_tokens": 4 if context.small else 32, "save_every": 0,
        },
        "evaluation": {"before": False, "after": False, "batch": 4},
    }  # fmt: skip
    path = folder / "big.yaml"
    path.write_text(json.dumps(recipe))
    return path
