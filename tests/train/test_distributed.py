"""Two processes on gloo against one: the same questions, the same groups, the same gradients to rounding."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinymodels
import torch
from PIL import Image
from ranks import (
    ACCELERATE,
    NONE,
    RED,
    TORCHRUN,
    alone,
    equals_alone,
    launch,
    lines,
    pair,
    same,
    weights,
    write,
)
from safetensors.torch import load_file

from zipr1.core import distributed
from zipr1.core.errors import InputError
from zipr1.core.load import load
from zipr1.data import sources, video
from zipr1.data.sampler import PromptSampler
from zipr1.models import encoder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tinymodels.make().save(folder)
    return folder


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
        print(f"computed in {hidden.dtype} with {(model or self.model).lm_head.weight.dtype}")
        return stock(self, hidden, model)

    Policy.head = head


def test_steps_too_small_for_bfloat16_land_in_the_shards_that_it_is_gathered_from(tmp_path, model):
    optim = {
        "lr": 1e-6,
        "weight_decay": 0.0,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup": 0.0,
    }
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
        sampler = PromptSampler(rows, seed, made.train.prompts_per_step)
        drawn = [ids.index(p.id) for p in sampler.draw(0)]
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
        "train": {"parallel": kind, "prompts_per_step": 4, "steps": 1},
    }
    recipe = write(tmp_path / "r.yaml", model, **sections)
    seed = dealt(recipe, [[0, 2], [1, 3]])
    recipe.write_text(recipe.read_text() + f"seed: {seed}\n")
    equals_alone(tmp_path, recipe)


def cannot_decode() -> None:
    """b.png is found bad only when its turn comes, as clips are."""
    from zipr1.data import media
    from zipr1.models import encoder

    def load_timed(one: Any, *arguments: Any) -> Any:
        if Path(one.source).name == "b.png":
            raise InputError("the clip is damaged")
        return media.load_timed(one, *arguments)

    encoder.load_timed = load_timed


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
        train={"parallel": "fsdp", "prompts_per_step": 4, "steps": 1},
        evaluation=NONE,
    )
    seed = dealt(recipe, [[0, 1], [2, 3]])
    recipe.write_text(recipe.read_text() + f"seed: {seed}\n")
    monkeypatch.setattr(encoder, "load_timed", encoder.load_timed)  # to be put back
    cannot_decode()
    equals_alone(tmp_path, recipe, cannot_decode)


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
        train={"stage": "supervised", "parallel": kind, "prompts_per_step": prompts},
        evaluation=NONE,
    )
    equals_alone(tmp_path, recipe)


def end_early() -> None:
    """The first rank's answers end after a token, the second's go on to the last. Passes are noted."""
    import zipr1.train.update
    from zipr1.models import sampling

    first = os.environ["RANK"] == "0"
    token = tinymodels.shared().processor.end_id if first else 40
    sampling.choose = lambda logprobs, *_: torch.full((len(logprobs),), token)
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
