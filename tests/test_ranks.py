"""Two processes on gloo against one: the same questions, the same groups, the same gradients to rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinymodels
import yaml
from rich.console import Console
from safetensors.torch import load_file

from zipr1 import data, ranks, train
from zipr1.data import video
from zipr1.recipe import Data, load

NONE = {"before": False, "after": False}
RED = {"messages": [{"role": "user", "content": "what color is the two?"}], "answer": "red"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tinymodels.make().save(folder)
    return folder


def write(path: Path, base: Path, seed: int = 0, **sections: dict[str, Any]) -> Path:
    values: dict[str, Any] = {
        "seed": seed,
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


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
# multi_gpu is how it starts several processes on one machine, GPUs or not.
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
              "--mixed_precision=no", "--dynamo_backend=no")  # fmt: skip


def torchrun(
    *arguments: str, program: str | None = None, wait: int = 150, launcher: Any = TORCHRUN
):
    """Two processes; program: run in each of them before zipr1."""
    main = program or "from zipr1.cli import main; main()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = Path(arguments[0]).parent / "main.py"
    script.write_text(main)
    return subprocess.run(
        [sys.executable, "-m", *launcher, str(script), "train", *arguments, "--device", "cpu"],
        env=environment, capture_output=True, text=True, timeout=wait,
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
    train.run(load(recipe), output, "auto", "cpu", ["zipr1"], Console(quiet=True))


@pytest.mark.parametrize(
    ("kind", "launcher"), [("ddp", TORCHRUN), ("fsdp", TORCHRUN), ("ddp", ACCELERATE)]
)
def test_two_processes_are_one(tmp_path, model, kind, launcher):
    recipe = write(tmp_path / "r.yaml", model, train={"parallel": kind})
    alone(recipe, tmp_path / "one")
    done = torchrun(str(recipe), "--output", str(tmp_path / "two"), launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    same(tmp_path / "one", tmp_path / "two")
    # The first rank alone speaks and writes.
    assert done.stdout.count("everything is in") == 1


def test_steps_too_small_for_bfloat16_land_in_the_shards_that_it_is_gathered_from(tmp_path, model):
    program = """
import torch
from zipr1.models import policy
stock, seen = policy.Policy.head, set()
def head(self, hidden, model=None):
    seen.add((hidden.dtype, (model or self.core).lm_head.weight.dtype))
    return stock(self, hidden, model)
policy.Policy.head = head
from zipr1.cli import main
try:
    main()
finally:
    print("computed in", sorted(map(str, seen)), flush=True)
"""
    small = {"optim": {"lr": 1e-6, "weight_decay": 0.0, "schedule": "constant", "warmup": 0.0}}
    sharded = {"parallel": "fsdp", "param_dtype": "bfloat16"}
    recipe = write(tmp_path / "r.yaml", model, **small, train=sharded, evaluation=NONE)
    done = torchrun(str(recipe), "--output", str(tmp_path / "two"), program=program)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "computed in ['(torch.bfloat16, torch.bfloat16)']" in done.stdout
    before, after = load_file(next(model.glob("*.safetensors"))), weights(tmp_path / "two")
    large = [k for k in before if float(before[k].abs().median()) > 1e-3 and "visual" not in k]
    assert large and all(after[k].dtype == before[k].dtype for k in large)
    for name in large:
        moved = (after[name] - before[name]).abs()
        assert 0 < float(moved.max()) < 1e-5
        # In bfloat16 itself hardly one of the larger weights would have changed.
        big = before[name].abs() > 1e-2
        unmoved = after[name][big].bfloat16() == before[name][big].bfloat16()
        assert len(unmoved) and float(unmoved.float().mean()) > 0.9


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_with_text_pictures_and_clips_wait_for_nobody(tmp_path, model, kind):
    """One rank has text alone, the other an image and a clip, and the tower is trained."""
    from PIL import Image

    Image.new("RGB", (64, 48), "red").save(tmp_path / "a.png")
    shown = {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which?"}]}
        ],
        "images": ["a.png"],
        "answer": "red",
    }
    video.write(tmp_path / "a.mp4", np.full((4, 32, 32, 3), 90, np.uint8), 4.0)
    moving = {
        "messages": [
            {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "where?"}]}
        ],
        "videos": ["a.mp4"],
        "answer": "red",
    }
    rows = [RED, shown, RED, moving]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"source": str(tmp_path / "rows.jsonl"), "heldout": str(tmp_path / "rows.jsonl")}

    def shows(seed: int) -> list[int]:
        """How many media the questions of the first step have, in their order: the ranks take turns."""
        prompts = data.load(Data(**source), "train", seed)
        return [len(p.media) for p in data.draw(prompts, seed, 0, 4)]

    seed = next(n for n in range(50) if shows(n) == [0, 1, 0, 1])
    recipe = write(
        tmp_path / "r.yaml",
        model,
        seed=seed,
        model={"train_vision": True, "gradient_checkpointing": True},
        data=source,
        train={"parallel": kind, "prompts": 4, "steps": 1},
    )
    alone(recipe, tmp_path / "one")
    done = torchrun(str(recipe), "--output", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-3000:]
    same(tmp_path / "one", tmp_path / "two")


def test_a_rank_that_stops_early_does_not_hold_up_the_other(tmp_path, model):
    """FSDP2: one rank's answers end after a token, the other's go on to the last."""
    program = """
import os, torch
from zipr1.models import policy
choose = policy.choose
if os.environ["RANK"] == "0":
    policy.choose = lambda logprobs, u: torch.full((len(logprobs),), END)
else:
    policy.choose = lambda logprobs, u: torch.full((len(logprobs),), 40)
from zipr1.cli import main; main()
"""
    end = tinymodels.shared().processor.end_id
    recipe = write(
        tmp_path / "r.yaml",
        model,
        evaluation=NONE,
        train={"parallel": "fsdp", "max_new_tokens": 12},
    )
    done = torchrun(
        str(recipe), "--output", str(tmp_path / "two"), program=program.replace("END", str(end))
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Questions 0 and 2 were the first rank's: one token each; question 1 has all twelve.
    assert lines(tmp_path / "two")[0]["answer_tokens"] == pytest.approx((1 + 12 + 1) / 3)


def test_a_dead_rank_ends_the_run_and_is_named(tmp_path, model):
    program = """
import os, signal
from zipr1 import optim
step = optim.clipped_step
def dies(*arguments):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*arguments)
import zipr1.update
zipr1.update.clipped_step = dies
from zipr1.cli import main; main()
"""
    recipe = write(tmp_path / "r.yaml", model, evaluation=NONE)
    done = torchrun(str(recipe), "--output", str(tmp_path / "two"), program=program)
    assert done.returncode != 0
    report = done.stderr[done.stderr.index("Root Cause") :]
    assert "rank      : 1" in report and "SIGKILL" in report
    assert not (tmp_path / "two" / "summary.json").exists()


def test_sigterm_saves_on_all_ranks_and_the_shards_go_on(tmp_path, model):
    """One rank alone hears the signal, in the middle of the second step; both stop after it."""
    program = """
import os, signal
import zipr1.update
step, calls = zipr1.update.clipped_step, []
def hears(*arguments):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(*arguments)
zipr1.update.clipped_step = hears
from zipr1.cli import main; main()
"""
    train_ = {"parallel": "fsdp", "steps": 3, "save_every": 0}
    recipe = write(tmp_path / "r.yaml", model, train=train_, evaluation=NONE)
    alone(recipe, tmp_path / "one")
    done = torchrun(str(recipe), "--output", str(tmp_path / "two"), program=program)
    assert done.returncode != 0 and "exitcode  : 143" in done.stderr
    assert (tmp_path / "two" / "last").resolve().name == "step-000002"
    again = torchrun(str(recipe), "--output", str(tmp_path / "two"))
    assert again.returncode == 0, again.stderr[-3000:]
    same(tmp_path / "one", tmp_path / "two")


def test_what_one_rank_refuses_all_refuse_with_its_number(tmp_path, model):
    recipe = write(tmp_path / "r.yaml", model)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "cat.jpg").touch()
    done = torchrun(str(recipe), "--output", str(tmp_path / "full"))
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "error: rank" in line]
    assert said and all("not empty and holds no run" in line for line in said)


def test_alone_nothing_is_asked_of_anybody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert ranks.gather(3) == [3] and ranks.deal(5) == [0, 1, 2, 3, 4]
    assert ranks.first(lambda: 7) == 7 and ranks.device("cuda") == "cuda"
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    assert ranks.deal(5) == [1, 4] and not ranks.is_first()
