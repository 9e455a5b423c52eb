"""Probe scores against loops over samples, heads and probes."""

import pytest
import torch
from zipr1_kernels import probe_scores, ran
from zipr1_kernels.probe_scores import blocked, reference

CASES = [(4, 4, True), (4, 2, True), (4, 2, False), (6, 1, False)]


def example(heads=2, q_heads=4, dtype=torch.float64):
    """Three samples: padded left, full, padded right; the last has a probe less."""
    g = torch.Generator().manual_seed(1)
    batch, length, dim, count = 3, 9, 5, 4
    q = torch.randn(batch, q_heads, count, dim, generator=g, dtype=dtype)
    k = torch.randn(batch, heads, length, dim, generator=g, dtype=dtype)
    probes = torch.tensor([[4, 6, 7, 8], [0, 3, 7, 8], [1, 2, 4, -1]])
    slots = torch.arange(length)
    candidates = torch.stack([slots >= 3, slots >= 0, slots < 5])
    return q, k, probes, candidates


def brute(q, k, probes, candidates, normalise):
    batch, q_heads, _, dim = q.shape
    out = torch.zeros(candidates.shape, dtype=q.dtype)
    for b in range(batch):
        used = [r for r in range(q.shape[2]) if probes[b, r] >= 0]
        seen = torch.zeros(candidates.shape[1])
        for r in used:
            keys = [j for j in range(probes[b, r] + 1) if candidates[b, j]]
            seen[keys] += 1
            for h in range(q_heads):
                group = h // (q_heads // k.shape[1])
                out[b, keys] += (k[b, group, keys] @ q[b, h, r] / dim**0.5).softmax(0)
        if normalise:
            out[b] /= seen.clamp_min(1)
    return out


@pytest.mark.parametrize(("q_heads", "heads", "normalise"), CASES)
def test_equals_brute_force(q_heads, heads, normalise, monkeypatch):
    args = example(heads, q_heads)
    want = brute(*args, normalise)
    torch.testing.assert_close(probe_scores(*args, normalise=normalise), want)
    monkeypatch.setattr(reference, "CHUNK", 0)
    torch.testing.assert_close(probe_scores(*args, normalise=normalise), want)


def test_raw_rows_sum_to_heads_times_their_probes():
    scores = probe_scores(*example(dtype=torch.float32), normalise=False)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.sum(-1), torch.tensor([16.0, 16.0, 12.0]))


def test_columns_no_probe_sees_and_padding_are_exactly_zero():
    q, k, probes, candidates = example()
    scores = probe_scores(q, k, probes.clamp_max(6), candidates)
    assert (scores[1, 7:] == 0).all()
    assert (scores[~candidates] == 0).all()
    assert (scores[1, :7] > 0).all()


def test_bfloat16_is_scored_in_float32():
    q, k, *rest = example(dtype=torch.float32)
    q, k = q.bfloat16(), k.bfloat16()
    torch.testing.assert_close(probe_scores(q, k, *rest), probe_scores(q.float(), k.float(), *rest))


def test_nan_in_padding_and_where_no_probe_is_leaks_nowhere():
    q, k, probes, candidates = example()
    clean = probe_scores(q, k, probes, candidates)
    q, k = q.clone(), k.clone()
    q[2, :, 3] = torch.nan
    k.transpose(1, 2)[~candidates] = torch.nan
    q.requires_grad_()
    k.requires_grad_()
    scores = probe_scores(q, k, probes, candidates)
    assert torch.equal(scores, clean)
    scores.square().sum().backward()
    assert q.grad.isfinite().all()
    assert k.grad.isfinite().all()
    assert (q.grad[2, :, 3] == 0).all()


def test_a_sample_without_probes_is_zero_and_finite():
    q, k, probes, candidates = example()
    probes[0] = -1
    q.requires_grad_()
    scores = probe_scores(q, k, probes, candidates)
    scores.sum().backward()
    assert (scores[0] == 0).all()
    assert q.grad.isfinite().all()


def test_gradients_equal_brute_force():
    q, k, *rest = example()
    weight = torch.randn(3, 9, dtype=q.dtype, generator=torch.Generator().manual_seed(2))
    q.requires_grad_()
    k.requires_grad_()
    got = torch.autograd.grad((probe_scores(q, k, *rest) * weight).sum(), (q, k))
    want = torch.autograd.grad((brute(q, k, *rest, True) * weight).sum(), (q, k))
    torch.testing.assert_close(got, want)


def test_wrong_arguments_say_what_came():
    q, k, probes, candidates = example()
    with pytest.raises(ValueError, match=r"probes has shape \(3, 3\).*\(P, R\) = \(3, 4\)"):
        probe_scores(q, k, probes[:, :3], candidates)
    with pytest.raises(ValueError, match=r"candidates has dtype torch\.int64"):
        probe_scores(q, k, probes, candidates.long())
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        probe_scores(q[:, :3], k, probes, candidates)


@pytest.mark.parametrize(("q_heads", "heads", "normalise"), CASES)
@pytest.mark.parametrize("block", [1, 40, 2**19])
def test_blocks_of_probes_give_the_same(q_heads, heads, normalise, block, monkeypatch):
    """The version for long prompts on a CPU: every size of block, poisoned where nothing may be read."""
    q, k, probes, candidates = example(heads, q_heads)
    probes[0, 0] = 1  # sees no candidate
    probes[1] = torch.tensor([8, 0, 8, 3])  # in no order
    want = brute(q, k, probes, candidates, normalise)
    q.transpose(1, 2)[probes < 0] = torch.nan
    k.transpose(1, 2)[~candidates] = torch.nan
    monkeypatch.setattr(blocked, "BLOCK", block)
    with torch.no_grad():
        got = probe_scores(q, k, probes, candidates, normalise=normalise)
    small = blocked.pays(q_heads, 4, 9)
    assert small == (q_heads * 4 * 9 > block)
    said = "torch: blocked, for a long prompt on a CPU" if small else "torch: not on a GPU"
    assert ran("probe_scores") == said
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    probe_scores(q.requires_grad_(), k, probes, candidates)
    assert ran("probe_scores") == "torch: not on a GPU", "a gradient needs the plain version"


@pytest.mark.parametrize("block", [1, 2**19], ids=["blocked", "plain"])
def test_rows_of_probes_may_share_a_row_of_keys(block, monkeypatch):
    """Each row of probes by itself, with the keys that it names."""
    q, k, probes, candidates = example()
    which = torch.tensor([2, 0, 1, 0, 2])
    q, probes = q[[2, 0, 1, 1, 0]], probes[[2, 0, 1, 1, 0]]
    want = brute(q, k[which], probes, candidates[which], True)
    monkeypatch.setattr(blocked, "BLOCK", block)
    with torch.no_grad():
        got = probe_scores(q, k, probes.int(), candidates, rows=which)
    torch.testing.assert_close(got, want)
    inputs = [q.requires_grad_(), k.requires_grad_()]
    weight = torch.randn(want.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(2))
    got = probe_scores(q, k, probes, candidates, rows=which)
    wanted = brute(q, k[which], probes, candidates[which], True)
    for one, other in zip(
        torch.autograd.grad((got * weight).sum(), inputs),
        torch.autograd.grad((wanted * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match=r"rows has shape \(4,\).*\(P,\) = \(5,\)"):
        probe_scores(q, k, probes, candidates, rows=which[:4])
    with pytest.raises(ValueError, match=r"k has shape \(3, .*\(B, H, L, D\) = \(5, "):
        probe_scores(q, k, probes, candidates)
