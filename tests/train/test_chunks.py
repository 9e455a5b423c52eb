"""Memory does not grow with the number of prompts: few media are decoded at a time, and their patches are let go."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinymodels
import torch
from tinysteps import recipe, with_train

from zipr1.core.errors import InputError
from zipr1.core.recipe import Data, Evaluation
from zipr1.core.types import Media, Prompt
from zipr1.models.encoder import MediaEncoder
from zipr1.train import chunks, heldout
from zipr1.train.chunks import by_media


def about(*keys: str) -> Prompt:
    return Prompt("", [], tuple(Media("image", f"{key}.png") for key in keys), "")


def test_prompts_share_a_chunk_while_their_media_are_few():
    prompts = [about("a"), about("a", "b"), about("c"), about(), about("b"), about("d", "e", "f")]
    assert list(by_media(prompts, 2)) == [[0, 1], [2, 3, 4], [5]]
    assert list(by_media(prompts, 3)) == [[0, 1, 2, 3, 4], [5]]
    assert list(by_media(prompts, 1)) == [[0], [1], [2, 3], [4], [5]]
    assert list(by_media([], 2)) == []


class Alive:
    """The most decoded media that were in memory at once, and how many there were in all."""

    def __init__(self, policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most, self.all, self.made = 0, 0, list[weakref.ref]()
        stock = policy.processor.visual

        def visual(*arguments: Any, **named: Any) -> Any:
            made = stock(*arguments, **named)
            self.made = [one for one in self.made if one() is not None] + [weakref.ref(made)]
            self.most, self.all = max(self.most, len(self.made)), self.all + 1
            return made

        monkeypatch.setattr(policy.processor, "visual", visual)


def many(count: int = 12) -> list[Prompt]:
    """Pictures of different widths, each with a question of its own."""
    return [replace(tinymodels.prompt(i % 6, "image", i), id=f"row/{i}") for i in range(count)]


@pytest.fixture
def two_at_a_time(monkeypatch):
    monkeypatch.setattr(chunks, "MEDIA", 2)


def different(count: int) -> list[Prompt]:
    """As `many`, but no picture is asked about twice."""
    rng = np.random.default_rng(0)
    shape = (48, 64, 3)
    media = [Media("image", rng.integers(0, 256, shape, dtype=np.uint8)) for _ in range(count)]
    return [replace(p, media=(m,)) for p, m in zip(many(count), media, strict=True)]


def test_pictures_are_seen_a_few_at_a_time(monkeypatch, two_at_a_time):
    policy, prompts = tinymodels.make(), different(12)
    pictures = MediaEncoder(policy, recipe(), most=0)
    encoded = pictures.encode(prompts)
    whole = pictures.encode_vision(encoded).policy
    alive = Alive(policy, monkeypatch)
    found = list(chunks.seen(pictures, prompts, 8))
    assert alive.all == 12 and alive.most <= 4  # two, and two that are about to go
    assert [chunk.places for chunk in found] == [list(range(8)), list(range(8, 12))]
    for chunk in found:
        for place, one in zip(chunk.places, chunk.encoded, strict=True):
            assert torch.equal(one.ids, encoded[place].ids)
            assert torch.equal(chunk.features.policy[one.picture], whole[one.picture])
            assert all(v.patches.untyped_storage().nbytes() == 0 for v in one.visuals)


def test_remembered_pictures_let_their_patches_go():
    policy, prompts = tinymodels.make(), different(3)
    pictures = MediaEncoder(policy, recipe())
    pictures.encode_vision(pictures.encode(prompts))
    kept = [v.patches for visuals in pictures.visuals.values() for v in visuals]
    assert len(kept) == 3 and all(p.untyped_storage().nbytes() == 0 for p in kept)


def test_many_features_end_a_chunk(monkeypatch, two_at_a_time):
    policy = tinymodels.shared()
    pictures = MediaEncoder(policy, recipe(), most=0)
    one = next(iter(pictures.encode_vision(pictures.encode(different(1))).policy.values()))
    monkeypatch.setattr(chunks, "FEATURES", 4 * one.nbytes - 1)
    found = [chunk.places for chunk in chunks.seen(pictures, different(10), 8)]
    assert found == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("tokens", [None, 100])
def test_held_out_passes_are_bounded_and_say_the_same(monkeypatch, two_at_a_time, tokens):
    policy, prompts = tinymodels.make(), different(11)
    settings = recipe(evaluation=Evaluation(batch=5))
    policy.keep_reference()
    whole = heldout.evaluate(policy, settings, prompts, [None, settings.sparse])
    alive, passes = Alive(policy, monkeypatch), []
    for model in (policy.model, policy.reference_model):
        model.get_decoder().register_forward_pre_hook(
            lambda m, a, k: passes.append(tuple(k["inputs_embeds"].shape[:2])), with_kwargs=True
        )
    bounded = with_train(settings, micro_tokens=tokens)
    told: list[int] = []
    found = heldout.evaluate(policy, bounded, prompts, [None, settings.sparse], told.append)
    assert alive.most <= 4 and told[-1] == 11
    prefills = [(rows, length + 5) for rows, length in passes if length > 1]
    if tokens is None:
        assert len(prefills) == 2 * 3  # of 5, 3 and 3 rows, dense and sparse
    else:
        assert all(rows == 1 or rows * length <= tokens for rows, length in prefills)
        assert sum(rows for rows, _ in prefills) == 2 * 11 and len(prefills) > 2 * 3
    for one, other in zip(whole, found, strict=True):
        assert one.said == other.said
        np.testing.assert_allclose(one.token_ratio, other.token_ratio, atol=0.02)
        assert one.probe_audit_mass == pytest.approx(other.probe_audit_mass, abs=1e-3)


def test_bad_rows_are_looked_for_a_few_at_a_time(monkeypatch, two_at_a_time, tmp_path, caplog):
    policy, prompts = tinymodels.make(), different(9)
    gone = Media("image", tmp_path / "gone.png")
    prompts[4] = replace(prompts[4], media=(gone,), id="row/bad")
    pictures = MediaEncoder(policy, recipe(data=Data(on_bad_row="skip")))
    alive = Alive(policy, monkeypatch)
    assert chunks.readable(pictures, prompts) == prompts[:4] + prompts[5:]
    assert alive.all == 8 and alive.most <= 4
    assert "row/bad" in caplog.text
    with pytest.raises(InputError, match="all of 2 rows are bad, the first is row/bad; mend"):
        chunks.readable(pictures, [prompts[4]] * 2)
    assert chunks.readable(pictures, []) == []


def test_skipped_rows_leave_places_in_order(two_at_a_time, tmp_path):
    policy, prompts = tinymodels.shared(), different(6)
    for i in (0, 3):
        prompts[i] = replace(prompts[i], media=(Media("image", Path(tmp_path / f"{i}.png")),))
    pictures = MediaEncoder(policy, recipe(data=Data(on_bad_row="skip")), most=0)
    places = [i for chunk in chunks.seen(pictures, prompts, 4, skip=True) for i in chunk.places]
    assert places == [1, 2, 4, 5]
    with pytest.raises(InputError, match=r"0\.png"):
        list(chunks.seen(pictures, prompts, 4))
