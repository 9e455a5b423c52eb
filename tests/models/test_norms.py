"""Norms by torch's own function: the same numbers as transformers', and none that are of another kind."""

import policychecks
import pytest
import tinymodels
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

from zipr1.models.sparse.norms import norms
from zipr1.models.sparse.patch import sparse_attention
from zipr1.models.sparse.request import Request


class Layer(torch.nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.input_layernorm, self.self_attn = norm, torch.nn.Module()


def one(dtype=torch.float32):
    torch.manual_seed(0)
    norm = Qwen2_5_VLRMSNorm(48).to(dtype)
    norm.weight.data = torch.randn(48).to(dtype)
    ((found, forward),) = norms(Layer(norm))
    assert found is norm
    return norm, forward


def test_in_float32_the_output_and_both_gradients_are_equal_bit_for_bit():
    norm, forward = one()
    x, grad = torch.randn(3, 7, 48).requires_grad_(), torch.randn(3, 7, 48)
    results = []
    for run in (norm, forward):
        out = run(x)
        results.append([out, *torch.autograd.grad(out, (x, norm.weight), grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_is_no_further_from_the_exact_value(dtype):
    norm, forward = one(dtype)
    x = torch.randn(50, 48).to(dtype)
    wide = x.double()
    exact = norm.weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    ours, theirs = ((run(x).double() - exact).abs() for run in (forward, norm))
    assert ours.mean() < theirs.mean() and ours.max() <= theirs.max()
    assert forward(x).dtype == dtype
    # Weights of another dtype: as transformers has it.
    assert torch.equal(forward(x.float()), norm(x.float()))


def test_norms_of_another_kind_are_left_as_they_are():
    gemma = GemmaRMSNorm(48)
    assert not list(norms(Layer(gemma)))
    norm = Qwen2_5_VLRMSNorm(48)
    norm.forward = lambda x: x
    assert not list(norms(Layer(norm))), "somebody has put another forward in its place"


@torch.no_grad()
def test_they_are_in_force_while_a_model_is_sparse(monkeypatch):
    calls = []
    stock = torch.nn.functional.rms_norm
    monkeypatch.setattr(torch.nn.functional, "rms_norm", lambda *a: calls.append(1) or stock(*a))
    policy = tinymodels.make()
    layer = policy.decoder.layers[0]
    x = torch.randn(1, 2, 64)
    with sparse_attention(policy.model, Request(policychecks.sparse(), force=True)):
        layer.input_layernorm(x), layer.post_attention_layernorm(x)
    assert len(calls) == 2
    layer.input_layernorm(x)
    assert len(calls) == 2 and "forward" not in vars(layer.input_layernorm)
