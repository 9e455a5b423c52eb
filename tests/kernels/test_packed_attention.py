"""Attention of rows that lie one after the other, and the ways torch has of computing it."""

import importlib.machinery
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from zipr1_kernels import Kept, pack_each, pack_indices, packed_attention, ran, sparse_prefill, use
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


@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=pytest.mark.interpreted)])
def test_several_masks_are_packed_as_each_is_alone(path):
    masks = [torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
             for shape in ((3, 9), (2, 40), (1, 1))]  # fmt: skip
    masks[0][1] = False
    with use(path):
        together, alone = pack_each(*masks), [pack_indices(keep) for keep in masks]
    assert ran("pack_indices").startswith(path)
    for one, other, keep in zip(together, alone, masks, strict=True):
        assert one.keep.tolist() == other.keep.tolist()
        assert (one.least, one.total, one.length) == (other.least, other.total, keep.shape[1])
        for name in ("index", "count", "flat", "starts", "places"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


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
def test_every_signature_of_the_library_is_met(function, heads, widths, scale):
    (own,) = library.providers(torch.device("cpu"))
    kept = kept_of("ragged")
    q = normal(kept.total, 4, widths[0])
    k, v = (
        normal(kept.total, heads, widths[0], seed=1),
        normal(kept.total, heads, widths[1], seed=2),
    )
    provider = own._replace(run=function)
    got = library.packed_attention(provider, q, k, v, kept, scale=scale)
    want = brute(q, k, v, kept.count.tolist(), scale or widths[0] ** -0.5)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_this_torchs_own_signature_is_one_of_them():
    import inspect

    (own,) = library.providers(torch.device("cpu"))
    known = set(inspect.signature(own.run).parameters)
    required = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert list(inspect.signature(own.run).parameters)[:7] == required
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


def test_a_gpu_before_sm_80_is_not_offered_a_library_that_raises(installed):
    assert installed(*BOTH, major=7) == ()
    assert [provider.name for provider in installed(major=8)] == ["its variable-length attention"]


@pytest.mark.parametrize("function", ["by_213", "by_3"])
def test_a_signature_is_looked_up_once(function, monkeypatch):
    looked, real = [], library.inspect.signature

    def signature(run):
        looked.append(run)
        return real(run)

    monkeypatch.setattr(library.inspect, "signature", signature)
    library._arguments.cache_clear()
    call = library._by_torch if function == "by_213" else library._by_flash
    provider = library.Provider("", 256, globals()[function], call)
    kept = kept_of("ragged")
    x = normal(kept.total, 2, 8)
    for _ in range(3):
        library.packed_attention(provider, x, x, x, kept)
    assert looked == [globals()[function]]


def test_why_the_library_is_not_taken(monkeypatch):
    x = normal(4, 2, 8).bfloat16()
    assert library.choose(x, x, x).name == "its variable-length attention"
    assert library.choose(x.float(), x, x) == "no variable-length attention for torch.float32"
    wide = x.repeat(1, 1, 40)
    assert library.choose(wide, wide, x) == "head dimension 320 is above 256"
    monkeypatch.setattr(library, "providers", lambda device: ())
    assert library.choose(x, x, x) == "this torch has no variable-length attention"
    kept = pack_indices(torch.ones(1, 4, dtype=torch.bool))
    packed_attention(x, x, x, kept)
    assert ran("packed_attention") == "torch: not on a GPU" or DEVICE == "cuda"
    with pytest.raises(ValueError, match=r"3 tokens and kept has 4; give those of kept\.flat"):
        packed_attention(x[:3], x[:3], x[:3], kept)


def by_3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
         softmax_scale=None, causal=False, window_size=(-1, -1)):  # fmt: skip
    assert causal and cu_seqlens_k is cu_seqlens_q and max_seqlen_k == max_seqlen_q
    return flash(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale)


def by_4(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, softmax_scale=None, causal=False
):
    assert causal and cu_seqlens_k is cu_seqlens_q
    longest = int(cu_seqlens_q.diff().max())
    return flash(q, k, v, cu_seqlens_q, longest, softmax_scale), "normalisers"


@pytest.fixture
def installed(monkeypatch):
    """Stand-ins for the two packages: given what is to be installed, it tells what a GPU of that capability has."""

    def put(*names, major):
        modules = {"flash_attn_interface": by_3, "flash_attn": None, "flash_attn.cute": by_4}
        for name in names:
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            if modules[name] is not None:
                module.flash_attn_varlen_func = modules[name]
            monkeypatch.setitem(sys.modules, name, module)
        found = {"flash-attn-4"} if "flash_attn.cute" in names else set()
        monkeypatch.setattr(library, "_distributed", found.__contains__)
        return library._providers.__wrapped__(major)

    return put


BOTH = ("flash_attn_interface", "flash_attn", "flash_attn.cute")


@pytest.mark.parametrize(
    ("names", "major", "wanted"),
    [
        ((), 9, []),
        (BOTH, 0, []),
        (BOTH, 8, []),
        (BOTH[:1], 9, ["FlashAttention 3"]),
        (BOTH[:1], 10, []),
        (BOTH[1:], 9, ["FlashAttention 4"]),
        (BOTH[1:], 10, ["FlashAttention 4"]),
        (BOTH, 9, ["FlashAttention 3", "FlashAttention 4"]),
        (("flash_attn",), 9, []),  # version 2 alone
    ],
)
def test_flash_attention_is_taken_where_it_is_installed(names, major, wanted, installed):
    found = installed(*names, major=major)
    assert [provider.name for provider in found] == [*wanted, "its variable-length attention"]


@pytest.mark.parametrize("major", [9, 10])
@pytest.mark.parametrize("heads", [2, 4])
def test_flash_attention_gets_what_its_signature_asks_for(major, heads, installed):
    kept = kept_of("ragged")
    inputs = [normal(kept.total, h, d, seed=d) for h, d in ((4, 13), (heads, 13), (heads, 12))]
    provider = installed(*BOTH, major=major)[0]
    assert provider.name == f"FlashAttention {3 if major == 9 else 4}"
    for scale in (None, 0.3):
        got = library.packed_attention(provider, *inputs, kept, scale=scale)
        want = brute(*inputs, kept.count.tolist(), scale or 13**-0.5)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_flash_attention_that_cannot_is_passed_over(installed, monkeypatch, caplog):
    found = installed(*BOTH[1:], major=10)
    monkeypatch.setattr(library, "providers", lambda device: found)
    x = torch.zeros(3, 2, 136, dtype=torch.bfloat16)
    assert library.choose(x, x, x).name == "its variable-length attention"
    assert library.choose(x[..., :128], x[..., :128], x[..., :128]).name == "FlashAttention 4"
    monkeypatch.delattr(sys.modules["flash_attn.cute"], "flash_attn_varlen_func")
    (own,) = library._providers.__wrapped__(10)
    assert own.name == "its variable-length attention"
    assert "FlashAttention 4 is installed and does not load" in caplog.text


def test_the_name_of_what_ran_is_told(installed, monkeypatch):
    """On a made-up GPU: the choice looks at nothing but the device's kind."""
    from zipr1_kernels import dispatch

    class Somewhere:
        device = torch.device("cuda:0")

    assert dispatch.library("packed_attention", Somewhere(), name="FlashAttention 3")
    assert ran("packed_attention") == "torch: FlashAttention 3"
    assert not dispatch.library("packed_attention", Somewhere(), cannot="no such width")
    assert ran("packed_attention") == "torch: no such width"


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
    assert ran("packed_attention") == f"torch: {library.providers(grad.device)[0].name}"
    for right, plain, ours in zip(*results, strict=True):
        allowed = 2 * (plain.double() - right).abs().max()
        allowed = allowed + torch.finfo(dtype).eps * right.abs().max()
        assert (ours.double() - right).abs().max() <= allowed
