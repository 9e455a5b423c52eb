"""The first step's check of itself: sampler and trainer agree, and whatever parts them stops the run with its cause."""

from __future__ import annotations

import os
import re

import pytest
import tinymodels
import torch
from rich.console import Console
from tinysteps import recipe, roll

from zipr1.core.errors import RunError
from zipr1.core.load import validate
from zipr1.models import sampling
from zipr1.models.encoder import MediaEncoder
from zipr1.models.sparse import context
from zipr1.train.dry_run import dry_run
from zipr1.train.memory_check import rehearse
from zipr1.train.sampler_check import Comparison, check_sampler

TINY = {
    "model": {"path": "tiny"},
    "data": {"prompts": 8, "heldout_prompts": 4},
    "sparse": {"dense_below": 0},
    "train": {"steps": 1, "prompts_per_step": 2, "max_new_tokens": 4},
}


@pytest.fixture
def batch():
    """A policy and its rollouts of two pictures and two clips."""
    return roll(recipe(), tinymodels.mixed())


def shifted(monkeypatch, places: int) -> None:
    """The sampler decodes at positions that are too high."""
    stock = sampling.decode_step

    def wrong(model, inputs, cache, valid=None):
        moved = {**inputs, "position_ids": inputs["position_ids"] + places}
        return stock(model, moved, cache, valid)

    monkeypatch.setattr(sampling, "decode_step", wrong)


def numbers(message: str) -> tuple[float, float, float]:
    found = re.search(r"(-[\d.]+) and .* (-[\d.]+), .* part by ([\d.e-]+) a token", message)
    assert found, message
    return tuple(float(x) for x in found.groups())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_they_agree_to_rounding(lora):
    policy, made = roll(recipe(), tinymodels.mixed(), lora=lora)
    line = check_sampler(policy, recipe(), made)
    found = [float(x) for x in re.findall(r"\d\.\de[-+]\d\d", line)]
    assert len(found) == 3 and max(found) < 1e-5, line


def test_in_bfloat16_they_agree_to_its_rounding():
    policy = tinymodels.make()
    policy.model.to(torch.bfloat16)
    settings = recipe()
    pictures = MediaEncoder(policy, settings)
    rehearse(policy, settings, pictures, tinymodels.mixed())


def test_positions_of_decoding_that_are_off_stop_the_run_with_both_numbers(batch, monkeypatch):
    policy, made = batch
    shifted(monkeypatch, 40)
    with pytest.raises(RunError, match="part without any sparsity: transformers") as stopped:
        check_sampler(policy, recipe(), made)
    sampler, trainer, apart = numbers(str(stopped.value))
    assert sampler != trainer and apart > 1e-3 and "\n" not in str(stopped.value)


def test_a_kernel_that_errs_is_told_from_the_rest(batch, monkeypatch):
    policy, made = batch
    stock = context.sparse_prefill
    monkeypatch.setattr(context, "sparse_prefill", lambda *a, **k: 0.5 * stock(*a, **k))
    with pytest.raises(RunError, match=r"all tokens kept.*a sparse operation errs"):
        check_sampler(policy, recipe(), made)


def test_a_replay_of_other_tokens_is_told_from_the_rest(batch):
    policy, made = batch
    for group in made.groups:
        for rollout in group.rollouts:
            rollout.kept = [kept[len(kept) // 2 :] for kept in rollout.kept]
    with pytest.raises(RunError, match=r"\(sparse\): .*the replayed tokens are not those"):
        check_sampler(policy, recipe(), made)


def test_nan_is_no_agreement():
    assert not Comparison("dense", -1.0, float("nan"), float("nan"), 0.1).agrees
    assert Comparison("dense", -1.0, -1.0, 0.1, 0.1).agrees


def test_the_rehearsal_and_the_dry_run_make_it(monkeypatch):
    policy, settings = tinymodels.make(), recipe()
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    dry_run(validate(TINY), "cpu", console)
    assert "sampler and trainer agree: dense" in console.export_text()
    stock = sampling.decode_step
    monkeypatch.setattr(sampling, "decode_step", lambda *a, **k: stock(*a, **k) / 4)
    with pytest.raises(RunError, match="the first step's check"):
        rehearse(policy, settings, MediaEncoder(policy, settings), tinymodels.mixed())
    with pytest.raises(RunError, match="the first step's check"):
        dry_run(validate(TINY), "cpu", console)
