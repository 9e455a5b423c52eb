"""Heads normed and turned by their rotary positions: by hand, and against transformers' own layers."""

import math

import pytest
import torch
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen
from zipr1_kernels import norm_rope, ran


def test_by_hand():
    """x = (1, 2, 3, 4): the halves change places, so that 1 meets 3."""
    x = torch.tensor([1.0, 2, 3, 4]).expand(1, 2, 1, 4)
    cos = torch.tensor([[[1.0, 1, 1, 1], [0, 0, 0, 0.5]]])
    sin = torch.tensor([[[0.0, 0, 0, 0], [-1, -1, 1, 1]]])
    assert norm_rope(x, cos, sin)[0, :, 0].tolist() == [[1, 2, 3, 4], [-3, -4, 1, 4]]
    # The mean of squares is 7.5, and with eps 1.5 it is 9.
    got = norm_rope(x, cos, sin, torch.tensor([3.0, 3, 6, 6]), eps=1.5)[0, :, 0].tolist()
    assert got == [[1, 2, 6, 8], [-6, -8, 1, 6]]


@pytest.mark.parametrize("normed", [True, False])
def test_it_is_what_a_model_does_and_has_its_gradient(normed):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, weight = draw(2, 7, 3, 16), draw(16)
    angle = torch.rand(2, 7, 8, generator=generator, dtype=torch.float64) * math.tau
    cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
    norm = qwen.Qwen3VLTextRMSNorm(16, eps=1e-3).double()
    norm.weight = torch.nn.Parameter(weight.detach().clone())
    heads = x.detach().clone().requires_grad_()
    turned, _ = qwen.apply_rotary_pos_emb(
        (norm(heads) if normed else heads).transpose(1, 2), x[:, :, :1].transpose(1, 2), cos, sin
    )
    signed = torch.cat([-sin[..., :8], sin[..., 8:]], -1)
    got = norm_rope(x, cos, signed, *((weight, 1e-3) if normed else ()))
    assert ran("norm_rope") == "torch: not on a GPU"
    want = turned.transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # its norm is in float32
    grad = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    got.backward(grad)
    want.backward(grad)
    torch.testing.assert_close(x.grad, heads.grad, rtol=1e-5, atol=1e-5)
    if normed:
        torch.testing.assert_close(weight.grad, norm.weight.grad, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_said():
    x, place = torch.zeros(2, 5, 3, 8), torch.zeros(2, 5, 8)
    for bad, said in (
        ((x[..., :7], place[..., :7], place[..., :7]), "last dimension of 7; it must be even"),
        ((x, place[:1], place), r"cos has shape \(1, 5, 8\)"),
        ((x, place, place[:, :4]), r"signed_sin has shape \(2, 4, 8\)"),
        ((x, place, place, torch.zeros(4)), r"weight has shape \(4,\)"),
        ((x, place.half(), place), "cos torch.float16"),
    ):
        with pytest.raises(ValueError, match=said):
            norm_rope(*bad)
