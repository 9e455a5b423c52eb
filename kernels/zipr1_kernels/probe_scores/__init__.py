"""Score prompt tokens by the attention that a few probe queries give them."""

from __future__ import annotations

import torch

from zipr1_kernels import checks, dispatch
from zipr1_kernels.probe_scores import blocked, reference


def probe_scores(
    q_probe: torch.Tensor,
    k: torch.Tensor,
    probes: torch.Tensor,
    probe_valid: torch.Tensor,
    candidates: torch.Tensor,
    *,
    scale: float | None = None,
    normalise: bool = True,
) -> torch.Tensor:
    """Column sums of softmax(Q_probe K^T * scale) over probes and heads; higher is more important.

    Each valid probe attends causally to the candidates at slots up to its own. Source: ZipVL,
    arXiv 2410.08584 (a_j, and a~_j = a_j / nnz_j with `normalise`).

    Args:
        q_probe: `(B, HQ, R, D)` queries of the probes, gathered already, after RoPE.
        k: `(B, H, L, D)` keys after RoPE; HQ is a multiple of H (query head h uses key head
            h // (HQ / H)).
        probes: `(B, R)` int64, the slot of each probe, 0..L-1 (padding slots count).
        probe_valid: `(B, R)` bool; other probes contribute nothing.
        candidates: `(B, L)` bool, the prompt's tokens; False for padding.
        scale: factor of the logits; default 1 / sqrt(D).
        normalise: divide column j by the number of valid probes that can see it.

    Returns:
        `(B, L)` float32 (float64 for float64 inputs), >= 0; exactly 0 for padding and for columns
        that no probe sees. Without `normalise` a row sums to HQ * (valid probes).

    Differentiable in `q_probe` and `k`. NaN at invalid probes or non-candidate keys never leaks,
    nor does it into gradients. Memory, never L x L: O(B HQ R L) floats in plain torch, O(B L) and 4 MB in the
    blocked version (a CPU, many probes, no gradient), O(B (L + HQ R)) in the kernel.
    """
    checks.shape("q_probe", q_probe, (None, None, None, None), "(B, HQ, R, D)")
    batch, _, count, dim = q_probe.shape
    checks.shape("k", k, (batch, None, None, dim), "(B, H, L, D)")
    checks.shape("probes", probes, (batch, count), "(B, R)")
    checks.shape("probe_valid", probe_valid, (batch, count), "(B, R)")
    checks.shape("candidates", candidates, (batch, k.shape[2]), "(B, L)")
    checks.boolean("probe_valid", probe_valid)
    checks.boolean("candidates", candidates)
    checks.heads(q_probe, k)
    checks.same_dtype(q_probe=q_probe, k=k)
    checks.integer("probes", probes)
    tensors = (q_probe, k, probes, probe_valid, candidates)
    run = reference.probe_scores
    cannot, slower = dispatch.unfit(k.dtype, dim), dispatch.slow(k.dtype)
    if dispatch.plan("probe_scores", *tensors, cannot=cannot, slower=slower):
        from zipr1_kernels.probe_scores import kernel

        run = kernel.probe_scores
    elif dispatch.blocked(
        "probe_scores", q_probe, k, pays=blocked.pays(q_probe.shape[1], count, k.shape[2])
    ):
        run = blocked.probe_scores
    return run(*tensors, scale=scale, normalise=normalise)
