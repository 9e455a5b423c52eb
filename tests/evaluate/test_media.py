"""Media of an evaluation: their bounds, and how many are decoded at once."""

from __future__ import annotations

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("lmms_eval")

from zipr1.core.recipe import Model
from zipr1.core.types import Media, Prompt
from zipr1.evaluate.answers import Answerer, Conditions
from zipr1.models import processors
from zipr1.models.manifest import TINY
from zipr1.models.policy import load_policy


@pytest.fixture(scope="module")
def policy():
    return load_policy(Model(), "cpu")


def clips(count):
    """Questions about different clips of four frames of 64 x 64 pixels."""
    content = [{"type": "video"}, {"type": "text", "text": "which digit is green?"}]
    for i in range(count):
        pixels = np.full((4, 64, 64, 3), i, np.uint8)
        yield Prompt(
            f"q/{i}", [{"role": "user", "content": content}], (Media("video", pixels, 4.0),), "two"
        )


def test_one_clip_s_patches_exist_at_a_time(policy, monkeypatch):
    """500 clips of a benchmark as patches are gigabytes; all of them but the one in use have to be gone."""
    alive: list[weakref.ref] = []
    most = 0
    patchify = processors.patchify

    def counted(frames, settings):
        nonlocal most
        patches, grid = patchify(frames, settings)
        made = patches.numpy().copy()
        alive.append(weakref.ref(made))
        most = max(most, sum(one() is not None for one in alive))
        return torch.from_numpy(
            made
        ), grid  # which holds `made` for as long as any view of it lives

    monkeypatch.setattr(processors, "patchify", counted)
    asked = [lambda p=p: p for p in clips(24)]
    answered = Answerer(policy, TINY, [1.0, 0.9], batch=8, shown=1).answer(
        asked, Conditions(2, 16, None)
    )
    assert len(answered) == len(alive) == 24
    assert most <= 2
    assert sum(one() is not None for one in alive) == 0


@pytest.mark.parametrize(
    ("own", "benchmark", "tokens"),
    # Two temporal patches; tokens of 16 pixels a side. Neither bound, the model's, the benchmark's, the lower of both.
    [
        (None, 10**6, 32),
        (48 * 48, 10**6, 18),
        (None, 32 * 32, 8),
        (48 * 48, 32 * 32, 8),
        (32 * 32, 48 * 48, 8),
    ],
)
def test_frames_keep_the_bounds_of_the_model_and_of_the_benchmark(policy, own, benchmark, tokens):
    (question,) = clips(1)
    settings = policy.processor.settings
    changed = load_policy(Model(max_frame_pixels=own), "cpu")
    assert changed.processor.settings == replace(settings, max_frame_pixels=own)
    (answered,) = Answerer(changed, TINY, [1.0]).answer(
        [lambda: question], Conditions(2, 16, None, benchmark)
    )
    text = (
        len(
            policy.processor.ids(
                policy.processor.text(question.messages),
                [processors.Visual("video", torch.empty(0), (1, 2, 2), 0.0, 1)],
            )
        )
        - 1
    )
    assert answered.answers[0].prompt_tokens == text + tokens


def test_a_pass_has_as_many_tokens_as_the_memory_allows(policy, monkeypatch):
    """The longest row of a pass times its rows, answers included, stays within the bound that training keeps."""
    passes, generate = [], policy.generate

    def noted(encoded, *arguments, **more):
        passes.append(len(encoded) * (max(map(len, encoded)) + 2))
        return generate(encoded, *arguments, **more)

    monkeypatch.setattr(policy, "generate", noted)
    asked = [lambda p=p: p for p in clips(12)]
    answerer = Answerer(policy, TINY, [1.0], batch=8, shown=0, micro_tokens=150)
    answered = answerer.answer(asked, Conditions(2, 16, None))
    assert len(answered) == 12
    assert max(passes) <= 150 < 8 * min(passes)  # eight of them at once would be too many


def test_the_first_pass_of_each_variant_is_nobodys_time(policy, monkeypatch):
    """It takes several times as long as those after it; of a few questions it was most of the time."""
    calls, generate = [], policy.generate

    def noted(encoded, features, request, length, **more):
        calls.append(("dense" if request is None else "sparse", "timed" in more))
        return generate(encoded, features, request, length, **more)

    monkeypatch.setattr(policy, "generate", noted)
    asked = [lambda p=p: p for p in clips(6)]
    answered = Answerer(policy, TINY, [1.0, 0.9], batch=2, shown=0).answer(
        asked, Conditions(2, 16, None)
    )
    assert [len(one.answers) for one in answered] == [2] * 6
    assert calls == [("dense", False), ("sparse", False)] + [("dense", True), ("sparse", True)] * 3
