"""Two processes on gloo that run `zipr1 train`, forked or as a launcher starts them, and what their runs hold."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from zipr1.core.load import load
from zipr1.train import loop

NONE = {"before": False, "after": False}
RED = {"messages": [{"role": "user", "content": "what color is the two?"}], "answer": "red"}


def write(path: Path, base: Path, **sections: dict[str, Any]) -> Path:
    values: dict[str, Any] = {
        "model": {"path": str(base)},
        "data": {"prompts": 16, "heldout_prompts": 3},
        "sparse": {"probes": {"recent": 3, "random": 6}, "dense_below": 0},
        "budgets": {"low": 0.6, "high": 0.9, "num_generations": 3, "sampling": "independent"},
        "optim": {"lr": 1e-3},
        "ppo": {"minibatches": 2, "kl_coef": 1.0, "dense_kl_fraction": 0.34},
        "efficiency": {"target": 0.5, "method": "cut+pathwise"},
        # Three questions for two ranks, and passes of two rows: the ranks have different numbers of them.
        "train": {"steps": 2, "prompts_per_step": 3, "max_new_tokens": 4, "micro_batch": 2},
    }
    for name, changes in sections.items():
        values[name] = {**values.get(name, {}), **changes}
    path.write_text(yaml.safe_dump(values))
    return path


LIMIT = 6  # seconds without a sign of life, for `impatient`


def hang() -> None:
    time.sleep(10_000)


def impatient() -> None:
    """This rank judges by LIMIT when it waits next: a busy machine must not pass for a rank that hangs."""
    from zipr1.core import watch

    arrive = watch.arrive

    def waits(meeting: bool = True) -> None:
        arrive(meeting)
        watch._watches[-1].judge.limit = LIMIT

    watch.arrive = waits


def at_call(
    rank: int, owner: Any, name: str, call: int, what: Callable[[], None] = hang,
    others: Callable[[], None] = impatient,
) -> None:  # fmt: skip
    """`what` happens in the rank before its call of that number, and `others` in the other ranks before theirs."""
    real, calls = getattr(owner, name), []
    here = int(os.environ["RANK"])  # hidden while a benchmark is measured

    def changed(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            (what if here == rank else others)()
        return real(*arguments, **named)

    setattr(owner, name, changed)


# Imports of torch once for all ranks of this file, not four seconds for each.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["zipr1.cli", "zipr1.train.loop", "torch.distributed.fsdp"])


def be(
    rank: int, ranks: int, port: int, said: Path, before: Callable[[], None] | None, arguments: list[str],
):  # fmt: skip
    """One of several ranks, in its own process."""
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in launched.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"})
    torch.set_num_threads(1)
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.argv = ["zipr1", *arguments, "--device", "cpu"]
        if before is not None:
            before()
        from zipr1.cli import main

        main()


def pair(
    recipe: Path, output: Path, before: Callable[[], None] | None = None, wait: int = 120,
    ranks: int = 2, lost: int | None = None, command: Sequence[str] = (),
) -> tuple[list[int | None], list[str]]:  # fmt: skip
    """Exit codes of two ranks, or more, and what they said. before: called in each, first. lost: a rank that is not
    waited for. command: in place of training as the recipe says."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    said = [recipe.with_name(f"{output.name}-rank{rank}.txt") for rank in range(ranks)]
    arguments = [*(command or ["train", str(recipe)]), "--output", str(output)]
    all_ = [
        FORKS.Process(target=be, args=(rank, ranks, port, said[rank], before, arguments))
        for rank in range(ranks)
    ]
    for process in all_:
        process.start()
    until = time.monotonic() + wait
    try:
        awaited = [process for rank, process in enumerate(all_) if rank != lost]
        for process in awaited:
            process.join(max(0.0, until - time.monotonic()))
        assert all(p.exitcode is not None for p in awaited), "the ranks wait for each other"
    finally:
        for process in all_:
            process.kill()
    return [p.exitcode for p in all_], [path.read_text() for path in said]


def equals_alone(tmp_path: Path, recipe: Path, before: Callable[[], None] | None = None) -> None:
    """Two ranks do what one process does."""
    alone(recipe, tmp_path / "one")
    codes, said = pair(recipe, tmp_path / "two", before)
    assert codes == [0, 0], "".join(said)[-3000:]
    same(tmp_path / "one", tmp_path / "two")


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ACCELERATE = ["accelerate.commands.accelerate_cli", "launch", "--num_processes=2"]


def launch(launcher: list[str], main: list[str], recipe: Path, output: Path):
    """zipr1 as a launcher starts it. main: a script, or `-m` and a module."""
    arguments = ["train", str(recipe), "--output", str(output), "--device", "cpu"]
    return subprocess.run(
        [sys.executable, "-m", *launcher, *main, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=150,
    )  # fmt: skip


def lines(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("seconds", None)
    return rows


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [n for key in sorted(value) for n in numbers(value[key])]
    if isinstance(value, list):
        return [n for one in value for n in numbers(one)]
    return [float(value)] if value is not None else []


def weights(folder: Path):
    return load_file(next((folder / "last").resolve().glob("model/**/*.safetensors")))


def same(one: Path, two: Path) -> None:
    """Metrics, rollouts and weights of two runs agree to rounding."""
    assert len(lines(one)) == len(lines(two)) > 0
    for a, b in zip(lines(one), lines(two), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert numbers(b[key]) == pytest.approx(numbers(a[key]), rel=1e-3, abs=1e-6), key
    if (one / "rollouts.jsonl").exists():
        texts = [
            [json.loads(x)["texts"] for x in (d / "rollouts.jsonl").open()] for d in (one, two)
        ]
        assert texts[0] == texts[1]
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 2e-5
    left, right = (json.loads((d / "summary.json").read_text()) for d in (one, two))
    for moment in ("before", "after"):
        assert numbers(left[moment]) == pytest.approx(numbers(right[moment]), abs=1e-3)


def alone(recipe: Path, output: Path) -> None:
    loop.run(load(recipe), output, "auto", "cpu", ["zipr1"], Console(quiet=True))
