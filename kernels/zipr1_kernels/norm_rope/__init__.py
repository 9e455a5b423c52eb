"""Turn heads by their rotary positions, normed first where the model norms its heads."""

from __future__ import annotations

import torch

from zipr1_kernels import checks, dispatch
from zipr1_kernels.norm_rope import reference


def norm_rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    signed_sin: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """`x * cos + swapped * signed_sin`, where `swapped` is x with the halves of its last dimension in each other's
    place: the rotary embedding of models of the Llama kind (arXiv 2104.09864, equation 34, by halves). With a weight,
    x is `weight * x / rms(x)` (arXiv 1910.07467) first.

    Args:
        x: `(B, L, H, D)`, D even. Heads come last but one here, as projections lay them out.
        cos, signed_sin: `(B, L, D)`, of x's dtype; the first half of signed_sin has its sign changed.
        weight: `(D,)`, of x's dtype. eps: is added to the mean of squares.

    Returns:
        `(B, L, H, D)`, contiguous. Differentiable in all tensors. The kernel computes in float32 and rounds once.
    """
    checks.shape("x", x, (None, None, None, None), "(B, L, H, D)")
    batch, length, _, dim = x.shape
    if dim % 2:
        raise ValueError(
            f"x has a last dimension of {dim}; it must be even, for its halves change places"
        )
    checks.shape("cos", cos, (batch, length, dim), "(B, L, D)")
    checks.shape("signed_sin", signed_sin, (batch, length, dim), "(B, L, D)")
    tensors = {"x": x, "cos": cos, "signed_sin": signed_sin}
    if weight is not None:
        checks.shape("weight", weight, (dim,), "(D,)")
        tensors["weight"] = weight
    checks.same_dtype(**tensors)
    cannot = dispatch.unfit(x.dtype, dim)
    if not dispatch.plan("norm_rope", *tensors.values(), cannot=cannot):
        return reference.norm_rope(x, cos, signed_sin, weight, eps)
    from zipr1_kernels.norm_rope import kernel

    # With a gradient or without: a step's answers are scored in its update as they were when they were sampled.
    return kernel.norm_rope(x, cos, signed_sin, weight, eps)
