"""Rollouts: the same whatever the batch, vision once, rewards and the gate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tinymodels
import torch
from tinysteps import recipe, roll

from zipr1.core.errors import InputError
from zipr1.core.recipe import Budgets, Data, Efficiency, Recipe, Rewards, Train
from zipr1.core.types import Group, Media, Rollout
from zipr1.models.batching import by_length, choose
from zipr1.models.encoder import MediaEncoder
from zipr1.models.sparse.request import Request
from zipr1.train.minibatch import score
from zipr1.train.rollout import draw, probe_seed, roll_out, sample


def said(batch):
    return [
        (r.tokens.tolist(), [k.tolist() for k in r.kept], r.token_ratio)
        for g in batch.groups
        for r in g.rollouts
    ]


def test_rollouts_do_not_depend_on_the_batch():
    prompts = tinymodels.mixed()
    wide, narrow = (
        recipe(train=Train(prompts_per_step=4, max_new_tokens=5, micro_batch=n)) for n in (64, 3)
    )
    _, one = roll(wide, prompts)
    _, other = roll(narrow, prompts)
    assert said(one) == said(other)
    # The first two prompts alone: places in the step decide the noise, not what else is rolled out.
    _, part = roll(wide, prompts[:2])
    assert said(part) == said(one)[:8]
    _, later = roll(wide, prompts, step=4)
    assert said(later) != said(one)


def test_token_ratio_is_of_the_physical_cache():
    _, batch = roll(recipe(), tinymodels.mixed())
    for group in batch.groups:
        for rollout in group.rollouts:
            kept = [len(k) for k in rollout.kept]
            assert rollout.token_ratio == pytest.approx(
                sum(kept) / len(kept) / rollout.prompt_length
            )
            assert rollout.layer_ratios == [k / rollout.prompt_length for k in kept]
            assert 0 < rollout.token_ratio < 1


def test_vision_runs_once_per_question():
    policy, _ = roll(recipe(), tinymodels.mixed())
    assert policy.vision_calls == 4


def test_thresholds_cover_every_cell_in_each_layer():
    settings = recipe()
    _, batch = roll(settings, tinymodels.mixed())
    low, high = settings.budgets.low, settings.budgets.high
    for group in batch.groups:
        p = torch.stack([r.thresholds for r in group.rollouts])
        cells = ((p - low) / (high - low) * 4).long()
        assert all(sorted(column) == [0, 1, 2, 3] for column in cells.T.tolist())


def test_what_the_rows_of_a_step_are_drawn_with():
    """Prompts at the places 5 and 2: four budgets each and, for a target or a constraint, the inference p, greedy."""
    settings = recipe(efficiency=Efficiency(max_accuracy_drop=0.0))
    draws = draw(settings, 3, 7, [5, 2])
    assert draws.thresholds.shape == (10, 3) and draws.uniforms.shape == (10, 5)
    assert draws.greedy.tolist() == ([False] * 4 + [True]) * 2
    assert (draws.thresholds[draws.greedy] == settings.sparse.p).all()
    sampled = draws.uniforms[~draws.greedy]
    assert sampled.min() >= 0 and sampled.max() < 1 and len(sampled.unique()) == sampled.numel()
    free = draw(recipe(efficiency=Efficiency(max_accuracy_drop=None)), 3, 7, [2])
    assert not free.greedy.any()
    assert torch.equal(free.thresholds, draws.thresholds[5:9])
    assert torch.equal(free.uniforms, draws.uniforms[5:9])


def test_greedy_rows_take_the_likeliest_word_and_the_others_do_not():
    logprobs = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]).log()
    uniforms, greedy = torch.tensor([0.9, 0.9, 0.2]), torch.tensor([False, True, False])
    assert choose(logprobs, uniforms, greedy).tolist() == [2, 0, 1]
    assert choose(logprobs, uniforms).tolist() == [2, 2, 1]
    assert choose(logprobs, None).tolist() == [0, 0, 2]


def test_the_answer_that_is_checked_is_greedy_at_the_inference_p():
    settings = recipe(efficiency=Efficiency(max_accuracy_drop=0.0))
    policy, batch = roll(settings, tinymodels.mixed())
    request = Request(settings.sparse, seed=batch.probe_seed)
    alone = policy.generate(batch.encoded, batch.features, request, 5)
    ratios = [(n / len(e)).tolist() for n, e in zip(alone.counts, batch.encoded, strict=True)]
    assert [list(check.ratios) for check in batch.checks] == [pytest.approx(r) for r in ratios]
    rows = [one for one in batch.encoded for _ in range(5)]
    draws = draw(settings, policy.layers, 3, range(4))
    made = sample(policy, settings, rows, batch.features, draws, batch.probe_seed, [0]).rollouts
    for one, tokens in zip(made[4::5], alone.tokens, strict=True):
        assert torch.equal(one.tokens, tokens)
    assert not all(torch.equal(one.tokens, made[4].tokens) for one in made[:4])


def test_constraint_compares_greedy_answers():
    settings = recipe(efficiency=Efficiency(max_accuracy_drop=0.0))
    _, batch = roll(settings, tinymodels.mixed())
    assert len(batch.groups[0].rollouts) == 4  # the greedy row is not a rollout
    mean = sum(check.gap for check in batch.checks) / 4
    assert mean == pytest.approx(batch.accuracy["dense"] - batch.accuracy["sparse"])
    _, free = roll(recipe(efficiency=Efficiency(max_accuracy_drop=None)), tinymodels.mixed())
    assert free.checks is None
    assert said(free) == said(batch)


def test_rows_with_the_same_id_are_not_taken_for_each_other():
    settings = recipe(efficiency=Efficiency(max_accuracy_drop=0.0))
    prompts = [replace(prompt, id="same") for prompt in tinymodels.mixed()]
    policy, batch = roll(settings, prompts)
    known: dict[str, float] = {}
    arguments = (policy, settings, prompts, batch.encoded, batch.features, 0, batch.reference)
    first = roll_out(*arguments, known)
    assert len(known) == len(prompts)
    # What is known is believed, so the reference is not asked again.
    known |= dict.fromkeys(known, 2.0)
    again = roll_out(*arguments, known)
    assert again.accuracy == {"dense": 2.0, "sparse": first.accuracy["sparse"]}


def test_probe_seeds_differ_by_step_and_from_inference():
    seeds = {probe_seed(Recipe(seed=s), step) for s in range(3) for step in range(100)}
    assert len(seeds) == 300 and 0 not in seeds


def fake_group(correct: list[float], ratios: list[float]) -> Group:
    rollouts = [
        Rollout(torch.ones(2), torch.tensor([1]), torch.zeros(1), [], 10, ratio, "", {"correct": c})
        for c, ratio in zip(correct, ratios, strict=True)
    ]
    return Group(tinymodels.prompt(0, "image"), rollouts)


def test_reward_by_hand_and_no_pay_for_a_group_all_wrong():
    settings = recipe(
        efficiency=Efficiency(method="answers"), rewards=Rewards(weight=1.0, reduction=2.0)
    )
    groups = [fake_group([1.0, 0.0], [0.5, 0.25]), fake_group([0.0, 0.0], [0.5, 0.25])]
    total = score(groups, settings)
    assert total.tolist() == [[1 + 2 * 0.5, 2 * 0.75], [0.0, 0.0]]
    assert groups[1].rollouts[1].rewards == {"correct": 0.0, "reduction": 0.0, "total": 0.0}
    # A method that lowers tokens by itself leaves answers paid for being right alone.
    alone = score(groups, recipe(efficiency=Efficiency(method="pathwise")))
    assert alone.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_batches_are_alike_in_length_and_complete():
    batches = by_length([5, 9, 1, 7, 3], 2)
    assert batches == [[1, 3], [0, 4], [2]]


def test_unknown_reward_names_the_nearest():
    with pytest.raises(InputError, match=r"'exakt'.*'exact'"):
        roll(recipe(rewards=Rewards(check="exakt")), tinymodels.mixed())


def test_media_are_shared_by_content_not_by_picture_name():
    """Rows of one cluster may show different pictures: each must be answered about its own."""
    policy = tinymodels.shared()
    one, other = tinymodels.prompt(0, "image"), tinymodels.prompt(2, "image")
    same = replace(other, picture=one.picture)
    encoded = MediaEncoder(policy, recipe()).encode([one, same, one])
    assert encoded[0].picture == encoded[2].picture != encoded[1].picture
    assert torch.equal(
        encoded[1].visuals[0].patches, tinymodels.encode(policy, [other])[0].visuals[0].patches
    )


def test_bad_rows_stop_or_are_skipped(tmp_path, caplog):
    policy = tinymodels.shared()
    bad = replace(
        tinymodels.prompt(1, "image"), media=(Media("image", tmp_path / "gone.png"),), id="rows/7"
    )
    good = tinymodels.prompt(0, "image")
    with pytest.raises(InputError, match=r"gone\.png"):
        MediaEncoder(policy, recipe()).usable([good, bad])
    skipping = recipe(data=Data(on_bad_row="skip"))
    prompts, encoded = MediaEncoder(policy, skipping).usable([good, bad])
    assert prompts == [good] and len(encoded) == 1
    assert "rows/7" in caplog.text
    with pytest.raises(InputError, match=r"all of 1 rows"):
        MediaEncoder(policy, skipping).usable([bad])


def test_the_range_of_thresholds_narrows_over_half_of_the_steps():
    moving = Budgets(low=0.5, low_end=0.7, high=0.9, num_generations=2)
    assert [round(moving.low_at(step, 8), 3) for step in (0, 2, 4, 7)] == [0.5, 0.6, 0.7, 0.7]
    settings = recipe(budgets=moving, train=Train(prompts_per_step=4, max_new_tokens=5, steps=8))
    _, batch = roll(settings, tinymodels.mixed(), step=6)
    assert batch.low == pytest.approx(0.7)
    assert min(r.thresholds.min() for g in batch.groups for r in g.rollouts) >= 0.7
    with pytest.raises(ValueError, match="low_end"):
        Budgets(low=0.5, low_end=0.95, high=0.9)


def test_pictures_are_seen_once_a_run_within_a_bound():
    """A remembered picture gives the same features as a fresh one, and what does not fit is seen again."""
    policy = tinymodels.make()
    prompts = tinymodels.mixed()
    fresh = MediaEncoder(policy, recipe())
    first = fresh.encode_vision(fresh.encode(prompts)).policy
    assert policy.vision_calls == 4
    again = fresh.encode(prompts)
    assert all(len(v.patches) == 0 for e in again for v in e.visuals)
    assert [e.ids.tolist() for e in again] == [
        e.ids.tolist() for e in tinymodels.encode(policy, prompts)
    ]
    second = fresh.encode_vision(again).policy
    assert policy.vision_calls == 4
    assert all(torch.equal(first[name], second[name]) for name in first)
    # Room for one picture, asked for in another order: it depends on nothing else.
    small = MediaEncoder(policy, recipe(), most=max(f.nbytes for f in first.values()))
    for turn in (prompts, prompts[::-1]):
        seen = small.encode_vision(small.encode(turn)).policy
        assert all(torch.equal(first[name], seen[name]) for name in first)
    assert len(small.seen) == len(small.visuals) >= 1 and small.held <= small.most
    assert policy.vision_calls > 8


def test_a_trained_tower_is_asked_every_time():
    policy = tinymodels.make(vision=True)
    policy.keep_reference()
    pictures = MediaEncoder(policy, recipe())
    for calls in (8, 16):  # the policy's tower and the reference's
        pictures.encode_vision(pictures.encode(tinymodels.mixed()))
        assert policy.vision_calls == calls
