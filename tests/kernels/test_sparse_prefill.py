"""Sparse prefill against dense attention with masked keys, in float64."""

import pytest
import torch
from zipr1_kernels import dispatch, pack_indices, ran, sparse_prefill, use
from zipr1_kernels.sparse_prefill import blocked

LENGTH = 11


def masks():
    slots = torch.arange(LENGTH)
    g = torch.Generator().manual_seed(0)
    ragged = torch.rand(3, LENGTH, generator=g) < torch.tensor([0.2, 0.5, 0.9])[:, None]
    ragged[:, -1] = True
    equal = torch.stack([torch.randperm(LENGTH, generator=g) < 4 for _ in range(3)])
    padded = torch.stack([slots >= 4, slots >= 0, slots < 6])
    single = slots.expand(3, -1) == torch.tensor([[0], [5], [10]])
    return {"ragged": ragged, "equal": equal, "padding": padded, "single": single,
            "all": torch.ones(3, LENGTH, dtype=torch.bool)}  # fmt: skip


def example(q_heads=4, heads=2):
    g = torch.Generator().manual_seed(3)

    def make(n, dim):
        # Token-first in memory, as projections give it.
        return torch.randn(3, LENGTH, n, dim, generator=g, dtype=torch.float64).transpose(1, 2)

    return make(q_heads, 8), make(heads, 8), make(heads, 6)


def brute(q, k, v, keep, scale):
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    seen = keep[:, None, None] & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    weights = (q @ k.mT * scale).masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1)
    return (weights @ v).masked_fill(~keep[:, None, :, None], 0)


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_equals_masked_dense_attention_and_its_gradients(name, heads, scale):
    keep = masks()[name]
    inputs = [x.requires_grad_() for x in example(heads=heads)]
    got = sparse_prefill(*inputs, pack_indices(keep), scale=scale)
    want = brute(*inputs, keep, scale or 8**-0.5)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert (got.transpose(1, 2)[~keep] == 0).all()
    grad = torch.randn_like(want)
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, grad),
        torch.autograd.grad(want, inputs, grad),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("name", ["ragged", "equal", "padding", "single"])
def test_dropped_rows_are_never_read(name):
    keep = masks()[name]
    clean = sparse_prefill(*example(), pack_indices(keep))
    inputs = [x.clone() for x in example()]
    for x in inputs:
        x.transpose(1, 2)[~keep] = torch.nan
        x.requires_grad_()
    out = sparse_prefill(*inputs, pack_indices(keep))
    assert torch.equal(out, clean)
    out.square().sum().backward()
    for x in inputs:
        assert x.grad.isfinite().all()
        assert (x.grad.transpose(1, 2)[~keep] == 0).all()


def test_bfloat16_is_within_twice_the_error_of_dense():
    keep = masks()["ragged"]
    exact = brute(*example(), keep, 8**-0.5)
    low = [x.bfloat16() for x in example()]
    dense = (brute(*low, keep, 8**-0.5).double() - exact).abs().max()
    sparse = sparse_prefill(*low, pack_indices(keep))
    assert sparse.dtype == torch.bfloat16
    assert (sparse.double() - exact).abs().max() <= 2 * dense


def test_wrong_arguments_say_what_came():
    q, k, v = example()
    with pytest.raises(ValueError, match="among 10 slots of 3 rows; expected 11 slots"):
        sparse_prefill(q, k, v, pack_indices(masks()["all"][:, 1:]))
    with pytest.raises(ValueError, match=r"v has shape"):
        sparse_prefill(q, k, v[:, :1], pack_indices(masks()["all"]))


@pytest.mark.parametrize("name", ["ragged", "equal", "padding", "single"])
@pytest.mark.parametrize("block", [1, 3, 64])
@pytest.mark.parametrize("lazy", [1, 2**25])
def test_blocks_of_queries_give_the_same(name, block, lazy, monkeypatch):
    """The version for long prompts on a CPU, poisoned where nothing may be read."""
    keep = masks()[name]
    want = brute(*example(), keep, 8**-0.5)
    inputs = [x.clone() for x in example()]
    for x in inputs:
        x.transpose(1, 2)[~keep] = torch.nan
    for key, value in (("LEAST", 1), ("BLOCK", block), ("LAZY", lazy)):
        monkeypatch.setattr(blocked, key, value)
    with torch.no_grad():
        got = sparse_prefill(*inputs, pack_indices(keep))
    assert ran("sparse_prefill") == "torch: blocked, for a long prompt on a CPU"
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert got.stride() == sparse_prefill(*inputs, pack_indices(keep)).stride()
    with use("torch"), torch.no_grad():
        sparse_prefill(*inputs, pack_indices(keep))
        assert ran("sparse_prefill") == "torch: forced"
    sparse_prefill(*(x.requires_grad_() for x in inputs), pack_indices(keep))
    assert ran("sparse_prefill") == "torch: not on a GPU", "a gradient needs the plain version"


@pytest.mark.parametrize("amx", [True, False])
def test_a_cpu_with_units_for_bfloat16_leaves_it_to_torchs_own_attention(amx, monkeypatch):
    """The blocks compute in float32, which takes two to five times as long there; float32 itself is not concerned."""
    monkeypatch.setattr(blocked, "LEAST", 1)
    monkeypatch.setattr(dispatch, "has_amx", lambda: amx)
    keep = masks()["equal"]
    want = brute(*example(), keep, 8**-0.5)
    taken = {}
    for dtype in (torch.bfloat16, torch.float32):
        with torch.no_grad():
            got = sparse_prefill(*(x.to(dtype) for x in example()), pack_indices(keep))
        taken[dtype] = ran("sparse_prefill")
        torch.testing.assert_close(got.double(), want, rtol=0.05, atol=0.05)
    in_blocks = "torch: blocked, for a long prompt on a CPU"
    assert taken[torch.bfloat16] == ("torch: not on a GPU" if amx else in_blocks)
    assert taken[torch.float32] == in_blocks


def test_units_for_bfloat16_are_those_of_the_machine(monkeypatch):
    found = {"amx_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert dispatch.has_amx.__wrapped__()
    found["amx_bf16"] = False
    assert not dispatch.has_amx.__wrapped__()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not dispatch.has_amx.__wrapped__(), "an older torch does not tell"
