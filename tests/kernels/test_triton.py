"""The Triton kernels against plain torch: on a GPU where there is one, else in Triton's interpreter.

The interpreter proves the logic: masks, indices, raggedness, gradients. It computes bfloat16 in float32, so what low
precision does to the numbers is proven on a GPU only.
"""

import functools

import pytest
import torch
from zipr1_kernels import (
    kv_compact,
    norm_rope,
    pack_indices,
    probe_scores,
    ran,
    select_threshold,
    select_top_k,
    select_top_p,
    sparse_decode,
    sparse_prefill,
    use,
)
from zipr1_kernels.select_top_p import kernel as selecting

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape, seed=0, dtype=torch.float32):
    """`(B, L, H, D)` numbers seen as `(B, H, L, D)`, as projections lay them out."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, length, dim = shape
    x = torch.randn(batch, length, heads, dim, generator=generator, dtype=torch.float64)
    return x.to(DEVICE, dtype).transpose(1, 2)


def mask(rows, length, share=0.5, seed=0):
    keep = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < share
    keep[:, length // 2] = True
    return keep.to(DEVICE)


def both(op, function, tensors, grad=None):
    """Outputs and gradients by (torch in float64, torch in the tensors' own dtype, Triton); asserts which path ran."""
    results = []
    for path, dtype in (("torch", torch.float64), ("torch", None), ("triton", None)):
        inputs = [x.detach().to(dtype or x.dtype).requires_grad_(grad is not None) for x in tensors]
        with use(path):
            out = function(*inputs)
        assert ran(op) == ("triton" if path == "triton" else "torch: forced")
        outs = [out] if isinstance(out, torch.Tensor) else list(out)
        if grad is not None:
            outs += torch.autograd.grad(outs[0], inputs, grad.to(outs[0]))
        results.append([x.detach() for x in outs])
    return results


def as_good(results, floor):
    """Triton is off by at most twice what torch in the same arithmetic is off by (or by the floor, of the largest)."""
    for exact, plain, ours in zip(*results, strict=True):
        assert ours.isfinite().all()
        allowed = 2 * (plain.double() - exact).abs().max() + floor * exact.abs().max()
        assert (ours.double() - exact).abs().max() <= allowed


FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# rows, query heads, key heads, length, head dimension, of values
SHAPES = [
    (1, 1, 1, 1, 16, 16),
    (2, 4, 2, 37, 32, 32),
    (3, 6, 2, 70, 17, 24),
    (1, 4, 1, 130, 64, 64),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.3, 1.1])
def test_prefill_and_its_gradients(shape, share):
    rows, q_heads, heads, length, dim, values = shape
    kept = pack_indices(mask(rows, length, share))
    tensors = [normal(rows, q_heads, length, dim), normal(rows, heads, length, dim, seed=1)]
    tensors.append(normal(rows, heads, length, values, seed=2))
    grad = normal(rows, q_heads, length, values, seed=3)
    results = both("sparse_prefill", lambda *x: sparse_prefill(*x, kept, scale=0.3), tensors, grad)
    as_good(results, FLOOR[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_in_each_dtype(dtype):
    kept = pack_indices(mask(2, 45))
    tensors = [normal(2, h, 45, 32, seed=h, dtype=dtype) for h in (4, 2, 2)]
    results = both(
        "sparse_prefill", lambda *x: sparse_prefill(*x, kept), tensors, normal(2, 4, 45, 32)
    )
    assert results[2][0].dtype == dtype
    as_good(results, FLOOR[dtype])


def test_prefill_of_very_unequal_rows():
    keep = mask(3, 200, 0.5)
    keep[0] = torch.arange(200, device=DEVICE) == 7
    keep[1] = True
    tensors = [normal(3, h, 200, 16, seed=h) for h in (2, 1, 1)]
    kept = pack_indices(keep)
    assert kept.count.tolist()[:2] == [1, 200]
    results = both(
        "sparse_prefill", lambda *x: sparse_prefill(*x, kept), tensors, normal(3, 2, 200, 16)
    )
    as_good(results, FLOOR[torch.float32])


def test_prefill_reads_and_writes_nothing_but_kept_rows():
    keep = mask(2, 50, 0.4)
    kept = pack_indices(keep)
    clean = [normal(2, h, 50, 16, seed=h) for h in (4, 2, 2)]
    grad = normal(2, 4, 50, 16, seed=9)
    for x in [*clean, grad]:
        x.transpose(1, 2)[~keep] = torch.nan
    with use("triton"):
        inputs = [x.clone().requires_grad_() for x in clean]
        out = sparse_prefill(*inputs, kept)
        found = torch.autograd.grad(out, inputs, grad)
    assert ran("sparse_prefill") == "triton"
    for x in (out, *found):
        assert x.isfinite().all()
        assert (x.transpose(1, 2)[~keep] == 0).all()
        assert (x.transpose(1, 2)[keep] != 0).any()


def test_gradients_of_keys_shared_by_heads_through_a_view():
    """`expand` makes heads share memory: gradients must not be written over each other."""
    kept = pack_indices(mask(2, 20))
    tensors = [normal(2, 4, 20, 16), normal(2, 1, 20, 16, seed=1), normal(2, 1, 20, 16, seed=2)]

    def wide(q, k, v):
        return sparse_prefill(q, k.expand(-1, 4, -1, -1), v.expand(-1, 4, -1, -1), kept)

    as_good(both("sparse_prefill", wide, tensors, normal(2, 4, 20, 16)), FLOOR[torch.float32])


# rows, query heads, key heads, probes, length, head dimension
SCORES = [(1, 1, 1, 1, 1, 16), (2, 4, 2, 5, 40, 32), (3, 6, 2, 33, 70, 17), (1, 8, 1, 12, 150, 64)]


def probing(rows, count, length):
    generator = torch.Generator().manual_seed(5)
    probes = torch.randint(0, length, (rows, count), generator=generator)
    probes[:, -1] = length - 1
    there = torch.rand(rows, count, generator=generator) < 0.8
    there[:, -1] = True
    candidates = torch.rand(rows, length, generator=generator) < 0.9
    candidates[:, -1] = True
    return probes.where(there, -1).to(DEVICE), candidates.to(DEVICE)


@pytest.mark.parametrize("shape", SCORES)
@pytest.mark.parametrize("normalise", [True, False])
def test_scores_and_their_gradients(shape, normalise):
    rows, q_heads, heads, count, length, dim = shape
    slots = probing(rows, count, length)
    tensors = [normal(rows, q_heads, count, dim), normal(rows, heads, length, dim, seed=1)]
    grad = normal(1, 1, rows, length, seed=2)[0, 0]
    results = both(
        "probe_scores",
        lambda q, k: probe_scores(q, k, *slots, scale=0.4, normalise=normalise),
        tensors,
        grad,
    )
    as_good(results, FLOOR[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_in_each_dtype(dtype):
    slots = probing(2, 9, 45)
    tensors = [normal(2, 4, 9, 32, dtype=dtype), normal(2, 2, 45, 32, seed=1, dtype=dtype)]
    grad = normal(1, 1, 2, 45, seed=2)[0, 0]
    as_good(
        both("probe_scores", lambda q, k: probe_scores(q, k, *slots), tensors, grad), FLOOR[dtype]
    )


def test_scores_of_rows_that_share_keys():
    """Probes as strided views, and rows of them that name the same row of keys."""
    probes, candidates = probing(2, 9, 45)
    which = torch.tensor([1, 0, 1], device=DEVICE)
    probes = probes[which].clone()
    probes[2] = probes[2].flip(0)
    wide = normal(3, 4, 12, 32)
    assert not wide[:, :, 2:11].is_contiguous()
    grad = normal(1, 1, 3, 45, seed=2)[0, 0]
    for graded in (None, grad):
        results = both(
            "probe_scores",
            lambda q, k: probe_scores(q[:, :, 2:11], k, probes, candidates, rows=which),
            [wide, normal(2, 2, 45, 32, seed=1)],
            graded,
        )
        as_good(results, FLOOR[torch.float32])


def test_scores_never_read_what_does_not_count():
    probes, candidates = probing(2, 9, 45)
    probes[1, 0] = -1
    probes[0, 1] = 0  # sees no candidate
    candidates[0, :3] = False
    q, k = normal(2, 4, 9, 16), normal(2, 2, 45, 16, seed=1)
    q.transpose(1, 2)[probes < 0] = torch.nan
    k.transpose(1, 2)[~candidates] = torch.nan
    inputs = [x.requires_grad_() for x in (q, k)]
    with use("triton"):
        scores = probe_scores(*inputs, probes, candidates)
        grads = torch.autograd.grad(scores.square().sum(), inputs)
    assert ran("probe_scores") == "triton"
    assert scores.isfinite().all() and (scores[~candidates] == 0).all()
    assert all(x.isfinite().all() for x in grads)
    assert (grads[1].transpose(1, 2)[~candidates] == 0).all()
    with use("torch"):
        torch.testing.assert_close(scores, probe_scores(*inputs, probes, candidates))


@pytest.fixture(params=["searched", "sorted"])
def ways(request, monkeypatch):
    """Both ways in which kernels choose, whatever a row's length."""
    if request.param == "sorted":
        monkeypatch.setattr(selecting, "LONGEST", 0)


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("length", [1, 7, 100, 2500, 4099])
@pytest.mark.parametrize("budget", [0.05, 0.5, 0.975, 1.0])
def test_selection_is_that_of_plain_torch(length, budget):
    generator = torch.Generator().manual_seed(length)
    scores = torch.rand(3, length, generator=generator).square().to(DEVICE)
    candidates = (torch.rand(3, length, generator=generator) < 0.9).to(DEVICE)
    candidates[:, -1] = True
    always = (torch.rand(3, length, generator=generator) < 0.02).to(DEVICE)
    p = torch.tensor([budget, budget * 0.9, 1.0], device=DEVICE)
    k = (p * length).ceil().long()
    scores[~candidates] = torch.nan
    for choose, amount in ((select_top_p, p), (select_top_k, k), (select_threshold, 2 * p)):
        with use("torch"):
            want = choose(scores, amount, candidates, always)
        with use("triton"):
            got = choose(scores, amount, candidates, always)
            packed = pack_indices(got)
        assert ran(choose.__name__) == ran("pack_indices") == "triton"
        assert torch.equal(got, want)
        assert torch.equal(packed.keep, want) or not want.any(1).all()
        for row, listed, count in zip(want, packed.index, packed.count, strict=True):
            assert listed[:count].tolist() == row.nonzero()[:, 0].tolist()
            assert (listed[count:] == (listed[count - 1] if count else 0)).all()


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("choose", [select_top_p, select_top_k])
def test_ties_go_to_the_lower_index(choose):
    scores = torch.tensor([[4.0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0], [2, 2, 2, 2, 2, 2]])
    candidates = torch.ones(3, 6, dtype=torch.bool)
    always = torch.zeros_like(candidates)
    always[2, 5] = True
    # Of 8: 4 + 1 + 1 reach 0.7. Nothing has mass: all stay. Of 12: the kept-in-any-case one and two others reach 0.45.
    amount = torch.tensor([0.7, 0.3, 0.45] if choose is select_top_p else [3, 2, 3])
    with use("triton"):
        keep = choose(*(x.to(DEVICE) for x in (scores, amount, candidates, always))).int().tolist()
    assert ran(choose.__name__) == "triton"
    assert keep[0] == [1, 1, 1, 0, 0, 0]
    assert keep[1] == ([1] * 6 if choose is select_top_p else [1, 1, 0, 0, 0, 0])
    assert keep[2] == [1, 1, 0, 0, 0, 1]


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_decode(queries, shape):
    rows, q_heads, heads, n, dim, values = shape
    valid = mask(rows, n, 0.8)
    valid[:, n - queries :] = True
    tensors = [normal(rows, q_heads, queries, dim), normal(rows, heads, n, dim, seed=1)]
    tensors.append(normal(rows, heads, n, values, seed=2))
    for seen in (valid, None):
        decode = functools.partial(sparse_decode, valid=seen, scale=0.3)
        as_good(both("sparse_decode", decode, tensors), FLOOR[torch.float32])
    poisoned = [tensors[0], *(x.clone() for x in tensors[1:])]
    for x in poisoned[1:]:
        x.transpose(1, 2)[~valid] = torch.nan
    with use("triton"):
        got = sparse_decode(*poisoned, valid, scale=0.3)
        assert torch.equal(got, sparse_decode(*tensors, valid, scale=0.3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_compaction_copies_to_the_bit(dtype):
    keep = mask(3, 77, 0.4)
    kept = pack_indices(keep)
    k, v = normal(3, 2, 77, 17, dtype=dtype), normal(3, 2, 77, 24, seed=1, dtype=dtype)
    for x in (k, v):
        x.transpose(1, 2)[~keep] = torch.nan
    with use("torch"):
        want = kv_compact(k, v, kept)
    with use("triton"):
        got = kv_compact(k, v, kept)
    assert ran("kv_compact") == "triton"
    for a, b in zip(got, want, strict=True):
        assert a.stride() == b.stride() and torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("dim", [24, 128])
def test_heads_are_normed_and_turned(dtype, normed, dim):
    """Of a batch whose positions are one for all rows, in tables that are parts of a wider one."""
    x = normal(3, 5, 70, dim, dtype=dtype).transpose(1, 2)
    cos, sin = normal(1, 1, 70, 2 * dim, seed=1, dtype=dtype)[:, 0].expand(3, -1, -1).chunk(2, -1)
    tensors = [x, cos, sin, *([normal(1, 1, 1, dim, seed=2, dtype=dtype).flatten()] * normed)]
    grad = normal(3, 5, 70, dim, seed=3).transpose(1, 2)
    results = both(
        "norm_rope", lambda *y: norm_rope(*y, **({"eps": 0.01} if normed else {})), tensors, grad
    )
    as_good(results, FLOOR[dtype])
    got = results[-1][0]
    assert len(results[-1]) == 1 + len(tensors)
    assert got.shape == x.shape and got.is_contiguous() and got.dtype == dtype


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_packed_tokens_are_laid_out_by_row(path):
    """Of tokens one after the other, each row's, its last one repeated: what compacting the whole gives."""
    keep = mask(3, 77, 0.4)
    keep[1] = False
    keep[1, 5] = True
    k, v = normal(3, 2, 77, 17), normal(3, 2, 77, 24, seed=1)
    with use(path):
        kept = pack_indices(keep)
        flat = [x.transpose(1, 2).flatten(0, 1)[kept.flat] for x in (k, v)]
        got = kv_compact(*flat, kept)
    assert ran("kv_compact") == ("triton" if path == "triton" else "torch: forced")
    counts = keep.sum(1).tolist()
    longest, places, begin = max(counts), [], 0
    for count in counts:
        places.append([begin + min(i, count - 1) for i in range(longest)])
        begin += count
    assert kept.places.tolist() == places and kept.places.dtype == torch.int64
    assert kept.starts.tolist() == [0, counts[0], counts[0] + 1, begin]
    assert kept.flat.tolist() == keep.flatten().nonzero()[:, 0].tolist()
    with use("torch"):
        want = kv_compact(k, v, kept)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and torch.equal(a, b)
    with pytest.raises(ValueError, match=r"k has shape \(5, 2, 17\).*\(T, H, D\) = "):
        kv_compact(flat[0][:5], flat[1][:5], kept)


def test_what_a_kernel_cannot_do_is_done_by_torch_and_said():
    q, k, v = (normal(1, h, 9, 160) for h in (2, 1, 1))
    kept = pack_indices(mask(1, 9))
    with use("triton"):
        sparse_prefill(q, k, v, kept)
        assert ran("sparse_prefill") == "torch: head dimension 160 is above 128"
        kv_compact(k.requires_grad_(), v, kept)
        assert ran("kv_compact") == "torch: a gradient is wanted"
        sparse_prefill(*(x.double() for x in (q, k, v)), kept)
        assert ran("sparse_prefill") == "torch: no kernel for torch.float64"
        for dtype, most in ((torch.float32, 16), (torch.bfloat16, 64)):
            x = normal(1, 1, 2 * most, 16, dtype=dtype)
            sparse_decode(normal(1, 1, most, 16, dtype=dtype), x, x)
            assert ran("sparse_decode") == "triton"
            sparse_decode(normal(1, 1, most + 1, 16, dtype=dtype), x, x)
            said = f"torch: {most + 1} queries a key head are more than {most}"
            assert ran("sparse_decode") == said


def test_what_auto_leaves_to_torch(monkeypatch):
    """The choices, on made-up devices; `plan` looks at nothing but the device."""
    from zipr1_kernels import dispatch

    monkeypatch.setattr(dispatch, "has_triton", lambda: True)

    class Somewhere:
        def __init__(self, kind):
            self.device = torch.device(kind)

    gpu = Somewhere("cuda:0")
    assert dispatch.plan("op", gpu) and ran("op") == "triton"
    assert not dispatch.plan("op", gpu, slower="equal rows") and ran("op") == "torch: equal rows"
    assert not dispatch.plan("op", gpu, cannot="too wide") and ran("op") == "torch: too wide"
    assert not dispatch.plan("op", Somewhere("cpu")) and ran("op") == "torch: not on a GPU"
    with use("triton"):
        assert dispatch.plan("op", gpu, slower="equal rows")
        assert not dispatch.plan("op", gpu, cannot="too wide")
    with use("torch"):
        assert not dispatch.plan("op", gpu)
    with pytest.raises(ValueError, match="op: tensors are on cpu, cuda:0; move them to one device"):
        dispatch.plan("op", gpu, Somewhere("cpu"))
    with pytest.raises(ValueError, match="kernels path 'fast'; allowed: auto, torch"), use("fast"):
        pass
    monkeypatch.setattr(dispatch._state, "path", "fast")
    with pytest.raises(RuntimeError, match="ZIPR1_KERNELS is 'fast'; allowed: auto, torch, triton"):
        dispatch.plan("op", gpu)
    monkeypatch.setattr(dispatch._state, "path", "auto")
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), use("triton"):
        dispatch.plan("op", Somewhere("cpu"))
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert not dispatch.plan("op", gpu) and ran("op") == "torch: Triton is not installed"
