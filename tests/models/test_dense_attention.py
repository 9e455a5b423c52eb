"""Attention of a dense pass: transformers' own, and where a GPU would be slow by that."""

import pytest
import torch
import torch.nn.functional as F

from zipr1.models.sparse.attention import EXPANDS, zipr1_attention


class Layer(torch.nn.Module):
    """What attention asks of a layer of a decoder, or of a tower."""

    def __init__(self, is_causal=True, shared=2):
        super().__init__()
        self.is_causal, self.num_key_value_groups = is_causal, shared


def inputs(dtype=torch.float32, queries=7, heads=2):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, queries, 12), (2, heads, 7, 12), (2, heads, 7, 12)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.fixture
def seen(monkeypatch):
    """Key heads, and whether torch is told to share them, of each call; as on a GPU."""
    found, real = [], F.scaled_dot_product_attention

    def watched(q, k, v, **options):
        found.append((k.shape[1], options.get("enable_gqa", False)))
        return real(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    return found


def test_a_dense_pass_in_float32_on_a_gpu_shares_no_heads(seen, monkeypatch):
    """Or torch would write all weights to memory. Result and gradients are the same."""
    leaves = [x.requires_grad_() for x in inputs()]
    want = zipr1_attention(Layer(), *leaves, None, scaling=0.3)[0]
    monkeypatch.setitem(EXPANDS, "cpu", True)
    got = zipr1_attention(Layer(), *leaves, None, scaling=0.3)[0]
    assert seen == [(2, True), (4, False)]
    assert got.shape == want.shape and got.stride() == want.stride()
    torch.testing.assert_close(got, want)
    pairs = (torch.autograd.grad(x.square().sum(), leaves) for x in (got, want))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("layer", "given", "mask"),
    [
        (Layer(), inputs(torch.bfloat16), None),
        (Layer(), inputs(queries=1), None),  # a step of decoding
        (Layer(), inputs(queries=3), None),  # later tokens of a cache
        (Layer(), inputs(), torch.ones(7, 7, dtype=torch.bool).tril()),
        (Layer(shared=1), inputs(heads=4), None),
        (Layer(is_causal=False), inputs(), None),  # of a tower
    ],
)  # fmt: skip
def test_what_else_is_transformers_own(layer, given, mask, monkeypatch):
    want = zipr1_attention(layer, *given, mask)[0]
    monkeypatch.setitem(EXPANDS, "cpu", True)
    monkeypatch.setattr("zipr1.models.sparse.attention.fused", None)
    assert torch.equal(zipr1_attention(layer, *given, mask)[0], want)
