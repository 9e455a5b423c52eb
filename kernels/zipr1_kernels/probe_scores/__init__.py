"""Score prompt tokens by the attention that a few probe queries give them."""

from __future__ import annotations

import torch

from zipr1_kernels import checks, dispatch
from zipr1_kernels.probe_scores import blocked, reference


def probe_scores(
    q_probe: torch.Tensor,
    k: torch.Tensor,
    probes: torch.Tensor,
    candidates: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    scale: float | None = None,
    normalise: bool = True,
) -> torch.Tensor:
    """Column sums of softmax(Q_probe K^T * scale) over probes and heads; higher is more important.

    Each probe attends causally to the candidates at slots up to its own. Source: ZipVL,
    arXiv 2410.08584 (a_j, and a~_j = a_j / nnz_j with `normalise`).

    Args:
        q_probe: `(P, HQ, R, D)` queries of the probes, gathered already, after RoPE.
        k: `(B, H, L, D)` keys after RoPE; HQ is a multiple of H (query head h uses key head
            h // (HQ / H)).
        probes: `(P, R)` integer, the slot of each probe, 0..L-1 (padding slots count); -1: none, contributes nothing.
        candidates: `(B, L)` bool, the prompt's tokens; False for padding.
        rows: `(P,)` integer, which row of keys each row of probes attends to; None: its own, P = B.
        scale: factor of the logits; default 1 / sqrt(D).
        normalise: divide column j by the number of probes that can see it.

    Returns:
        `(P, L)` float32 (float64 for float64 inputs), >= 0; exactly 0 for padding and for columns
        that no probe sees. Without `normalise` a row sums to HQ * (its probes).

    Differentiable in `q_probe` and `k`. NaN where there is no probe or at non-candidate keys never leaks,
    nor does it into gradients. Memory, never L x L: O(B HQ R L) floats in plain torch, O(B L) and 4 MB in the
    blocked version (a CPU, many probes, no gradient), O(B (L + HQ R)) in the kernel.
    """
    checks.shape("q_probe", q_probe, (None, None, None, None), "(P, HQ, R, D)")
    many, _, count, dim = q_probe.shape
    checks.shape("k", k, (many if rows is None else None, None, None, dim), "(B, H, L, D)")
    checks.shape("probes", probes, (many, count), "(P, R)")
    checks.shape("candidates", candidates, (k.shape[0], k.shape[2]), "(B, L)")
    checks.boolean("candidates", candidates)
    checks.heads(q_probe, k)
    checks.same_dtype(q_probe=q_probe, k=k)
    checks.integer("probes", probes)
    tensors = [q_probe, k, probes, candidates]
    if rows is not None:
        checks.shape("rows", rows, (many,), "(P,)")
        checks.integer("rows", rows)
        tensors.append(rows)
    run = reference.probe_scores
    cannot, slower = dispatch.unfit(k.dtype, dim), dispatch.slow(k.dtype)
    if dispatch.plan("probe_scores", *tensors, cannot=cannot, slower=slower):
        from zipr1_kernels.probe_scores import kernel

        run = kernel.probe_scores
    elif dispatch.blocked(
        "probe_scores", q_probe, k, pays=blocked.pays(q_probe.shape[1], count, k.shape[2])
    ):
        run = blocked.probe_scores
    return run(*tensors[:4], rows=rows, scale=scale, normalise=normalise)
