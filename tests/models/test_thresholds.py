"""Exact gradients of the token ratio, checked against brute force over the threshold p."""

import math

import pytest
import torch
from zipr1_kernels import cut_points, probe_scores, select_top_p

from zipr1.models.sparse.thresholds import cut_log_prob, expected_ratio, thresholds

LOW, HIGH = 0.4, 0.9
LENGTH = 12


def layer():
    """One layer, two samples (the first padded left by 3), two always-kept tokens."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 5, 6, generator=g, dtype=torch.float64)
    k = torch.randn(2, 2, LENGTH, 6, generator=g, dtype=torch.float64)
    probes = torch.tensor([[3, 6, 8, 10, 11], [1, 5, 7, 10, 11]])
    candidates = torch.arange(LENGTH) >= torch.tensor([3, 0])[:, None]
    always = candidates & (torch.arange(LENGTH) >= 10)
    return q, k, probes, candidates, always


def scores_of(q, k, probes, candidates):
    return probe_scores(q, k, probes, candidates)


def brute_expected_ratio(scores, candidates, always):
    """The mean of the realised ratio over p in [LOW, HIGH], with selection as a black box.

    The kept count is a staircase in p; each step is found by bisection, for all steps at once.
    """
    out = []
    for s, c, a in zip(scores, candidates, always):
        n = int(c.sum())
        steps = torch.arange(1, n + 1)
        s, c, a = (x.expand(n, -1) for x in (s, c, a))
        low = torch.full((n,), LOW, dtype=s.dtype)
        high = torch.full((n,), HIGH, dtype=s.dtype)
        for _ in range(50):
            middle = (low + high) / 2
            enough = select_top_p(s, middle, c, a).sum(-1) >= steps
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        out.append(((HIGH - high) / (HIGH - LOW)).sum() / n)
    return torch.stack(out)


def test_expected_ratio_is_the_mean_of_the_realised_ratio():
    q, k, probes, candidates, always = layer()
    scores = scores_of(q, k, probes, candidates)
    got = expected_ratio(cut_points(scores, candidates, always), LOW, HIGH, candidates)
    want = brute_expected_ratio(scores, candidates, always)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def test_pathwise_gradient_equals_finite_differences_of_the_realised_ratio():
    q, k, probes, candidates, always = layer()
    leaves = [q.requires_grad_(), k.requires_grad_()]
    cut = cut_points(scores_of(q, k, probes, candidates), candidates, always)
    grads = torch.autograd.grad(expected_ratio(cut, LOW, HIGH, candidates).sum(), leaves)
    g = torch.Generator().manual_seed(5)
    step = 1e-5
    for _ in range(4):
        way = [torch.randn(x.shape, generator=g, dtype=x.dtype) for x in leaves]
        sides = []
        for sign in (1, -1):
            moved = [x.detach() + sign * step * w for x, w in zip(leaves, way)]
            scores = scores_of(*moved, probes, candidates)
            sides.append(brute_expected_ratio(scores, candidates, always).sum())
        slope = (sides[0] - sides[1]) / (2 * step)
        exact = sum((x * w).sum() for x, w in zip(grads, way))
        assert exact.abs() > 1e-3
        torch.testing.assert_close(exact, slope, rtol=1e-5, atol=1e-8)


def test_expected_ratio_by_hand():
    cut = torch.tensor([[0.0, 0.2, 0.5, 0.8, 0.95, 2.0]])
    candidates = torch.tensor([[True] * 5 + [False]])
    # 1 + 1 + (0.9 - 0.5) / 0.5 + (0.9 - 0.8) / 0.5 + 0 = 3.0 of 5 tokens
    got = expected_ratio(cut, LOW, HIGH, candidates)
    torch.testing.assert_close(got, torch.tensor([0.6]))


def reachable_sets(cut, candidates):
    """Every kept set that some p in [LOW, HIGH] leads to: (S, L) bool."""
    points = cut[candidates]
    inside = points[(points > LOW) & (points < HIGH)]
    edges = torch.cat([inside.new_tensor([LOW, HIGH]), inside]).sort().values
    middles = (edges[1:] + edges[:-1]) / 2
    return (cut[None] < middles[:, None]) & candidates


def test_cut_probabilities_sum_to_one_and_match_frequencies():
    q, k, probes, candidates, always = layer()
    scores = scores_of(q, k, probes, candidates)
    cut = cut_points(scores, candidates, always)
    for b in range(2):
        sets = reachable_sets(cut[b], candidates[b])
        assert len(sets) > 3
        prob = cut_log_prob(cut[b].expand(1, *sets.shape), sets[None], LOW, HIGH, "layer").exp()
        torch.testing.assert_close(prob.sum(), torch.tensor(1.0, dtype=prob.dtype))
        count = 20000
        p = LOW + (torch.arange(count, dtype=torch.float64) + 0.5) / count * (HIGH - LOW)
        row = [x[b].expand(count, -1) for x in (scores, candidates, always)]
        keeps = select_top_p(row[0], p, row[1], row[2])
        share = (keeps[:, None] == sets[None]).all(-1).double().mean(0)
        torch.testing.assert_close(prob, share, rtol=0, atol=1.1 / count)


def test_cut_score_function_is_the_pathwise_gradient_in_the_mean():
    q, k, probes, candidates, always = layer()
    q.requires_grad_()
    cut = cut_points(scores_of(q, k, probes, candidates), candidates, always)
    for b in range(2):
        sets = reachable_sets(cut[b].detach(), candidates[b])
        logp = cut_log_prob(cut[b].expand(1, *sets.shape), sets[None], LOW, HIGH, "layer")
        tau = sets.sum(-1) / candidates[b].sum()
        mean = (logp.exp().detach() * tau * logp).sum()
        exact = expected_ratio(cut[b : b + 1], LOW, HIGH, candidates[b : b + 1]).sum()
        got, want = (torch.autograd.grad(x, q, retain_graph=True)[0] for x in (mean, exact))
        assert want.abs().max() > 1e-3
        torch.testing.assert_close(got, want)


def test_cut_log_prob_by_hand():
    cut = torch.tensor([[[0.0, 0.3, 0.5, 0.7, 2.0]], [[0.0, 0.6, 0.65, 0.95, 2.0]]])
    keep = torch.tensor([[[1, 1, 1, 0, 0]], [[1, 1, 0, 0, 0]]]).bool()
    # Layer 1: p in (0.5, 0.7], layer 2: (0.6, 0.65], both of a range of 0.5.
    layer = cut_log_prob(cut, keep, LOW, HIGH, "layer")
    torch.testing.assert_close(layer, torch.tensor([math.log(0.4) + math.log(0.1)]))
    shared = cut_log_prob(list(cut), list(keep), LOW, HIGH, "rollout")
    torch.testing.assert_close(shared, torch.tensor([math.log(0.1)]))
    # All kept: only the range bounds p from above, (0.7, 0.9].
    full = cut_log_prob(cut[:1], cut[:1] < 2, LOW, HIGH, "layer")
    torch.testing.assert_close(full, torch.tensor([math.log(0.4)]))


def test_cut_probability_with_a_shared_p_sums_to_one_over_joint_sets():
    q, k, probes, candidates, always = layer()
    cut = cut_points(scores_of(q, k, probes, candidates), candidates, always)[1]
    layers = torch.stack([cut, cut.flip(0) * 0.97])  # any two layers with other cut points
    every = candidates[1]
    edges = torch.cat([layers.flatten(), cut.new_tensor([LOW, HIGH])]).unique()
    edges = edges[(edges >= LOW) & (edges <= HIGH)]
    middles = (edges[1:] + edges[:-1]) / 2
    keep = (layers[:, None] < middles[:, None]) & every  # (2, S, L)
    logp = cut_log_prob(layers[:, None].expand_as(keep), keep, LOW, HIGH, "rollout")
    torch.testing.assert_close(logp.exp().sum(), torch.tensor(1.0, dtype=logp.dtype))


def test_a_set_no_p_leads_to_is_finite_and_has_no_gradient():
    cut = torch.tensor([[[0.0, 0.5, 0.7]]], requires_grad=True)
    logp = cut_log_prob(cut, torch.tensor([[[True, False, True]]]), LOW, HIGH, "layer")
    logp.sum().backward()
    assert logp.item() == pytest.approx(math.log(1e-12))
    assert (cut.grad == 0).all()


def draw(count, layers, per, sampling, seed=0):
    g = torch.Generator().manual_seed(seed)
    return thresholds(count, layers, LOW, HIGH, per, sampling, g)


@pytest.mark.parametrize("per", ["layer", "rollout"])
@pytest.mark.parametrize("sampling", ["stratified", "independent"])
def test_thresholds_are_in_range_and_reproducible(per, sampling):
    p = draw(8, 5, per, sampling)
    assert p.shape == (8, 5)
    assert p.dtype == torch.float32
    assert ((p >= LOW) & (p <= HIGH)).all()
    assert torch.equal(p, draw(8, 5, per, sampling))
    assert not torch.equal(p, draw(8, 5, per, sampling, seed=1))
    assert (p == p[:, :1]).all() == (per == "rollout")


def cells(p):
    return ((p - LOW) / (HIGH - LOW) * len(p)).long()


def test_stratified_thresholds_fill_each_cell_once():
    assert torch.equal(cells(draw(8, 5, "rollout", "stratified"))[:, 0], torch.arange(8))
    layer = cells(draw(8, 5, "layer", "stratified"))
    assert (layer.sort(0).values == torch.arange(8)[:, None]).all()
    assert (layer != layer[:, :1]).any()


def test_a_grid_is_that_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    p = thresholds(8, 5, 0.9375, 0.9775, "rollout", "grid", generator)
    wanted = torch.tensor([0.940 + 0.005 * n for n in range(8)])
    torch.testing.assert_close(p, wanted[:, None].expand(8, 5), atol=1e-6, rtol=0)


def test_stratified_layers_leave_each_rollout_uniform_and_uncorrelated():
    p = torch.stack([draw(4, 2, "layer", "stratified", seed) for seed in range(2000)])
    first = p[:, 0]
    mean, spread = (LOW + HIGH) / 2, (HIGH - LOW) / 12**0.5
    assert (first.mean(0) - mean).abs().max() < 4 * spread / 2000**0.5
    assert (first.std(0) - spread).abs().max() < 0.05 * spread
    assert torch.corrcoef(first.T)[0, 1].abs() < 4 / 2000**0.5
