"""Passes that fit: batches by tokens, and a rehearsal of the longest prompts that changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tinymodels
import torch
from PIL import Image
from tinysteps import recipe, roll, rows_of, with_train

from zipr1.core.errors import InputError
from zipr1.core.recipe import Data, Ppo, Train
from zipr1.core.types import Media, Prompt
from zipr1.data import video
from zipr1.models import encoder
from zipr1.models.batching import by_length
from zipr1.models.encoder import MediaEncoder
from zipr1.models.token_budget import bytes_per_token, token_budget
from zipr1.train import memory_check
from zipr1.train.memory_check import by_tokens, rehearse


def test_batches_are_bounded_by_rows_and_by_tokens_longest_first():
    lengths = [10, 40, 20, 20, 5]
    assert by_length(lengths, 2) == [[1, 2], [3, 0], [4]]
    assert by_length(lengths, 5, 40) == [[1], [2, 3], [0, 4]]
    assert by_length(lengths, 5, 7) == [[1], [2], [3], [0], [4]]  # one row may have more
    assert by_length([], 5, 7) == []


def test_on_a_cpu_only_the_recipe_bounds_a_pass():
    policy = tinymodels.shared()
    assert token_budget(policy, recipe(), update=True) is None
    few = recipe(train=Train(micro_tokens=300))
    assert token_budget(policy, few, update=True) == token_budget(policy, few, update=False) == 300


def saved_bytes(policy, batch, rows) -> float:
    """Bytes that autograd keeps of the decoder for each token of a forward pass, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    encoded = [batch.encoded[i] for i in rows.prompt]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), policy.recomputing():
        policy.answer_states(encoded, batch.features, rows.tokens)
    return sum(s.nbytes() for s in kept.values()) / (len(rows.lengths) * max(rows.lengths))


def test_a_token_of_the_update_takes_what_autograd_keeps():
    """Counted from above, and not twice too much; recomputed layers keep their input alone."""
    found = {}
    for checkpointing in (False, True):
        policy, batch = roll(recipe(), tinymodels.mixed(), checkpointing=checkpointing)
        settings = recipe(model=policy.settings)
        measured = saved_bytes(policy, batch, rows_of(batch, settings, policy))
        found[checkpointing] = measured, bytes_per_token(policy, settings, update=True)
    (kept, counted), (inputs, again) = found[False], found[True]
    assert kept < counted < 2 * kept
    # What one of the three layers makes when it is recomputed comes on top of what is kept.
    assert inputs + kept / 3 < again < 2 * (inputs + kept / 3)


def test_a_token_of_a_rollout_takes_at_least_its_keys_and_values():
    policy, settings = tinymodels.shared(), recipe()
    encoded = tinymodels.encode(policy, tinymodels.mixed()[:1])
    answers = policy.generate(encoded, policy.encode_vision(encoded), None, 1)
    kv = answers.kv_bytes / len(encoded[0])
    assert kv == 3 * 2 * 2 * 16 * 4  # layers, keys and values, heads, width, float32
    assert kv < bytes_per_token(policy, settings, update=False)
    assert bytes_per_token(policy, settings, update=False) < bytes_per_token(
        policy, settings, update=True
    )


def test_the_rehearsal_takes_the_longest_and_changes_nothing():
    settings = recipe(
        ppo=Ppo(kl_coef=1.0), train=Train(prompts_per_step=4, max_new_tokens=9, micro_batch=8)
    )
    policy = tinymodels.make()
    policy.keep_reference()
    prompts = tinymodels.mixed()
    pictures = MediaEncoder(policy, settings)
    lengths = [len(e) for e in pictures.encode(prompts)]
    before = {n: p.detach().clone() for n, p in policy.trainable()}
    # Eight rows are two questions of four budgets: the two longest, with answers of full length.
    assert rehearse(policy, settings, pictures, prompts) == max(lengths) + 9
    for name, parameter in policy.trainable():
        assert parameter.grad is None and torch.equal(parameter, before[name])


def question(media: tuple[Media, ...], words: int = 0, name: str = "") -> Prompt:
    items = [{"type": m.kind} for m in media]
    text = "which digit is green?" + " red" * words
    content = [*items, {"type": "text", "text": text}]
    return Prompt(name, [{"role": "user", "content": content}], media, "two")


def watched(policy) -> list[tuple[int, int]]:
    """Rows and length of every pass of the policy's decoder from here on."""
    shapes: list[tuple[int, int]] = []
    policy.decoder.register_forward_pre_hook(
        lambda m, a, k: shapes.append(tuple(k["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    return shapes


def test_one_very_long_prompt_among_thousands_is_the_one_tried(monkeypatch):
    """At an odd place, which every other of three thousand passes over."""
    # It has passes of its own, with tests in test_sampler_check.py.
    monkeypatch.setattr("zipr1.train.memory_check.check_sampler", lambda *_: "")
    settings = with_train(recipe(), micro_batch=4)  # one question of four budgets
    policy = tinymodels.make()
    policy.keep_reference()
    pixels = np.zeros((32, 32, 3), np.uint8)
    prompts = [question((Media("image", pixels),), i % 7, f"row/{i}") for i in range(3000)]
    prompts[1533] = question((Media("image", pixels),), 150, "row/1533")
    pictures = MediaEncoder(policy, settings)
    longest = len(pictures.encode([prompts[1533]])[0])
    short = max(len(e) for e in pictures.encode(prompts[:7]))
    assert longest == short + 150 - 6
    shapes = watched(policy)
    assert rehearse(policy, settings, pictures, prompts) == longest + 5
    # Four budgets and a greedy answer to it are sampled; the four are learned from.
    prefills = [shape for shape in shapes if shape[1] > 1]
    assert prefills == [(4, longest), (1, longest), (4, longest + 5)]


def files(folder: Path) -> list[Prompt]:
    """Pictures and a clip in files, pictures in memory; what is long in characters is not what is long in tokens."""
    rng = np.random.default_rng(0)
    for name, size in (("wide", (256, 96)), ("small", (32, 32))):
        Image.new("RGB", size).save(folder / f"{name}.png")
    video.write(folder / "clip.mp4", rng.integers(0, 256, (6, 64, 48, 3), np.uint8), 4.0)
    array = Media("image", rng.integers(0, 256, (64, 80, 3), np.uint8))
    frames = Media("video", rng.integers(0, 256, (4, 64, 64, 3), np.uint8), 4.0)
    small = Media("image", folder / "small.png")
    return [
        question((small,), 60, "words"),
        question((Media("image", folder / "wide.png"),), 0, "wide"),
        question((Media("video", folder / "clip.mp4"),), 0, "clip"),
        question((array,), 0, "array"),
        question((frames,), 0, "frames"),
        question((small, array), 5, "both"),
        question((), 0, "text"),
    ]


def test_prompts_are_sorted_by_the_lengths_that_encoding_gives(tmp_path):
    pictures = MediaEncoder(tinymodels.shared(), recipe())
    prompts = files(tmp_path)
    lengths = {p.id: len(e) for p, e in zip(prompts, pictures.encode(prompts), strict=True)}
    # By hand, at 16 x 16 pixels a token, and a temporal patch for two frames: 16 x 6, 3 x (4 x 3), 4 x 5, 2 x (4 x 4).
    visual = {"text": -2, "wide": 96, "clip": 36, "array": 20, "frames": 32}
    assert {k: lengths[k] - lengths["text"] - 2 for k in visual} == visual
    assert len(set(lengths.values())) == len(lengths)
    found = [p.id for p in by_tokens(pictures, prompts)]
    assert found == sorted(lengths, key=lambda name: -lengths[name])
    assert found[0] == "wide" and found[1] == "words"


def test_nothing_is_decoded_where_sizes_are_known_and_else_a_bounded_number(monkeypatch, tmp_path):
    pictures = MediaEncoder(tinymodels.shared(), recipe())
    prompts = files(tmp_path)
    monkeypatch.setattr(encoder, "load_timed", lambda *_: pytest.fail("decoded"))
    opened, stock = [], memory_check.check
    monkeypatch.setattr(memory_check, "check", lambda m: (opened.append(m), stock(m))[1])
    wide = [replace(p, id=f"{i}") for i, p in enumerate([prompts[1]] * 10)]
    known = [replace(p, media=(replace(p.media[0], size=(1, 96, 256, 0.0)),)) for p in wide]
    assert [p.id for p in by_tokens(pictures, known)] == [p.id for p in wide]
    assert not opened
    monkeypatch.setattr(memory_check, "OPENED", 3)
    found = [p.id for p in by_tokens(pictures, [prompts[3], *wide])]
    # Every fourth of those of unknown size, spread over all of them; the others come last.
    assert found == ["0", "4", "8", "array", "1", "2", "3", "5", "6", "7", "9"]
    assert sum(isinstance(m.source, Path) for m in opened) == 3


def test_bad_rows_come_last_or_stop(tmp_path):
    policy = tinymodels.make()
    policy.keep_reference()
    good = question((Media("image", np.zeros((32, 32, 3), np.uint8)),), 0, "good")
    gone = question((Media("image", tmp_path / "gone.png"),), 0, "gone")
    long = question(good.media, 400, "long")
    limit = len(MediaEncoder(policy, recipe()).encode([good])[0])
    for bad in (gone, long):
        data = Data(on_bad_row="skip", max_prompt_tokens=limit)
        skipping = MediaEncoder(policy, recipe(data=data))
        assert [p.id for p in by_tokens(skipping, [bad, good])] == ["good", bad.id]
        assert rehearse(policy, recipe(data=data), skipping, [bad, good]) == limit + 5
        with pytest.raises(InputError, match=f"all of 1 rows are bad, the first is {bad.id}"):
            rehearse(policy, recipe(data=data), skipping, [bad])
        strict = MediaEncoder(policy, recipe(data=Data(max_prompt_tokens=limit)))
        with pytest.raises(InputError, match=rf"^{bad.id}: .*(gone\.png|max_prompt_tokens)"):
            by_tokens(strict, [bad, good])


def test_the_rehearsal_keeps_to_the_bound_of_the_update():
    policy = tinymodels.make()
    policy.keep_reference()
    settings = with_train(recipe(), micro_batch=64, micro_tokens=150)
    shapes = watched(policy)
    longest = rehearse(policy, settings, MediaEncoder(policy, settings), tinymodels.mixed())
    assert 75 >= longest > 50  # two rows fit, three do not
    assert shapes[-1] == (2, longest)
    assert all(rows == 1 or rows * length <= 150 for rows, length in shapes)
