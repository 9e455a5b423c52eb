"""Attention of rows that lie one after the other, and the ways torch has of computing it."""

import pytest
import torch
import torch.nn.functional as F
from zipr1_kernels import Kept, pack_indices, packed_attention, ran, sparse_prefill, use
from zipr1_kernels import causal as attention
from zipr1_kernels.packed_attention import library
from zipr1_kernels.sparse_prefill import packed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MASKS = {
    "ragged": [[0, 1, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]],
    "equal": [[0, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 0]],
    "all": [[1] * 6] * 3,
}


def kept_of(name):
    return pack_indices(torch.tensor(MASKS[name]).bool())


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute(q, k, v, counts, scale):
    """Row after row, query after query."""
    groups, out, at = q.shape[1] // k.shape[1], [], 0
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    for count in counts:
        for i in range(at, at + count):
            logits = torch.einsum("hd,jhd->hj", q[i], k[at : i + 1]) * scale
            out.append(torch.einsum("hj,jhd->hd", logits.softmax(-1), v[at : i + 1]))
        at += count
    return torch.stack(out)


@pytest.mark.parametrize("name", MASKS)
def test_where_rows_start_and_lie_needs_no_look_at_values(name):
    keep = torch.tensor(MASKS[name]).bool()
    flat = keep.flatten().nonzero()[:, 0].tolist()
    counts = keep.sum(1).tolist()
    starts = [0, counts[0], counts[0] + counts[1], sum(counts)]
    kept = kept_of(name)
    assert kept.total == sum(counts)
    unknown = Kept(kept.index, kept.count, kept.least, kept.length)
    given = Kept.of(kept.index, kept.count, kept.length)
    assert given.total == sum(counts)
    for made in (kept, unknown, given):
        assert made.flat.tolist() == flat
        assert made.starts.tolist() == starts and made.starts.dtype == torch.int32
        width = kept.index.shape[1]
        want = [b * width + i for b, count in enumerate(counts) for i in range(count)]
        assert made.packed.flat.tolist() == want


@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=pytest.mark.interpreted)])
def test_the_pack_kernel_writes_them_too(path):
    """More rows than it adds up at once."""
    keep = torch.rand(150, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    keep[7] = False
    with use(path):
        kept = pack_indices(keep)
    assert ran("pack_indices").startswith(path)
    assert kept.flat.tolist() == keep.flatten().nonzero()[:, 0].tolist()
    assert kept.starts.tolist() == [0, *keep.sum(1).cumsum(0).tolist()]
    assert kept.total == int(keep.sum())


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_equals_brute_force_and_its_gradients(name, heads):
    kept = kept_of(name)
    shapes = [(4, 8), (heads, 8), (heads, 6)]
    inputs = [normal(kept.total, *shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    got = packed_attention(*inputs, kept, scale=0.3)
    want = brute(*inputs, kept.count.tolist(), 0.3)
    grad = normal(*want.shape, seed=9)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, grad),
        torch.autograd.grad(want, inputs, grad),
        rtol=0,
        atol=1e-12,
    )


def by_210(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal, "2.10 is told by a flag"
    return flash(query, key, value, cu_seq_q, max_q, query.shape[2] ** -0.5)


def by_211(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
           window_size=(-1, -1)):  # fmt: skip
    assert window_size == (-1, 0)
    return flash(query, key, value, cu_seq_q, max_q, scale)


def by_213(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
           window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):  # fmt: skip
    assert window_size == (-1, 0)
    assert enable_gqa == (query.shape[1] != key.shape[1]), "it refuses to share heads unasked"
    return flash(query, key, value, cu_seq_q, max_q, scale)


def flash(q, k, v, starts, longest, scale):
    """What the library's kernel insists on, and what it computes."""
    assert q.shape[2] == k.shape[2] == v.shape[2] and q.shape[2] % 8 == 0
    assert starts.dtype == torch.int32
    counts = starts.diff().tolist()
    assert longest == max(counts)
    return brute(q, k, v, counts, scale)


@pytest.mark.parametrize("function", [by_210, by_211, by_213])
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("widths", [(8, 8), (13, 12)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_every_signature_of_the_library_is_met(function, heads, widths, scale, monkeypatch):
    monkeypatch.setattr(library, "function", lambda: function)
    kept = kept_of("ragged")
    q = normal(kept.total, 4, widths[0])
    k, v = (
        normal(kept.total, heads, widths[0], seed=1),
        normal(kept.total, heads, widths[1], seed=2),
    )
    got = library.packed_attention(q, k, v, kept, scale=scale)
    want = brute(q, k, v, kept.count.tolist(), scale or widths[0] ** -0.5)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_this_torchs_own_signature_is_one_of_them():
    import inspect

    known = set(inspect.signature(library.function()).parameters)
    required = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert list(inspect.signature(library.function()).parameters)[:7] == required
    assert {"is_causal"} <= known or {"window_size", "scale"} <= known


@pytest.mark.parametrize("name", MASKS)
def test_prefill_by_packed_rows_is_prefill(name):
    """Dropped tokens are poisoned, for they must not be read."""
    kept = kept_of(name)
    inputs = [normal(3, 6, h, 8, seed=h).transpose(1, 2) for h in (4, 2, 2)]
    want = sparse_prefill(*inputs, kept, scale=0.3)
    for x in inputs:
        x.transpose(1, 2)[~kept.keep] = torch.nan
        x.requires_grad_()
    got = packed.sparse_prefill(*inputs, kept, scale=0.3)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert got.stride() == want.stride()
    for grad in torch.autograd.grad(got.sum(), inputs):
        assert grad.isfinite().all() and (grad.transpose(1, 2)[~kept.keep] == 0).all()


@pytest.mark.parametrize(("dim", "values"), [(129, 128), (16, 16), (24, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_form_for_a_gpu_stays_off_torchs_slow_path(dim, values, dtype, monkeypatch):
    """Equal widths, multiples of 8; in float32 no head is shared. And the result is the same."""
    q, k, v = (normal(2, h, 7, d).to(dtype) for h, d in ((4, dim), (2, dim), (2, values)))
    want = attention.causal(q, k, v, None)
    seen = []
    real = F.scaled_dot_product_attention

    def watched(q, k, v, **options):
        seen.append((q.shape, k.shape, v.shape, options["enable_gqa"]))
        return real(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    got = attention.fused(q, k, v, None)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    (a, b, c, grouped) = seen[0]
    assert a[3] == b[3] == c[3] == -(-max(dim, values) // 8) * 8
    shared = dtype == torch.float64
    assert grouped == shared and b[1] == c[1] == (2 if shared else 4)


def test_why_the_library_is_not_taken(monkeypatch):
    x = normal(4, 2, 8).bfloat16()
    assert library.cannot(x, x, x) is None
    assert (
        library.cannot(x.float(), x, x)
        == "torch has no variable-length attention for torch.float32"
    )
    wide = x.repeat(1, 1, 40)
    assert library.cannot(wide, wide, x) == "head dimension 320 is above 256"
    monkeypatch.setattr(library, "function", lambda: None)
    assert library.cannot(x, x, x) == "this torch has no variable-length attention"
    kept = pack_indices(torch.ones(1, 4, dtype=torch.bool))
    packed_attention(x, x, x, kept)
    assert ran("packed_attention") == "torch: not on a GPU" or DEVICE == "cuda"
    with pytest.raises(ValueError, match=r"3 tokens and kept has 4; give those of kept\.flat"):
        packed_attention(x[:3], x[:3], x[:3], kept)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [2, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_librarys_attention_is_right_on_the_card(heads, dtype):
    """Grouped heads at the models' own width, ragged, thousands of tokens, gradients included."""
    keep = torch.rand(3, 3000, device=DEVICE) < torch.tensor([[0.05], [0.4], [0.9]], device=DEVICE)
    kept = pack_indices(keep)
    exact = [torch.randn(kept.total, h, 128, device=DEVICE).double() for h in (8, heads, heads)]
    grad = torch.randn_like(exact[0])
    results = []
    for path, kind in (("torch", torch.float64), ("torch", dtype), ("auto", dtype)):
        inputs = [x.to(dtype).to(kind).requires_grad_() for x in exact]
        with use(path):
            out = packed_attention(*inputs, kept)
        results.append([out, *torch.autograd.grad(out, inputs, grad.to(dtype).to(kind))])
    assert ran("packed_attention") == "torch: its variable-length attention"
    for right, plain, ours in zip(*results, strict=True):
        allowed = 2 * (plain.double() - right).abs().max()
        allowed = allowed + torch.finfo(dtype).eps * right.abs().max()
        assert (ours.double() - right).abs().max() <= allowed
