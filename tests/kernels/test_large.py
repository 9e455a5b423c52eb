"""The kernels where users are: head dimension 128, ragged batches, thousands of tokens; interpreted, a few hundred.

Every comparison is with float64, and allows twice what torch in the same dtype is off by.
"""

import pytest
import torch
from zipr1_kernels import (
    kv_compact,
    launch,
    pack_indices,
    probe_scores,
    ran,
    select_top_k,
    select_top_p,
    sparse_decode,
    sparse_prefill,
    use,
)
from zipr1_kernels.probe_scores import kernel as probing
from zipr1_kernels.select_top_p import LONGEST
from zipr1_kernels.select_top_p import kernel as selecting

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# rows, query heads, key heads, length, dtype. Interpreted ones span several blocks of each kernel.
REAL = [
    pytest.param((4, 28, 4, 4096, torch.bfloat16), marks=pytest.mark.gpu, id="7b"),
    pytest.param((3, 16, 2, 5000, torch.bfloat16), marks=pytest.mark.gpu, id="3b"),
    pytest.param((1, 28, 4, 16384, torch.float16), marks=pytest.mark.gpu, id="7b one long row"),
    pytest.param((2, 4, 2, 140, torch.float32), marks=pytest.mark.interpreted, id="small"),
    pytest.param(
        (1, 7, 1, 70, torch.bfloat16), marks=pytest.mark.interpreted, id="7 heads a key head"
    ),
]


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """A CPU takes the configurations of sm_80, as test_triton.py does; here it takes those of sm_90."""
    if DEVICE == "cpu":
        monkeypatch.setattr(launch, "capability", lambda device: 90)


def normal(*shape, seed, dtype):
    batch, heads, length, dim = shape
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(batch, length, heads, dim, generator=generator, device=DEVICE)
    return x.to(dtype).transpose(1, 2)


def chosen(rows, length):
    """From few tokens to nearly all of them."""
    generator = torch.Generator(DEVICE).manual_seed(9)
    share = torch.linspace(0.2, 0.95, rows, device=DEVICE)[:, None]
    keep = torch.rand(rows, length, generator=generator, device=DEVICE) < share
    keep[:, length // 3] = True
    return pack_indices(keep)


def compare(op, function, tensors, grad=None):
    results = []
    for path, dtype in (("torch", torch.float64), ("torch", None), ("triton", None)):
        inputs = [x.detach().to(dtype or x.dtype).requires_grad_(grad is not None) for x in tensors]
        with use(path):
            out = function(*inputs)
        if path == "triton":
            assert ran(op) == "triton"
        outs = [out]
        if grad is not None:
            outs += torch.autograd.grad(out, inputs, grad.to(out.dtype))
        results.append([x.detach() for x in outs])
    eps = torch.finfo(tensors[0].dtype).eps
    for exact, plain, ours in zip(*results, strict=True):
        allowed = 2 * (plain.double() - exact).abs().max() + 8 * eps * exact.abs().max()
        assert (ours.double() - exact).abs().max() <= allowed
    return results[2]


@pytest.mark.parametrize("shape", REAL)
def test_prefill_and_its_gradients(shape):
    rows, q_heads, heads, length, dtype = shape
    kept = chosen(rows, length)
    heads_of = enumerate((q_heads, heads, heads))
    tensors = [normal(rows, h, length, 128, seed=i, dtype=dtype) for i, h in heads_of]
    grad = normal(rows, q_heads, length, 128, seed=3, dtype=dtype)
    ours = compare("sparse_prefill", lambda *x: sparse_prefill(*x, kept), tensors, grad)
    for x in ours:
        assert (x.transpose(1, 2)[~kept.keep] == 0).all()


@pytest.mark.parametrize("shape", REAL)
def test_scores_and_their_gradients(shape):
    rows, q_heads, heads, length, dtype = shape
    count = min(128, length // 6)
    probes = torch.arange(length - count, length, device=DEVICE).repeat(rows, 1)
    probes[:, : count // 2] = torch.linspace(
        0, length - count - 1, count // 2, device=DEVICE
    ).long()
    probes[0, ::5] = -1
    candidates = torch.ones(rows, length, dtype=torch.bool, device=DEVICE)
    candidates[0, : length // 2] = False
    q = normal(rows, q_heads, count, 128, seed=0, dtype=dtype)
    k = normal(rows, heads, length, 128, seed=1, dtype=dtype)
    grad = normal(1, 1, rows, length, seed=2, dtype=torch.float32)[0, 0]
    compare("probe_scores", lambda q, k: probe_scores(q, k, probes, candidates), [q, k], grad)


@pytest.mark.parametrize("shape", REAL)
@pytest.mark.parametrize("queries", [1, 3])
def test_decoding(shape, queries):
    rows, q_heads, heads, length, dtype = shape
    kept = chosen(rows, length)
    k, v = (normal(rows, heads, length, 128, seed=s, dtype=dtype) for s in (1, 2))
    with use("torch"):
        cache = kv_compact(k, v, kept)
    valid = kept.real.clone()
    valid[:, -queries:] = True
    q = normal(rows, q_heads, queries, 128, seed=0, dtype=dtype)
    compare("sparse_decode", lambda *x: sparse_decode(*x, valid), [q, *cache])


@pytest.mark.gpu
def test_a_step_over_a_cache_with_room_is_captured_as_a_graph():
    """Launched once, replayed with other counts and queries: what a growing cache asks for."""
    rows, capacity, dtype = 3, 2048, torch.bfloat16
    k, v = (normal(rows, 4, capacity, 128, seed=s, dtype=dtype) for s in (1, 2))
    q = normal(rows, 28, 1, 128, seed=0, dtype=dtype)
    count = torch.tensor([5, 700, 1500], device=DEVICE)
    with use("triton"):
        sparse_decode(q, k, v, count=count)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = sparse_decode(q, k, v, count=count)
        for step in range(3):
            count += step
            q.copy_(normal(rows, 28, 1, 128, seed=step, dtype=dtype))
            graph.replay()
            assert torch.equal(out, sparse_decode(q, k, v, count=count))


@pytest.mark.parametrize("rows", [1, pytest.param(8, marks=pytest.mark.gpu)])
def test_shares_of_the_keys_are_joined(rows, monkeypatch):
    """One, some and many shares give what one program over all keys gives."""
    length, dtype = (20_000, torch.bfloat16) if DEVICE == "cuda" else (300, torch.float32)
    probes = torch.tensor([[5, length // 2, length - 1]], device=DEVICE).repeat(rows, 1)
    every = torch.ones(rows, length, dtype=torch.bool, device=DEVICE)
    every[0, :130] = False  # the first probe sees nothing, and the first share is empty for all
    q, k = (normal(rows, h, n, 64, seed=n, dtype=dtype) for h, n in ((4, 3), (2, length)))
    found = []
    for programs in (1, 24, 264, 10**6):
        monkeypatch.setattr(probing, "PROGRAMS", programs)
        with use("triton"):
            found.append(probe_scores(q, k, probes, every))
        assert ran("probe_scores") == "triton"
    assert probing._span(300, 1, 64) == 64 and probing._span(20_000, 10**6, 64) == 20_032
    assert (found[0][0, 130:] > 0).all()
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-7)


def test_long_rows_are_sorted_and_short_ones_searched(monkeypatch):
    launched = []
    launch = selecting.launch
    monkeypatch.setattr(
        selecting, "launch", lambda kernel, *x, **y: launched.append(kernel) or launch(kernel, *x, **y)
    )  # fmt: skip
    for length in (LONGEST, LONGEST + 1):
        scores = torch.rand(1, length, device=DEVICE)
        every = torch.ones(1, length, dtype=torch.bool, device=DEVICE)
        with use("triton"):
            keep = select_top_k(scores, torch.tensor([5], device=DEVICE), every, ~every)
        assert set(keep[0].nonzero()[:, 0].tolist()) == set(scores[0].topk(5).indices.tolist())
    assert launched == [selecting.select_kernel, selecting.mark_kernel]


# The search takes an interpreter minutes there; what marks sorted rows does not.
@pytest.mark.parametrize("longest", [0, pytest.param(10**6, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("length", [8192, 50_000, 200_000])
def test_search_and_sort_choose_the_fewest_tokens(length, longest, monkeypatch):
    monkeypatch.setattr(selecting, "LONGEST", longest)
    generator = torch.Generator(DEVICE).manual_seed(1)
    scores = torch.rand(2, length, generator=generator, device=DEVICE).pow(8)
    every = torch.ones(2, length, dtype=torch.bool, device=DEVICE)
    p = torch.tensor([0.5, 0.975], device=DEVICE)
    with use("triton"):
        keep = select_top_p(scores, p, every, ~every)
    share = scores.double() / scores.double().sum(1, keepdim=True)
    mass = (share * keep).sum(1)
    least = share.masked_fill(~keep, 2).min(1).values
    assert (mass >= p - 1e-6).all() and (mass - least < p + 1e-6).all()
    assert not (share.masked_fill(keep, -1).max(1).values > least).any()
