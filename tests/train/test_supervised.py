"""The supervised step: one gradient however many passes it takes, and passes that fit."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import tinymodels
import torch
import torch.nn.functional as F
from rich.console import Console
from tinysteps import close, recipe, with_train

from zipr1.core import distributed
from zipr1.core.errors import InputError
from zipr1.core.load import validate
from zipr1.core.recipe import Data, Supervised
from zipr1.core.types import Media
from zipr1.models.encoder import MediaEncoder
from zipr1.train import loop, supervised
from zipr1.train.supervised import Portion, backward, own_lessons, own_rows


def gradient(policy: Any) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in policy.trainable() if p.grad is not None}
    policy.model.zero_grad()
    return found


def one_by_one(policy: Any, portion: Portion) -> tuple[float, float]:
    """The same by hand: each row alone, with plain logits; leaves the gradient of the mean."""
    total, right, count = torch.zeros(()), 0, 0
    for lesson in portion.lessons:
        e = lesson.encoded
        features = policy.encode_vision([e]) if portion.features is None else portion.features
        inputs, valid = policy.rows([e], features, None, left=False)
        mask = supervised._mask([lesson], valid.shape[1], policy.device)
        out = policy.decoder(**inputs, attention_mask=mask, use_cache=False).last_hidden_state[0]
        said = policy.processor.answer_mask(e.ids)[1:]
        logits, wanted = policy.head(out[:-1][said]), e.ids[1:][said]
        total = total + F.cross_entropy(logits, wanted, reduction="sum")
        right += int((logits.argmax(-1) == wanted).sum())
        count += len(wanted)
    (total / count).backward()
    return float(total.detach() / count), right / count


@pytest.fixture
def passes(monkeypatch):
    """Rows and length of every pass of a policy's decoder."""
    shapes: list[tuple[int, int]] = []

    def watch(policy: Any) -> list[tuple[int, int]]:
        policy.decoder.register_forward_pre_hook(
            lambda m, a, k: shapes.append(tuple(k["inputs_embeds"].shape[:2])), with_kwargs=True
        )
        return shapes

    return watch


LESSONS = recipe(supervised=Supervised(questions=3, video_share=0.5))


@pytest.mark.parametrize("vision", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize(
    ("limits", "rows"),
    [({}, [3, 3]), ({"micro_batch": 2}, [2, 2, 2]), ({"micro_tokens": 1}, [1] * 6)],
    ids=["halves", "rows", "tokens"],
)
def test_lessons_in_several_passes_have_the_gradient_of_one(passes, vision, limits, rows):
    policy = tinymodels.make(vision=vision)
    settings = with_train(LESSONS, prompts_per_step=6, **limits)
    portion = own_lessons(policy, settings, 2, 3)
    wanted, expected = one_by_one(policy, portion), gradient(policy)
    shapes = passes(policy)
    found = backward(policy, settings, portion)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert [n for n, _ in shapes] == rows
    assert [length for _, length in shapes] == sorted((n for _, n in shapes), reverse=True)
    if vision:
        assert any("visual" in name for name in expected)
    close(gradient(policy), expected, atol=1e-5, rtol=1e-3)


def test_passes_have_no_more_tokens_than_those_of_the_update(passes):
    policy = tinymodels.make()
    settings = with_train(LESSONS, prompts_per_step=9, micro_tokens=300)
    shapes = passes(policy)
    backward(policy, settings, own_lessons(policy, settings, 0, 3))
    assert sum(rows for rows, _ in shapes) == 9 and max(rows for rows, _ in shapes) > 1
    assert all(rows == 1 or rows * length <= 300 for rows, length in shapes)


@pytest.mark.parametrize("vision", [False, True], ids=["frozen", "trained"])
def test_rows_of_files(passes, vision):
    """A question's answer is all that counts, and a frozen tower sees a picture once in the run."""
    policy = tinymodels.make(vision=vision)
    settings = with_train(recipe(), micro_batch=3)
    pictures = MediaEncoder(policy, settings)
    prompts = tinymodels.mixed()
    for _ in range(2):
        portion = own_rows(pictures, prompts)
        assert [supervised.answer_tokens(policy, lesson) for lesson in portion.lessons] == [
            2,
            2,
            4,
            2,
        ]
        wanted, expected = one_by_one(policy, portion), gradient(policy)
        assert backward(policy, settings, portion) == pytest.approx(wanted, rel=1e-5)
        close(gradient(policy), expected, atol=1e-5, rtol=1e-3)
    assert policy.vision_calls == (16 if vision else 4)
    assert (portion.features is None) == vision


@pytest.mark.parametrize("vision", [False, True], ids=["frozen", "trained"])
def test_bad_rows_are_skipped_or_stop(tmp_path, vision):
    policy, prompts = tinymodels.make(vision=vision), tinymodels.mixed()
    gone = replace(prompts[1], media=(Media("image", tmp_path / "gone.png"),), id="row/bad")
    some = [prompts[0], gone, prompts[2]]
    with pytest.raises(InputError, match=r"gone\.png"):
        own_rows(MediaEncoder(policy, recipe()), some)
    skipping = MediaEncoder(policy, recipe(data=Data(on_bad_row="skip")))
    found = own_rows(skipping, some)
    whole = own_rows(skipping, [prompts[0], prompts[2]])
    assert [e.encoded.ids.tolist() for e in found.lessons] == [
        e.encoded.ids.tolist() for e in whole.lessons
    ]
    with pytest.raises(InputError, match="all of 2 rows are bad, the first is row/bad; mend"):
        own_rows(skipping, [gone, gone])


def test_a_rank_without_a_row_takes_one_that_does_not_count(monkeypatch, tmp_path, passes):
    """The last of three ranks, and two questions, the first of them bad: it goes along with the second one."""
    policy, prompts = tinymodels.make(), tinymodels.mixed()[:2]
    pictures = MediaEncoder(policy, recipe(data=Data(on_bad_row="skip")))
    gone = replace(prompts[0], media=(Media("image", tmp_path / "gone.png"),))
    monkeypatch.setattr(distributed, "deal", lambda n: list(range(2, n, 3)))
    # Another rank has one row of two answer tokens, for which it makes two passes.
    monkeypatch.setattr(distributed, "gather", lambda own: [own, 2 if own in (0, 1) else own])
    portion = own_rows(pictures, [gone, prompts[1]])
    assert not portion.counted
    assert [e.encoded.picture for e in portion.lessons] == [prompts[1].media_key]
    shapes = passes(policy)
    assert backward(policy, recipe(), portion) == (0.0, 0.0)
    assert [rows for rows, _ in shapes] == [1, 1]
    assert not any(p.grad is not None and p.grad.any() for _, p in policy.trainable())


def test_a_run_on_a_file_learns_its_answers(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"what color is the {n}?"}], "answer": "red"}
        for n in ("two", "three", "four")
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tinymodels.make().save(tmp_path / "model")
    made = validate(
        {
            "model": {"path": str(tmp_path / "model")},
            "data": {"source": str(source), "heldout": str(source)},
            "sparse": {"dense_below": 0},
            "optim": {"lr": 1e-2},
            "train": {"stage": "supervised", "steps": 12, "prompts_per_step": 3},
            "evaluation": {"before": False, "after": False},
        }
    )
    loop.run(made, tmp_path / "run", "auto", "cpu", [], Console(quiet=True))
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").open()]
    assert lines[0]["accuracy"] < 0.5 < lines[-1]["accuracy"]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
