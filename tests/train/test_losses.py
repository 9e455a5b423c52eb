"""Losses by hand, and their gradients."""

import math

import pytest
import torch

from zipr1.train import losses
from zipr1.train.losses import clipped_action, clipped_surrogate, kl_full, kl_k2, token_logprobs


def test_clipped_surrogate_by_hand():
    ratio = torch.tensor([[1.0, 1.5, 9.0], [0.5, 1.1, 1.5]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    old = torch.full((2, 3), -2.0)
    # A = 2: min(1 * 2, 1 * 2) = 2, min(1.5 * 2, 1.2 * 2) = 2.4; mean 2.2
    # A = -1: min(-0.5, -0.8) = -0.8, min(-1.1, -1.1) = -1.1, min(-1.5, -1.2) = -1.5; mean -3.4 / 3
    want = -(2.2 - 3.4 / 3) / 2
    loss, stats = clipped_surrogate(old + ratio.log(), old, torch.tensor([2.0, -1.0]), mask, 0.2)
    assert loss.item() == pytest.approx(want, abs=1e-6)
    assert stats["ratio_mean"].item() == pytest.approx((1 + 1.5 + 0.5 + 1.1 + 1.5) / 5)
    assert stats["ratio_max"].item() == pytest.approx(1.5)
    assert stats["clip_fraction"].item() == pytest.approx(3 / 5)


def test_clipped_tokens_have_no_gradient_and_masked_ones_no_effect():
    old = torch.zeros(2, 3)
    new = torch.tensor([[0.5, 0.0, torch.nan], [-0.5, 0.5, torch.nan]], requires_grad=True)
    mask = torch.tensor([[True, True, False]] * 2)
    loss, stats = clipped_surrogate(new, old, torch.tensor([1.0, -1.0]), mask, 0.2)
    loss.backward()
    # Rising above 1 + clip with A > 0, or falling below 1 - clip with A < 0, is not paid further.
    want = [[0, -0.25, 0], [0, math.exp(0.5) / 4, 0]]
    torch.testing.assert_close(new.grad, torch.tensor(want))
    assert all(value.isfinite() for value in stats.values())


def test_on_policy_gradient_is_the_policy_gradient():
    new = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, stats = clipped_surrogate(new, new.detach(), torch.tensor([3.0]), mask, 0.2)
    loss.backward()
    torch.testing.assert_close(new.grad, torch.tensor([[-1.5, -1.5]]))
    assert stats["ratio_mean"] == 1
    assert stats["clip_fraction"] == 0


def test_a_sequence_without_tokens_counts_as_zero():
    mask = torch.tensor([[True], [False]])
    loss, _ = clipped_surrogate(torch.zeros(2, 1), torch.zeros(2, 1), torch.ones(2), mask, 0.2)
    assert loss.item() == -0.5


def test_clipped_action_by_hand():
    ratio = torch.tensor([1.5, 0.5, 1.0])
    loss, stats = clipped_action(ratio.log(), torch.zeros(3), torch.tensor([1.0, 1.0, -2.0]), 0.2)
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 2.0) / 3)
    assert stats["clip_fraction"].item() == pytest.approx(2 / 3)


def test_token_logprobs_by_hand():
    logits = torch.tensor([[[0.0, math.log(3.0)], [math.log(4.0), 0.0]]])
    tokens = torch.tensor([[1, 0]])
    want = torch.tensor([[math.log(3 / 4), math.log(4 / 5)]])
    torch.testing.assert_close(token_logprobs(logits, tokens), want)
    cooler = torch.tensor([[math.log(9 / 10), math.log(16 / 17)]])
    torch.testing.assert_close(token_logprobs(logits, tokens, temperature=0.5), cooler)


def test_kl_full_by_hand_and_its_direction():
    policy, reference = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.5, 0.5]])
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    got = kl_full(policy.log() + 7, reference.log() - 3)
    assert got.item() == pytest.approx(forward, abs=1e-6)
    backward = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert kl_full(reference.log(), policy.log()).item() == pytest.approx(backward, abs=1e-6)


def test_forward_kl_pulls_where_the_policy_is_sure_of_a_wrong_word():
    policy, reference = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    ways = [kl_full(policy, reference, forward=f).item() for f in (0.0, 0.5, 1.0)]
    assert ways[2] == pytest.approx(kl_full(reference, policy).item(), abs=1e-6)
    assert ways[1] == pytest.approx((ways[0] + ways[2]) / 2, abs=1e-6)
    wrong = torch.tensor([[9.0, -9.0]], requires_grad=True)
    right = torch.tensor([[-9.0, 9.0]])
    pulls = [
        torch.autograd.grad(kl_full(wrong, right, forward=f).sum(), wrong)[0].abs().max()
        for f in (0.0, 1.0)
    ]
    assert pulls[0] < 1e-5 and pulls[1] == pytest.approx(1.0, abs=1e-5)


def test_kl_full_by_hand_and_what_it_gives_the_reference():
    g = torch.Generator().manual_seed(0)
    new = torch.randn(7, 11, generator=g, requires_grad=True)
    ref = torch.randn(7, 11, generator=g, requires_grad=True)
    weight = torch.randn(7, generator=g)
    p = new.softmax(-1)
    kl = (p * (new.log_softmax(-1) - ref.log_softmax(-1))).sum(-1)
    want = p * (new.log_softmax(-1) - ref.log_softmax(-1) - kl[:, None]) * weight[:, None]
    got = kl_full(new, ref)
    torch.testing.assert_close(got, kl)
    (got * weight).sum().backward()
    torch.testing.assert_close(new.grad, want)
    assert ref.grad is None


@pytest.mark.parametrize("rows", [1, 3, 4, 7])
def test_chunks_are_small_and_cover_every_row_once(monkeypatch, rows):
    monkeypatch.setattr(losses, "LOGITS", 35)  # three rows of eleven words
    x = torch.arange(float(rows), requires_grad=True)
    seen = []

    def work(part):
        seen.append(len(x[part]))
        return x[part] ** 2, x[part].sum()[None]

    squares, sums = losses.in_chunks(work, rows, 11)
    assert seen == {1: [1], 3: [3], 4: [3, 1], 7: [3, 3, 1]}[rows] and len(sums) == len(seen)
    assert torch.equal(squares, x.detach() ** 2)
    squares.sum().backward()
    assert torch.equal(x.grad, 2 * x.detach())
    assert len(losses.in_chunks(work, rows, 100)[1]) == rows  # a row is never split


def test_k2_by_hand_and_its_mean_gradient_is_that_of_the_kl():
    assert kl_k2(torch.tensor(-1.0), torch.tensor(-3.0)).item() == 2.0
    g = torch.Generator().manual_seed(1)
    new = torch.randn(1, 5, generator=g, requires_grad=True)
    ref = torch.randn(1, 5, generator=g)
    logp, base = new.log_softmax(-1), ref.log_softmax(-1)
    mean = (logp.exp().detach() * kl_k2(logp, base)).sum()
    got = torch.autograd.grad(mean, new)[0]
    want = torch.autograd.grad(kl_full(new, ref).sum(), new)[0]
    torch.testing.assert_close(got, want)
