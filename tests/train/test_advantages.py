"""Advantages, the gate and the group's reward, by hand."""

import math

import pytest
import torch

from zipr1.train.advantages import advantages, gate, group_reward, of_answers, of_budgets

REWARDS = torch.tensor([[1.0, 2.0, 3.0, 6.0]])


def test_leave_one_out_by_hand():
    # The others' means: 11/3, 10/3, 3, 2.
    want = torch.tensor([[1 - 11 / 3, 2 - 10 / 3, 0, 4]])
    torch.testing.assert_close(advantages(REWARDS, "leave_one_out", "none"), want)


def test_mean_and_std_by_hand():
    centred = torch.tensor([[-2.0, -1.0, 0.0, 3.0]])
    torch.testing.assert_close(advantages(REWARDS, "mean", "none"), centred)
    # Population variance (4 + 1 + 0 + 9) / 4.
    torch.testing.assert_close(advantages(REWARDS, "mean", "std"), centred / math.sqrt(3.5))


def test_groups_do_not_mix():
    both = torch.cat([REWARDS, 10 * REWARDS])
    out = advantages(both, "leave_one_out", "none")
    torch.testing.assert_close(out[1], 10 * out[0])


@pytest.mark.parametrize("baseline", ["leave_one_out", "mean"])
@pytest.mark.parametrize("scale", ["none", "std"])
def test_equal_rewards_and_lone_rollouts_get_nothing(baseline, scale):
    equal = advantages(torch.full((3, 7), 0.1), baseline, scale)
    torch.testing.assert_close(equal, torch.zeros(3, 7), rtol=0, atol=1e-7)
    alone = advantages(torch.tensor([[0.7], [1.0]]), baseline, scale)
    assert torch.equal(alone, torch.zeros(2, 1))


def test_leave_one_out_baseline_does_not_contain_the_own_reward():
    changed = REWARDS.clone()
    changed[0, 3] += 5
    before, after = (advantages(r, "leave_one_out", "none") for r in (REWARDS, changed))
    assert (after - before)[0, 3].item() == pytest.approx(5)


def test_gate_and_reward_by_hand():
    correct = torch.tensor([[True, False], [False, False]])
    ratio = torch.tensor([[0.3, 0.2], [0.1, 0.9]])
    assert gate(correct).tolist() == [1, 0]
    got = group_reward(correct, 0.5 * (1 - ratio), weight=1.0)
    torch.testing.assert_close(got, torch.tensor([[1.35, 0.4], [0.0, 0.0]]))


def test_a_group_that_is_all_wrong_is_not_paid_for_saving():
    got = group_reward(torch.zeros(1, 8), torch.rand(1, 8), 1.0)
    assert torch.equal(got, torch.zeros(1, 8))


def test_answers_are_compared_within_their_budget_and_budgets_with_each_other_by_hand():
    """Two prompts, two budgets, two answers at each."""
    rewards = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 4.0, 2.0]])
    # Each answer against the other one of its budget.
    want = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 2.0, -2.0]])
    torch.testing.assert_close(of_answers(rewards, 2, "leave_one_out", "none"), want)
    torch.testing.assert_close(of_answers(rewards, 2, "mean", "none"), want / 2)
    # Means of budgets: 0.5 and 1, 0 and 3.
    want = torch.tensor([[-0.5, -0.5, 0.5, 0.5], [-3.0, -3.0, 3.0, 3.0]])
    torch.testing.assert_close(of_budgets(rewards, 2, "leave_one_out", "none"), want)
    signs = torch.tensor([[-1.0, -1.0, 1.0, 1.0]] * 2)
    torch.testing.assert_close(of_budgets(rewards, 2, "mean", "std"), signs, atol=1e-5, rtol=0)


def test_what_a_budget_is_worth_is_not_in_the_advantage_of_its_answers():
    rewards = torch.tensor([[1.0, 0.0, 1.0, 1.0]])
    richer = rewards + torch.tensor([[5.0, 5.0, 0.0, 0.0]])
    one, other = (of_answers(r, 2, "leave_one_out", "none") for r in (rewards, richer))
    torch.testing.assert_close(one, other)
    gained = of_budgets(richer, 2, "leave_one_out", "none") - of_budgets(
        rewards, 2, "leave_one_out", "none"
    )
    torch.testing.assert_close(gained, torch.tensor([[5.0, 5.0, -5.0, -5.0]]))


@pytest.mark.parametrize("baseline", ["leave_one_out", "mean"])
@pytest.mark.parametrize("scale", ["none", "std"])
def test_single_answers_are_compared_across_the_budgets(baseline, scale):
    want = advantages(REWARDS, baseline, scale)
    assert torch.equal(of_answers(REWARDS, 1, baseline, scale), want)
    assert torch.equal(of_budgets(REWARDS, 1, baseline, scale), want)
