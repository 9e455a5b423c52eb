"""Several answers sampled from one prefill: what each would have been alone, at a fraction of the reading."""

from __future__ import annotations

import pytest
import tinymodels
import torch
from policychecks import sparse
from tinysteps import even, one_update, recipe, roll, with_train

from zipr1.core.errors import InputError
from zipr1.core.recipe import Budgets, Efficiency, Model, Rewards, Train
from zipr1.models import sampling
from zipr1.models.policy import load_policy
from zipr1.models.sparse.request import Request
from zipr1.train.minibatch import flatten
from zipr1.train.rollout import draw, sample
from zipr1.train.validate import check


def several(**changes):
    """Two budgets of three answers each."""
    budgets = Budgets(low=0.6, high=0.9, num_generations=2, answers_per_budget=3)
    return recipe(**{"budgets": budgets, **changes})


@pytest.mark.parametrize(
    ("family", "request_of"),
    [
        ("qwen2_5_vl", None),
        ("qwen2_5_vl", "attention"),
        ("qwen2_5_vl", "layer"),
        ("qwen3_5", None),
        ("qwen3_5", "attention"),
    ],
)
def test_answers_to_one_prompt_are_those_of_the_prompt_repeated(tmp_path, family, request_of):
    """Dense and sparse, left-padded prompts, and states of linear attention beside the pruned layers."""
    policy = tinymodels.shared()
    if family != "qwen2_5_vl":
        folder = tinymodels.folder(family, tmp_path / family)
        policy = load_policy(Model(path=str(folder), min_pixels=256), "cpu")
    encoded = tinymodels.encode(policy, tinymodels.mixed())
    features = policy.encode_vision(encoded)
    owner = torch.tensor([0, 0, 1, 2, 2, 2, 3])
    uniforms = torch.rand(7, 6, generator=torch.Generator().manual_seed(1))
    request = None if request_of is None else Request(sparse(0.7, skip=request_of))
    shared = policy.generate(encoded, features, request, 6, uniforms, owner=owner)
    repeated = policy.generate([encoded[i] for i in owner], features, request, 6, uniforms)
    assert len({tuple(t.tolist()) for t in shared.tokens}) > 1
    for a, b in zip(shared.tokens, repeated.tokens, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(shared.logprobs, repeated.logprobs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    if request is not None:
        assert torch.equal(shared.counts, repeated.counts) and len(shared.kept) == 7
        for one, other in zip(shared.kept, repeated.kept, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_group_is_budgets_times_answers_and_shares_what_its_budgets_kept():
    _, batch = roll(several(), tinymodels.mixed())
    differ = 0
    for group in batch.groups:
        assert len(group.rollouts) == 6
        first, second = group.rollouts[:3], group.rollouts[3:]
        for own in (first, second):
            for one in own[1:]:
                assert torch.equal(one.thresholds, own[0].thresholds)
                assert one.token_ratio == own[0].token_ratio
                assert all(torch.equal(a, b) for a, b in zip(one.kept, own[0].kept, strict=True))
            differ += len({tuple(one.tokens.tolist()) for one in own}) > 1
        assert not torch.equal(first[0].thresholds, second[0].thresholds)
    assert differ >= 4  # of eight


def test_every_prompt_is_read_once_for_each_budget(monkeypatch):
    """And once more for its greedy answer; whatever the batch, no budget's answers are torn apart."""
    prefill, read = sampling.prefill, []

    def counted(model, inputs, valid, *rest, **named):
        read.append(len(valid))
        return prefill(model, inputs, valid, *rest, **named)

    settings = several(efficiency=Efficiency(target=0.5, max_accuracy_drop=None))
    said = []
    for size in (64, 4, 1):
        policy, batch = roll(with_train(settings, micro_batch=size), tinymodels.mixed())
        rows = [e for e in batch.encoded for _ in range(3)]
        draws = draw(settings, policy.layers, 3, range(4))
        with monkeypatch.context() as patched:
            patched.setattr(sampling, "prefill", counted)
            read.clear()
            made = sample(
                policy, with_train(settings, micro_batch=size), rows, batch.features, draws,
                batch.probe_seed, [0],
            )  # fmt: skip
        assert sum(read) == 4 * 3 and max(read) <= max(1, size // 3)
        assert [r.prompt_length for r in made.rollouts[::7]] == [len(e) for e in batch.encoded]
        said.append([r.tokens.tolist() for r in made.rollouts])
        mine = [r.tokens.tolist() for g in batch.groups for r in g.rollouts]
        assert mine == [t for i, t in enumerate(said[-1]) if i % 7 != 6]
    assert said[0] == said[1] == said[2]


def test_what_the_answers_of_a_step_are_drawn_with():
    settings = several(efficiency=Efficiency(max_accuracy_drop=0.0))
    draws = draw(settings, 3, 7, [5, 2])
    assert draws.thresholds.shape == (6, 3) and draws.uniforms.shape == (14, 5)
    assert draws.greedy.tolist() == [False, False, True] * 2
    assert draws.owner.tolist() == [0, 0, 0, 1, 1, 1, 2, 3, 3, 3, 4, 4, 4, 5]
    sampled = draws.uniforms[~draws.greedy[draws.owner]]
    assert len(sampled.unique()) == sampled.numel()
    # A prompt's place decides its numbers, not what else is drawn.
    alone = draw(settings, 3, 7, [2])
    assert torch.equal(alone.thresholds, draws.thresholds[3:])
    assert torch.equal(alone.uniforms, draws.uniforms[7:])


@pytest.mark.parametrize("method", ["pathwise", "cut+pathwise"])
def test_the_update_replays_them(method):
    settings = several(efficiency=Efficiency(method=method))
    policy, batch = roll(settings, tinymodels.mixed())
    said = one_update(settings, batch, policy)
    assert said["ratio_max"] == pytest.approx(1, abs=1e-4) and said["clip_fraction"] == 0
    if "cut" in method:
        assert said["cut_ratio_mean"] == pytest.approx(1, abs=1e-3)


def test_baselines_of_answers_and_of_kept_counts_by_hand():
    """Of a group of two budgets with three answers each: right are one of the first, and all of the second."""
    settings = several(efficiency=Efficiency(method="cut"), rewards=Rewards(weight=2.0))
    policy, batch = roll(settings, tinymodels.mixed())
    for group in batch.groups:
        for one, right in zip(group.rollouts, (1, 0, 0, 1, 1, 1), strict=True):
            one.rewards["correct"] = float(right)
    rows = flatten(batch, settings, even(0.0, policy.layers))
    # Rewards 2, 0, 0: against the mean of the other two. Three alike: nothing.
    answers = torch.tensor([2.0, -1.0, -1.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(rows.advantage.view(4, 6), answers.expand(4, 6))
    # Budgets: means of 2/3 and 2.
    budgets = torch.tensor([-4 / 3] * 3 + [4 / 3] * 3)
    torch.testing.assert_close(rows.cut_advantage.view(4, 6), budgets.expand(4, 6))


def test_answers_that_are_paid_for_what_they_saved_have_budgets_of_their_own():
    with pytest.raises(InputError, match=r"answers_per_budget 3 leaves nothing to learn"):
        check(several(efficiency=Efficiency(method="answers")))


def test_answers_of_one_step_are_bounded():
    train = Train(prompts_per_step=64)
    check(recipe(train=train, budgets=Budgets(num_generations=16, answers_per_budget=1024)))
    with pytest.raises(InputError, match=r"answers_per_budget 1,024 are 2,097,152 answers a step"):
        check(recipe(train=train, budgets=Budgets(num_generations=32, answers_per_budget=1024)))
