"""Passes that fit: batches by tokens, and a rehearsal of the longest that changes nothing."""

from __future__ import annotations

import tinymodels
import torch
from PIL import Image
from test_rollout import recipe

from zipr1.core.recipe import Ppo, Train
from zipr1.core.types import Media, Prompt
from zipr1.models.batching import by_length
from zipr1.models.encoder import Pictures
from zipr1.models.token_budget import bytes_per_token, most_tokens
from zipr1.train import memory_check


def test_batches_are_bounded_by_rows_and_by_tokens_longest_first():
    lengths = [10, 40, 20, 20, 5]
    assert by_length(lengths, 2) == [[1, 2], [3, 0], [4]]
    assert by_length(lengths, 5, 40) == [[1], [2, 3], [0, 4]]
    assert by_length(lengths, 5, 7) == [[1], [2], [3], [0], [4]]  # one row may have more
    assert by_length([], 5, 7) == []


def test_on_a_cpu_only_the_recipe_bounds_a_pass():
    policy = tinymodels.shared()
    assert most_tokens(policy, recipe(), update=True) is None
    few = recipe(train=Train(micro_tokens=300))
    assert most_tokens(policy, few, update=True) == most_tokens(policy, few, update=False) == 300


def test_bytes_of_a_token_by_hand():
    # 3 layers of width 64, MLP 96, 2 KV heads of 16, float32.
    policy, settings = tinymodels.shared(), recipe()
    layer = 24 * 64 + 3 * 96
    assert bytes_per_token(policy, settings, update=True) == 4 * 3 * layer
    assert bytes_per_token(policy, settings, update=False) == 4 * (3 * 2 * 2 * 16 + layer)
    model = settings.model.model_copy(update={"gradient_checkpointing": True})
    again = settings.model_copy(update={"model": model})
    assert bytes_per_token(policy, again, update=True) == 4 * (3 * 64 + layer)


def test_the_rehearsal_takes_the_longest_and_changes_nothing():
    settings = recipe(
        ppo=Ppo(kl_coef=1.0), train=Train(prompts_per_step=4, max_new_tokens=9, micro_batch=8)
    )
    policy = tinymodels.make()
    policy.keep_reference()
    prompts = tinymodels.mixed()
    pictures = Pictures(policy, settings)
    lengths = [len(e) for e in pictures.encode(prompts)]
    before = {n: p.detach().clone() for n, p in policy.trainable()}
    # Eight rows are two questions of four budgets: the two longest, with answers of full length.
    assert memory_check.rehearse(policy, settings, pictures, prompts) == max(lengths) + 9
    guessed = sorted(prompts, key=lambda p: memory_check.length(p, policy, settings))
    assert guessed[-1] is prompts[lengths.index(max(lengths))]
    for name, parameter in policy.trainable():
        assert parameter.grad is None and torch.equal(parameter, before[name])


def test_lengths_are_guessed_from_the_heads_of_files(tmp_path):
    policy, settings = tinymodels.shared(), recipe()
    Image.new("RGB", (64, 160)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")

    def guess(kind, source):
        asked = [{"role": "user", "content": "x" * 40}]
        return memory_check.length(Prompt("a", asked, (Media(kind, source),), ""), policy, settings)

    factor = policy.processor.settings.factor
    assert guess("image", tmp_path / "a.png") == 10 + 64 * 160 / factor**2
    assert guess("image", tmp_path / "b.png") == 10
    # Of a clip nothing is read: the most frames, of the most pixels.
    most = settings.data.max_frames / 2 * policy.processor.settings.max_pixels / factor**2
    assert guess("video", tmp_path / "c.mp4") == 10 + most
