"""The gated prefill of the method `through` at the head dimension of real models: fused attention, exact gradients."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from zipr1_kernels import pack_indices, sparse_prefill

from zipr1.models.sparse.gate import gated_prefill, straight_through


class Watch(TorchDispatchMode):
    """Names of the operations that ran, and the numbers in the largest tensor that one of them made."""

    def __init__(self):
        super().__init__()
        self.ran, self.largest = set(), 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.ran.add(op.overloadpacket.__name__)
        for one in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(one, torch.Tensor):
                self.largest = max(self.largest, one.numel())
        return out


def inputs(length, dim, values, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, length, dim), (1, length, dim), (1, length, values)]
    q, k, v = (torch.randn(1, *s, generator=generator, dtype=dtype) for s in shapes)
    keep = torch.rand(1, length, generator=generator) < 0.7
    keep[:, 0] = True
    toward = torch.randn(1, 2, length, values, generator=generator, dtype=dtype)
    return q, k, v, keep, toward


def by_hand(q, k, v, factor, keep, scale):
    """One query at a time: keys weigh `factor` as much, and the outputs are multiplied by it."""
    rows = []
    for h in range(q.shape[1]):
        for i in range(q.shape[2]):
            seen = [j for j in range(i + 1) if keep[0, j]]
            weights = (k[0, 0, seen] @ q[0, h, i] * scale).exp() * factor[0, seen]
            value = weights / weights.sum() @ v[0, 0, seen] * factor[0, i]
            rows.append(value if keep[0, i] else torch.zeros_like(value))
    return torch.stack(rows).view(1, q.shape[1], q.shape[2], -1)


# Beside 128, widths that are no multiple of 8, and values that are wider than queries.
@pytest.mark.parametrize(("dim", "values"), [(128, 128), (20, 20), (8, 24)])
def test_all_gradients_are_those_of_the_definition(dim, values):
    q, k, v, keep, toward = inputs(21, dim, values)
    scale = dim**-0.5
    gate = torch.zeros(1, 21, dtype=torch.float64, requires_grad=True)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = gated_prefill(q, k, v, pack_indices(keep), gate, scale)
    torch.testing.assert_close(out, sparse_prefill(q, k, v, pack_indices(keep), scale=scale))
    got = torch.autograd.grad((out * toward).sum(), [*leaves, gate])
    factor = torch.ones(1, 21, dtype=torch.float64, requires_grad=True)
    wanted = by_hand(q, k, v, factor, keep, scale)
    torch.testing.assert_close(out, wanted)
    expected = torch.autograd.grad((wanted * toward).sum(), [*leaves, factor])
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert got[3][keep].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_head_dimension_128_attention_is_fused_and_makes_no_square(dtype):
    """600 tokens, n of them kept: weights of a head are n x n numbers, the largest tensor of all 2 x 600 x 136."""
    q, k, v, keep, toward = inputs(600, 128, 128, dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    gate = torch.zeros(1, 600, requires_grad=True)
    with Watch() as watch:
        out = gated_prefill(q, k, v, pack_indices(keep), gate, 128**-0.5)
        torch.autograd.grad((out * toward).sum(), [*leaves, gate])
    assert {
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    } <= watch.ran
    assert watch.largest == 2 * 600 * 136 < int(keep.sum()) ** 2


def test_the_factor_is_1_with_the_gradient_of_the_chance():
    cut = torch.tensor([[0.0, 0.5, 0.7, 0.95]], requires_grad=True)
    factor = straight_through(cut, 0.4, 0.9)
    assert factor.tolist() == [[0.0] * 4]
    # (0.9 - c) / 0.5 between 0.4 and 0.9: -2 there, and 0 outside.
    (slope,) = torch.autograd.grad(factor.sum(), cut)
    torch.testing.assert_close(slope, torch.tensor([[0.0, -2.0, -2.0, 0.0]]))
