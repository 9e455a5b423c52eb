"""Two processes on gloo against one: the same questions, the same groups, the same gradients to rounding."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinymodels
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from zipr1.core import distributed
from zipr1.core.errors import InputError
from zipr1.core.recipe import load
from zipr1.data import sources, video
from zipr1.models import encoder
from zipr1.train import loop

NONE = {"before": False, "after": False}
RED = {"messages": [{"role": "user", "content": "what color is the two?"}], "answer": "red"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tinymodels.make().save(folder)
    return folder


def write(path: Path, base: Path, **sections: dict[str, Any]) -> Path:
    values: dict[str, Any] = {
        "model": {"path": str(base)},
        "data": {"prompts": 16, "heldout_prompts": 3},
        "sparse": {"probes": {"recent": 3, "random": 6}, "dense_below": 0},
        "budgets": {"low": 0.6, "high": 0.9, "count": 3},
        "optim": {"lr": 1e-3},
        "ppo": {"minibatches": 2, "kl": 1.0, "dense": 0.34},
        "efficiency": {"target": 0.5, "method": "cut+pathwise"},
        # Three questions for two ranks, and passes of two rows: the ranks have different numbers of them.
        "train": {"steps": 2, "prompts": 3, "max_new_tokens": 4, "micro_batch": 2},
    }
    for name, changes in sections.items():
        values[name] = {**values.get(name, {}), **changes}
    path.write_text(yaml.safe_dump(values))
    return path


# Imports of torch once for all ranks of this file, not four seconds for each.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["zipr1.cli", "zipr1.train.loop", "torch.distributed.fsdp"])


def be(rank: int, port: int, said: Path, before: Callable[[], None] | None, arguments: list[str]):
    """One of two ranks, in its own process."""
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in launched.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"})
    torch.set_num_threads(1)
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.argv = ["zipr1", "train", *arguments, "--device", "cpu"]
        if before is not None:
            before()
        from zipr1.cli import main

        main()


def pair(
    recipe: Path, output: Path, before: Callable[[], None] | None = None, wait: int = 120
) -> tuple[list[int | None], list[str]]:
    """Exit codes of two ranks, and what they said. before: called in each, first."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    said = [recipe.with_name(f"{output.name}-rank{rank}.txt") for rank in range(2)]
    arguments = [str(recipe), "--output", str(output)]
    both = [
        FORKS.Process(target=be, args=(rank, port, said[rank], before, arguments))
        for rank in range(2)
    ]
    for process in both:
        process.start()
    until = time.monotonic() + wait
    try:
        for process in both:
            process.join(max(0.0, until - time.monotonic()))
        assert all(p.exitcode is not None for p in both), "the ranks wait for each other"
    finally:
        for process in both:
            process.kill()
    return [p.exitcode for p in both], [path.read_text() for path in said]


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


@pytest.mark.parametrize(
    ("kind", "launcher"), [("ddp", TORCHRUN), ("fsdp", [*ACCELERATE, "--use_fsdp"])]
)
def test_two_processes_are_one(tmp_path, model, kind, launcher):
    recipe = write(tmp_path / "r.yaml", model, train={"parallel": kind})
    alone(recipe, tmp_path / "one")
    done = launch(launcher, ["-m", "zipr1"], recipe, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    same(tmp_path / "one", tmp_path / "two")
    # The first rank alone speaks and writes.
    assert done.stdout.count("everything is in") == 1


def say_dtypes() -> None:
    from zipr1.models.policy import Policy

    stock = Policy.head

    def head(self: Any, hidden: torch.Tensor, model: Any = None) -> torch.Tensor:
        print(f"computed in {hidden.dtype} with {(model or self.core).lm_head.weight.dtype}")
        return stock(self, hidden, model)

    Policy.head = head


def test_steps_too_small_for_bfloat16_land_in_the_shards_that_it_is_gathered_from(tmp_path, model):
    optim = {"lr": 1e-6, "weight_decay": 0.0, "schedule": "constant", "warmup": 0.0}
    sharded = {"parallel": "fsdp", "param_dtype": "bfloat16"}
    recipe = write(tmp_path / "r.yaml", model, optim=optim, train=sharded, evaluation=NONE)
    codes, said = pair(recipe, tmp_path / "two", say_dtypes)
    assert codes == [0, 0], "".join(said)[-3000:]
    used = {line for text in said for line in text.splitlines() if line.startswith("computed in")}
    assert used == {"computed in torch.bfloat16 with torch.bfloat16"}
    before, after = load_file(next(model.glob("*.safetensors"))), weights(tmp_path / "two")
    large = [k for k in before if float(before[k].abs().median()) > 1e-3 and "visual" not in k]
    assert large and all(after[k].dtype == before[k].dtype for k in large)
    for name in large:
        assert 0 < float((after[name] - before[name]).abs().max()) < 1e-5
        # In bfloat16 itself hardly one of the larger weights would have changed.
        big = before[name].abs() > 1e-2
        unmoved = after[name][big].bfloat16() == before[name][big].bfloat16()
        assert len(unmoved) and float(unmoved.float().mean()) > 0.9


def shown(kind: str, *names: str) -> dict[str, Any]:
    items = [{"type": kind} for _ in names]
    text = {"type": "text", "text": "which?"}
    return {
        "messages": [{"role": "user", "content": [*items, text]}],
        f"{kind}s": list(names),
        "answer": "red",
    }


def dealt(recipe: Path, wanted: list[list[int]]) -> int:
    """A seed with which the first step gives these rows to the two ranks."""
    made = load(recipe)
    for seed in range(1000):
        rows = sources.load(made.data, "train", seed)
        ids = [p.id for p in sources.load(made.data, "train", 0)]
        drawn = [ids.index(p.id) for p in sources.Deck(rows, seed, made.train.prompts).draw(0)]
        if [sorted(drawn[0::2]), sorted(drawn[1::2])] == wanted:
            return seed
    raise AssertionError("no such seed")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ddp", {"train_vision": True, "gradient_checkpointing": True}),
        ("ddp", {}),
        ("fsdp", {"train_vision": True, "gradient_checkpointing": True}),
        ("fsdp", {}),
        ("fsdp", {"lora": {"rank": 4, "alpha": 8}, "gradient_checkpointing": True}),
    ],
    ids=["ddp-vision", "ddp", "fsdp-vision", "fsdp", "fsdp-lora"],
)
def test_ranks_with_text_pictures_and_clips_wait_for_nobody(tmp_path, model, kind, settings):
    """The first rank has text alone, the second a picture and a clip."""
    Image.new("RGB", (64, 48), "red").save(tmp_path / "a.png")
    noise = np.random.default_rng(0).integers(0, 256, (6, 64, 48, 3), np.uint8)
    video.write(tmp_path / "b.mp4", noise, 4.0)
    rows = [RED, shown("image", "a.png"), {**RED, "answer": "blue"}, shown("video", "b.mp4")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {
        "model": settings,
        "data": {"source": str(tmp_path / "rows.jsonl"), "heldout": str(tmp_path / "rows.jsonl")},
        "train": {"parallel": kind, "prompts": 4, "steps": 1},
    }
    recipe = write(tmp_path / "r.yaml", model, **sections)
    seed = dealt(recipe, [[0, 2], [1, 3]])
    recipe.write_text(recipe.read_text() + f"seed: {seed}\n")
    equals_alone(tmp_path, recipe)


def cannot_decode() -> None:
    """b.png is found bad only when its turn comes, as clips are."""
    from zipr1.data import media
    from zipr1.models import encoder

    def load_media(one: Any, *arguments: Any) -> Any:
        if Path(one.source).name == "b.png":
            raise InputError("the clip is damaged")
        return media.load_media(one, *arguments)

    encoder.load_media = load_media


def test_a_rank_whose_rows_are_all_bad_takes_one_of_the_others(tmp_path, model, monkeypatch):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 48), "red").save(tmp_path / name)
    bad = shown("image", "b.png")
    rows = [RED, shown("image", "a.png"), bad, {**bad, "answer": "blue"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "heldout.jsonl").write_text(json.dumps(RED))
    named = {"source": str(tmp_path / "rows.jsonl"), "heldout": str(tmp_path / "heldout.jsonl")}
    recipe = write(
        tmp_path / "r.yaml",
        model,
        data={**named, "on_bad_row": "skip"},
        train={"parallel": "fsdp", "prompts": 4, "steps": 1},
        evaluation=NONE,
    )
    seed = dealt(recipe, [[0, 1], [2, 3]])
    recipe.write_text(recipe.read_text() + f"seed: {seed}\n")
    monkeypatch.setattr(encoder, "load_media", encoder.load_media)  # to be put back
    cannot_decode()
    equals_alone(tmp_path, recipe, cannot_decode)


def count_wrappers() -> None:
    """Say at the end how many wrappers outlive the group: a reducer that holds it last can wait forever."""
    made: list[weakref.ref[Any]] = []
    wrap, destroy = distributed.DistributedDataParallel, distributed.dist.destroy_process_group

    def noted(model: Any) -> Any:
        wrapper = wrap(model)
        made.append(weakref.ref(wrapper))
        return wrapper

    def counted() -> None:
        print(f"{len(made)} wrapped, {sum(one() is not None for one in made)} left", flush=True)
        destroy()

    distributed.DistributedDataParallel, distributed.dist.destroy_process_group = noted, counted


def test_no_wrapper_outlives_the_group(tmp_path, model):
    recipe = write(
        tmp_path / "r.yaml", model, train={"stage": "supervised", "steps": 1}, evaluation=NONE
    )
    codes, said = pair(recipe, tmp_path / "out", count_wrappers)
    assert codes == [0, 0] and all("1 wrapped, 0 left" in one for one in said), said


@pytest.mark.parametrize(
    ("kind", "prompts", "name"),
    [("ddp", 1, "muon"), ("fsdp", 1, "adamw"), ("fsdp", 3, "adamw")],
)
def test_supervised_ranks_with_fewer_rows_or_none(tmp_path, model, kind, prompts, name):
    """Embedded lessons that do not divide by the ranks."""
    recipe = write(
        tmp_path / "r.yaml",
        model,
        model={"train_vision": True},
        optim={"name": name},
        train={"stage": "supervised", "parallel": kind, "prompts": prompts},
        evaluation=NONE,
    )
    equals_alone(tmp_path, recipe)


def end_early() -> None:
    """The first rank's answers end after a token, the second's go on to the last. Passes are noted."""
    import zipr1.train.update
    from zipr1.models import sampling

    first = os.environ["RANK"] == "0"
    token = tinymodels.shared().processor.end_id if first else 40
    sampling.choose = lambda logprobs, u: torch.full((len(logprobs),), token)
    gather = distributed.gather

    def noted(value: Any) -> list[Any]:
        if isinstance(value, int):
            print(f"passes {value}", flush=True)
        return gather(value)

    zipr1.train.update.distributed.gather = noted


def test_a_rank_that_stops_early_does_not_hold_up_the_other(tmp_path, model):
    """FSDP2, with answers of 1 and of 12 tokens, and different numbers of micro-batches."""
    recipe = write(
        tmp_path / "r.yaml",
        model,
        evaluation=NONE,
        train={"parallel": "fsdp", "max_new_tokens": 12},
    )
    codes, said = pair(recipe, tmp_path / "two", end_early)
    assert codes == [0, 0], "".join(said)[-3000:]
    # Questions 0 and 2 were the first rank's: one token each; question 1 has all twelve.
    assert lines(tmp_path / "two")[0]["answer_tokens"] == pytest.approx((1 + 12 + 1) / 3)
    one, two = ([x for x in text.splitlines() if x.startswith("passes")] for text in said)
    assert len(one) == len(two) and one != two


def test_a_dead_rank_ends_the_run_and_is_named(tmp_path, model):
    """Killed in the rollouts: the other says in one line that it is not to blame, the launcher who is."""
    script = tmp_path / "main.py"
    script.write_text("""
import os, signal, time
import zipr1.train.loop
real, calls = zipr1.train.loop.roll_out, []
def dies(*arguments):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        time.sleep(2)  # the other waits, and knows before the launcher does
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
zipr1.train.loop.roll_out = dies
from zipr1.cli import main; main()
""")
    recipe = write(tmp_path / "r.yaml", model, evaluation=NONE, train={"save_every": 1})
    done = launch(TORCHRUN, [str(script)], recipe, tmp_path / "two")
    assert done.returncode != 0
    report = done.stderr[done.stderr.index("Root Cause") :]
    assert "rank      : 1" in report and "SIGKILL" in report
    said = done.stderr[: done.stderr.index("Traceback")]  # the launcher's own
    assert "error: rank 0: another rank is gone" in said
    assert (tmp_path / "two" / "last").resolve().name == "step-000001"
    assert not (tmp_path / "two" / "summary.json").exists()


def die_in_the_update() -> None:
    parallel, calls = distributed.Parallel, []
    real = parallel.backward

    def dies(self: Any, *arguments: Any) -> None:
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, *arguments)

    parallel.backward = dies


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_rank_that_dies_in_the_update_ends_it(tmp_path, model, kind):
    recipe = write(tmp_path / "r.yaml", model, evaluation=NONE, train={"parallel": kind})
    codes, said = pair(recipe, tmp_path / "two", die_in_the_update)
    assert codes == [1, -signal.SIGKILL]
    assert "another rank is gone" in said[0] and "Traceback" not in said[0]
    assert not (tmp_path / "two" / "summary.json").exists()


def hear_sigterm() -> None:
    """One rank alone, in the middle of the second step."""
    import zipr1.train.update

    step, calls = zipr1.train.update.clipped_step, []

    def hears(*arguments: Any) -> float:
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    zipr1.train.update.clipped_step = hears


def test_sigterm_saves_on_all_ranks_and_any_number_goes_on(tmp_path, model):
    train_ = {"parallel": "fsdp", "steps": 3, "save_every": 0}
    recipe = write(tmp_path / "r.yaml", model, train=train_, evaluation=NONE)
    alone(recipe, tmp_path / "one")
    codes, said = pair(recipe, tmp_path / "two", hear_sigterm)
    assert codes == [143, 143], "".join(said)[-3000:]
    assert (tmp_path / "two" / "last").resolve().name == "step-000002"
    shutil.copytree(tmp_path / "two", tmp_path / "fewer", symlinks=True)
    alone(recipe, tmp_path / "fewer")
    same(tmp_path / "one", tmp_path / "fewer")
    codes, said = pair(recipe, tmp_path / "two")
    assert codes == [0, 0], "".join(said)[-3000:]
    same(tmp_path / "one", tmp_path / "two")


def test_what_one_rank_refuses_all_refuse_with_its_number(tmp_path, model):
    recipe = write(tmp_path / "r.yaml", model)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "cat.jpg").touch()
    codes, said = pair(recipe, tmp_path / "full")
    assert codes == [2, 2]
    for rank, text in enumerate(said):
        assert f"error: rank {rank}: " in text and "not empty and holds no run" in text


def test_accelerate_must_have_started_what_was_asked(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    distributed.check_launcher("ddp")  # one process, as asked
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(InputError, match="started one; add --multi_gpu"):
        distributed.check_launcher("ddp")
    monkeypatch.setenv("WORLD_SIZE", "2")
    distributed.check_launcher("ddp")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    distributed.check_launcher("fsdp")
    with pytest.raises(InputError, match=r"--use_fsdp and train\.parallel is ddp"):
        distributed.check_launcher("ddp")


def test_processes_that_cannot_meet_say_so(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(InputError, match=r"WORLD_SIZE is 2 .* start them with torchrun"),
        distributed.joined(torch.device("cpu")),
    ):
        pass


def test_each_rank_has_a_question_and_a_gpu(monkeypatch):
    assert distributed.evened([[0, 3], [1, 4], [5]]) == [[0, 3], [1, 4], [5]]
    assert distributed.evened([[0, 3], [], [2, 5, 8], []]) == [[0], [8], [2, 5], [3]]
    with pytest.raises(InputError, match="only 1 of the step's questions"):
        distributed.evened([[0], []])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.device(None) == "cuda:1"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="process 3 of this machine has no GPU of its own"):
        distributed.device(None)


def test_alone_nothing_is_asked_of_anybody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distributed.gather(3) == [3] and distributed.deal(5) == [0, 1, 2, 3, 4]
    assert distributed.first(lambda: 7) == 7 and distributed.device("cuda") == "cuda"
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    assert distributed.deal(5) == [1, 4] and not distributed.is_first()
