"""Loss terms: clipped surrogates, KL to the dense reference, token log-probabilities.

Tensors in, tensors out; nothing here knows a model. Shapes: B sequences, T answer tokens, V words.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

# Logits that exist at once: 64 MiB in float32, and a few times that while they are worked on.
LOGITS = 2**24


def clipped_surrogate(
    logp_new: torch.Tensor,
    logp_old: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """- min(ratio A, clamp(ratio, 1 - clip, 1 + clip) A) per token: PPO, arXiv 1707.06347 eq. 7.

    Args:
        logp_new: `(B, T)` float, with gradient; logp_old: `(B, T)` of the sampler.
        advantages: `(B,)`, one for all tokens of a sequence.
        mask: `(B, T)` bool, answer tokens; what the others hold (NaN included) has no effect.

    Returns:
        loss: scalar, the mean over a sequence's tokens, then over the B sequences (GRPO,
            arXiv 2402.03300 eq. 3); a sequence without tokens counts as 0.
        stats: over answer tokens, detached scalars: `ratio_mean`, `ratio_max`, `clip_fraction`
            (share with |ratio - 1| > clip).
    """
    ratio = (logp_new - logp_old.detach()).masked_fill(~mask, 0).exp()
    gain = _pessimistic(ratio, advantages[:, None], clip).masked_fill(~mask, 0)
    loss = -(gain.sum(-1) / mask.sum(-1).clamp_min(1)).mean()
    return loss, _stats(ratio, mask, clip)


def clipped_action(
    logp_new: torch.Tensor, logp_old: torch.Tensor, advantages: torch.Tensor, clip: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same surrogate for one action per sequence, such as the kept counts (`cut_log_prob`).

    All `(B,)`. Returns the mean over sequences, and the stats of `clipped_surrogate`. Kept apart
    from the answer's tokens because the ratio of a product of layers is clipped as one.
    """
    ratio = (logp_new - logp_old.detach()).exp()
    loss = -_pessimistic(ratio, advantages, clip).mean()
    return loss, _stats(ratio, torch.ones_like(ratio, dtype=torch.bool), clip)


def difference(logp_new: torch.Tensor, logp_old: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """How far two accounts of the same tokens are apart: |logp_new - logp_old|, the mean over a sequence's tokens, then
    over the B sequences. All `(B, T)`; mask: answer tokens. A detached scalar, nats."""
    apart = (logp_new.detach() - logp_old).abs().masked_fill(~mask, 0)
    return (apart.sum(1) / mask.sum(1).clamp_min(1)).mean()


def in_chunks(
    work: Callable[[slice], tuple[torch.Tensor, ...]], rows: int, words: int
) -> tuple[torch.Tensor, ...]:
    """`work` over all rows, a slice of them at a time, such that rows x words in a slice stay within LOGITS.

    What `work` makes on its way to its results is forgotten and made again in backward, so no tensor of
    rows x words ever exists. Few enough rows are one slice, worked on once. A slice has one row at least.

    Args:
        work: slice of rows -> tensors, of one row a row or of one for the slice.
        rows: how many there are, at least 1; words: V.

    Returns:
        The results of all slices, concatenated.
    """
    size = max(1, LOGITS // words)
    if rows <= size:
        return work(slice(0, rows))
    parts = [
        checkpoint(work, slice(i, i + size), use_reentrant=False, preserve_rng_state=False)
        for i in range(0, rows, size)
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def token_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """log softmax(logits / temperature) at `tokens`, in float32.

    logits: `(..., V)`; tokens: `(...)` int64 in 0..V-1 (at padding any valid id).
    Returns `(...)` float32, <= 0 up to rounding.
    """
    scaled = logits.float() / temperature
    chosen = scaled.gather(-1, tokens[..., None])[..., 0]
    return chosen - scaled.logsumexp(-1)


# Estimators that sum over the vocabulary, and the share of KL(reference || policy) in them.
FORWARD = {"full": 0.0, "jeffreys": 0.5, "forward": 1.0}


def kl_full(
    logits_new: torch.Tensor, logits_ref: torch.Tensor, forward: float = 0.0
) -> torch.Tensor:
    """Divergence of the next token's distributions, summed over the whole vocabulary.

    (1 - forward) * KL(policy || reference) + forward * KL(reference || policy). The first has no gradient where the
    policy is sure of a wrong word; the second pulls hardest there. forward 0.5 is half of Jeffreys' divergence.

    Args:
        logits_new: `(N, V)` finite, with gradient; logits_ref: `(N, V)` finite, used without.
            Divide both by the sampling temperature first if it is not 1.
        forward: share of the second, in [0, 1].

    Returns:
        `(N,)` float32, nats, >= 0 up to rounding. Per token it is exact; as a loss over sampled
        answers it drops the term by which a token changes the KL of later ones.
    """
    new = logits_new.float().log_softmax(-1)
    ref = logits_ref.detach().float().log_softmax(-1)
    # Where both logarithms are -inf the term is 0 by definition; NEVER is finite, so it is.
    return (((1 - forward) * new.exp() - forward * ref.exp()) * (new - ref)).sum(-1)


def kl_k2(logp_new: torch.Tensor, logp_ref: torch.Tensor) -> torch.Tensor:
    """0.5 * (logp_new - logp_ref)^2 at the sampled tokens, any shape; nats, >= 0.

    Schulman, "Approximating KL Divergence" (2020), k2: low variance and little bias, and as a loss
    its expected gradient is that of the KL; k1, the plain log-ratio, has expected gradient 0.
    """
    return 0.5 * (logp_new - logp_ref.detach()).square()


def _pessimistic(ratio: torch.Tensor, advantages: torch.Tensor, clip: float) -> torch.Tensor:
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def _stats(ratio: torch.Tensor, mask: torch.Tensor, clip: float) -> dict[str, torch.Tensor]:
    ratio = ratio.detach().masked_fill(~mask, 0)
    count = mask.sum().clamp_min(1)
    return {
        "ratio_mean": ratio.sum() / count,
        "ratio_max": ratio.max(),
        "clip_fraction": (((ratio - 1).abs() > clip) & mask).sum() / count,
    }
