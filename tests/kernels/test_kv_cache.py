"""Pruning a cache and decoding against it."""

import pytest
import torch
from zipr1_kernels import Kept, kv_compact, pack_indices, ran, sparse_decode, sparse_prefill, use

KEEP = torch.tensor([[0, 1, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_pack_indices_by_hand():
    kept = pack_indices(KEEP)
    index, count = kept.index, kept.count
    assert count.tolist() == [3, 1, 6]
    assert index.tolist() == [[1, 3, 4, 4, 4, 4], [2] * 6, [0, 1, 2, 3, 4, 5]]
    assert pack_indices(KEEP[:2]).index.tolist() == [[1, 3, 4], [2, 2, 2]]


def test_kv_compact_reads_only_what_is_named():
    k, v = normal(3, 2, 6, 4), normal(3, 2, 6, 5, seed=1)
    k.transpose(1, 2)[~KEEP] = torch.nan
    kept = pack_indices(KEEP)
    count = kept.count
    k.requires_grad_()
    small_k, small_v = kv_compact(k, v, kept)
    assert small_k.isfinite().all()
    for b in range(3):
        slots = KEEP[b].nonzero()[:, 0]
        assert torch.equal(small_k[b, :, : count[b]], k[b][:, slots])
        assert torch.equal(small_v[b, :, : count[b]], v[b][:, slots])
    small_k.sum().backward()
    assert (k.grad.transpose(1, 2)[~KEEP] == 0).all()


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_decode_equals_brute_force(queries, heads):
    batch, q_heads, n = 3, 4, 7
    q = normal(batch, q_heads, queries, 8).requires_grad_()
    k, v = normal(batch, heads, n, 8, seed=1), normal(batch, heads, n, 6, seed=2)
    k, v = k.requires_grad_(), v.requires_grad_()
    valid = torch.ones(batch, n, dtype=torch.bool)
    valid[0, 2:4] = False
    valid[1, 0] = False
    valid[2, 6] = False
    row = torch.arange(n - queries, n)
    seen = valid[:, None, None] & (torch.arange(n) <= row[:, None])
    wide_k, wide_v = (x.repeat_interleave(q_heads // heads, 1) for x in (k, v))
    weights = (q @ wide_k.mT * 0.3).masked_fill(~seen, -1e300).softmax(-1)
    want = weights @ wide_v
    got = sparse_decode(q, k, v, valid, scale=0.3)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    grad = normal(*want.shape, seed=4)
    torch.testing.assert_close(
        torch.autograd.grad(got, (q, k, v), grad),
        torch.autograd.grad(want, (q, k, v), grad),
        rtol=0,
        atol=1e-12,
    )


def test_finite_garbage_in_invalid_slots_has_no_effect():
    q, k, v = normal(1, 2, 2, 4), normal(1, 2, 6, 4, seed=1), normal(1, 2, 6, 4, seed=2)
    valid = torch.tensor([[True, True, False, False, True, True]])
    clean = sparse_decode(q, k, v, valid)
    k[:, :, 2:4] = 1e6
    v[:, :, 2:4] = -1e6
    assert torch.equal(sparse_decode(q, k, v, valid), clean)


def test_decoding_token_by_token_equals_prefill_of_the_kept_and_the_new():
    """The cache pruned to T and two new tokens is attention over T and those tokens."""
    q, k, v = normal(3, 4, 8, 4), normal(3, 2, 8, 4, seed=1), normal(3, 2, 8, 4, seed=2)
    keep = torch.cat([KEEP, torch.ones(3, 2, dtype=torch.bool)], -1)
    want = sparse_prefill(q, k, v, pack_indices(keep))[:, :, 6:]
    kept = pack_indices(KEEP)
    cache, valid = kv_compact(k[:, :, :6], v[:, :, :6], kept), kept.real
    new = torch.ones(3, 2, dtype=torch.bool)
    both = [torch.cat([old, x[:, :, 6:]], 2) for old, x in zip(cache, (k, v))]
    got = sparse_decode(q[:, :, 6:], *both, torch.cat([valid, new], -1))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    first = [x[:, :, :-1] for x in both]
    got = sparse_decode(q[:, :, 6:7], *first, torch.cat([valid, new[:, :1]], -1))
    torch.testing.assert_close(got, want[:, :, :1], rtol=0, atol=1e-12)


def room(n, counts, queries=2):
    """A cache with room for more, garbage in what is not filled; and what it would be without the room."""
    q = normal(len(counts), 4, queries, 8)
    k, v = normal(len(counts), 2, n, 8, seed=1), normal(len(counts), 2, n, 6, seed=2)
    for b, count in enumerate(counts):
        k[b, :, count:], v[b, :, count:] = 1e6, -1e6
    return q, k, v


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=pytest.mark.interpreted)])
def test_a_cache_with_room_for_more_is_read_up_to_its_counts(path, queries):
    """Each row as if it were alone, with just its own slots; several programs share the longest."""
    counts = [2, 150, 65]
    q, k, v = room(200, counts, queries)
    q, k, v = (x.float() for x in (q, k, v)) if path == "triton" else (q, k, v)
    with use(path):
        got = sparse_decode(q, k, v, count=torch.tensor(counts), scale=0.3)
    assert ran("sparse_decode").startswith(path)
    for b, count in enumerate(counts):
        row = slice(b, b + 1)
        with use("torch"):
            alone = sparse_decode(q[row], k[row, :, :count], v[row, :, :count], scale=0.3)
        torch.testing.assert_close(got[row], alone, rtol=1e-5, atol=1e-5)


def test_counts_are_checked():
    q, k, v = room(10, [4, 7])
    with pytest.raises(ValueError, match="count alone says what counts"):
        sparse_decode(q, k, v, torch.ones(2, 10, dtype=torch.bool), count=torch.tensor([4, 7]))
    with pytest.raises(ValueError, match=r"count has shape \(1,\); expected \(B,\) = \(2,\)"):
        sparse_decode(q, k, v, count=torch.tensor([4]))
    with pytest.raises(ValueError, match=r"count has dtype torch\.float32"):
        sparse_decode(q, k, v, count=torch.tensor([4.0, 7.0]))


def test_more_queries_than_slots_is_refused():
    with pytest.raises(ValueError, match="append the queries' own k and v first"):
        sparse_decode(normal(1, 2, 3, 4), normal(1, 2, 2, 4), normal(1, 2, 2, 4))


def test_indices_of_ones_own_are_checked():
    index, count = torch.tensor([[0, 2, 9], [1, 5, 4]]), torch.tensor([2, 2])
    kept = Kept.of(index, count, 6)  # what stands beyond the counts is not looked at
    assert kept.index.tolist() == [[0, 2], [1, 5]] and kept.index.dtype == torch.int64
    assert kept.keep.int().tolist() == [[1, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 1]]
    assert kept.flat.tolist() == [0, 2, 7, 11]
    assert not kept.ragged and not kept.everything
    ragged = Kept.of(index, torch.tensor([1, 2]), 6)
    assert ragged.index.tolist() == [[0, 0], [1, 5]] and ragged.flat.tolist() == [0, 7, 11]
    for bad, counts, said in [
        ([[0, 2], [1, 6]], [2, 2], "row 1 of index has an index outside 0..5"),
        ([[-1, 2], [1, 5]], [2, 2], "row 0 of index has an index outside"),
        ([[0, 2], [5, 1]], [2, 2], "row 1 of index has indices that do not ascend"),
        ([[2, 2], [1, 5]], [2, 2], "row 0 of index has indices that do not ascend"),
        ([[0, 2], [1, 5]], [2, 3], "row 1 of index has a count outside 1..2"),
        ([[0, 2], [1, 5]], [0, 2], "row 0 of index has a count outside"),
    ]:
        with pytest.raises(ValueError, match=said.replace(".", r"\.")):
            Kept.of(torch.tensor(bad), torch.tensor(counts), 6)
    with pytest.raises(ValueError, match=r"index has dtype torch\.float32; expected an integer"):
        Kept.of(index.float(), count, 6)
    with pytest.raises(ValueError, match=r"count \(3,\); expected"):
        Kept.of(index, torch.ones(3).long(), 6)


def test_operations_refuse_what_was_chosen_elsewhere():
    k = normal(3, 2, 6, 4)
    kept = pack_indices(KEEP)
    with pytest.raises(ValueError, match="among 6 slots of 3 rows; expected 5 slots of 3 rows"):
        kv_compact(k[:, :, :5], k[:, :, :5], kept)
    with pytest.raises(ValueError, match="kept is a Tensor; make it with pack_indices"):
        sparse_prefill(normal(3, 4, 6, 4), k, k, KEEP)
    with pytest.raises(ValueError, match=r"k torch\.float64, v torch\.float32"):
        kv_compact(k, k.float(), kept)
    with pytest.raises(ValueError, match="at least one row and slot"):
        pack_indices(torch.zeros(0, 4, dtype=torch.bool))
