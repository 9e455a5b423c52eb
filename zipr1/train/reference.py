"""The dense reference's view of a minibatch, and the log-probabilities of answers beside it.

The reference scores each distinct (prompt, answer) once, whatever the number of budgets that gave it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zipr1.core.recipe import Recipe
from zipr1.models.policy import Policy
from zipr1.models.shared_prefill import ANSWERS, shared_states
from zipr1.models.transfer import send
from zipr1.train import losses
from zipr1.train.minibatch import Rows
from zipr1.train.rollout import Batch


@dataclass(frozen=True)
class Reference:
    """The dense reference's view of some rows. states `(U * T, hidden)` of U distinct (prompt, answer) pairs;
    place `(B * T,)` int64 on the CPU: which of them each token of each row is."""

    states: torch.Tensor
    place: torch.Tensor
    model: Any

    @torch.no_grad()
    def logits(self, policy: Policy, part: slice) -> torch.Tensor:
        """`(n, V)` of these tokens of the flattened rows; tokens that rows share go through the head once."""
        distinct, back = send(policy.device, *self.place[part].unique(return_inverse=True))
        return policy.head(self.states[distinct], self.model)[back]


@torch.no_grad()
def look_up(policy: Policy, batch: Batch, rows: Rows, chosen: Sequence[int]) -> Reference:
    """What the dense reference says about some rows; each distinct (prompt, answer) is run once, and where prompts have
    many answers, each prompt."""
    keys = [(rows.prompt[b], tuple(rows.tokens[b].tolist())) for b in chosen]
    distinct = list(dict.fromkeys(keys))
    prompts = list(dict.fromkeys(i for i, _ in distinct))
    answers = [torch.tensor(t) for _, t in distinct]
    # Sharded, all ranks must make the same number of passes.
    share = len(distinct) >= ANSWERS * len(prompts) and not policy.parallel.sharded
    with policy.reference() as model:
        if share:
            encoded = [batch.encoded[i] for i in prompts]
            owner = [prompts.index(i) for i, _ in distinct]
            states, mask = shared_states(policy, encoded, owner, batch.reference, answers, model)
        else:
            encoded = [batch.encoded[i] for i, _ in distinct]
            states, mask = policy.answer_states(encoded, batch.reference, answers, None, model)
    row = {key: place for place, key in enumerate(distinct)}
    width = mask.shape[1]
    back = torch.tensor([row[key] for key in keys])
    place = back[:, None] * width + torch.arange(width)
    return Reference(states.flatten(0, 1), place.flatten(), model)


def token_scores(
    policy: Policy,
    recipe: Recipe,
    states: torch.Tensor,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    reference: Reference | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the answers' tokens and the divergence from the reference there, both `(B, T)` float32.

    states `(B, T, hidden)` with gradient; tokens `(B, T)` int64; mask `(B, T)` bool on the CPU. The divergence is 0
    where the mask is False, and everywhere without a reference. Logits exist a chunk at a time, forward and backward.
    """
    (tokens,) = send(states.device, tokens)
    flat, said, real = states.flatten(0, 1), tokens.flatten(), mask.flatten()
    scale, estimator = recipe.train.temperature, recipe.ppo.kl_estimator

    def work(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = real[part].nonzero()[:, 0]
        if not len(wanted):
            nothing = flat.new_zeros(len(real[part]), dtype=torch.float32)
            return nothing, nothing
        logits = policy.head(flat[part])
        new = losses.token_logprobs(logits, said[part], scale)
        each = torch.zeros_like(new)
        if reference is None:
            return new, each
        dense = reference.logits(policy, part)
        (at,) = send(flat.device, wanted)
        if estimator in losses.FORWARD:
            forward = losses.FORWARD[estimator]
            kl = losses.kl_full(logits[at] / scale, dense[at] / scale, forward)
        else:
            kl = losses.kl_k2(new, losses.token_logprobs(dense, said[part], scale))[at]
        return new, each.index_copy(0, at, kl)

    new, each = losses.in_chunks(work, len(said), policy.words)
    return new.view(mask.shape), each.view(mask.shape)
