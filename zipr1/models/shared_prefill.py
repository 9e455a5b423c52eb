"""The dense model over many answers to few prompts: each prompt is read once, its keys and values serve all answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from zipr1.models import sampling
from zipr1.models.policy import Features, Policy
from zipr1.models.processors import Encoded
from zipr1.models.sparse.hybrid import select_rows
from zipr1.models.sparse.last_layer import last_column
from zipr1.models.transfer import send

# From so many answers a prompt on it pays: it takes a second pass, and keys and values in memory.
ANSWERS = 4


@torch.no_grad()
def shared_states(
    policy: Policy,
    encoded: Sequence[Encoded],
    owner: Sequence[int],
    features: Features,
    answers: Sequence[torch.Tensor],
    model: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `Policy.answer_states` gives for a dense model, to rounding: `(U, T, hidden)` and `(U, T)` bool.

    encoded: distinct prompts; owner: which of them each answer belongs to.
    """
    model = model or policy.model
    device = policy.device
    inputs, valid = policy.rows(encoded, features, None, True, model)
    hidden, cache = sampling.prefill(model, inputs, valid, read_at=last_column(valid))
    owners = torch.tensor(list(owner))
    longest = max(len(a) for a in answers)
    counts = torch.tensor([len(a) for a in answers])
    answered = torch.arange(longest)[None] < counts[:, None]
    starts = torch.tensor([encoded[i].next_position for i in owner])
    following_ids = torch.zeros(len(answers), longest - 1, dtype=torch.long)
    for row, answer in enumerate(answers):
        following_ids[row, : len(answer) - 1] = answer[:-1].cpu()
    positions = starts[:, None] + torch.arange(longest - 1)
    index, ids, positions = send(device, owners, following_ids, positions)
    states = hidden[index, -1:]
    if longest == 1:
        return states, answered
    select_rows(cache, index)
    seen = torch.cat([valid[owners], torch.ones_like(answered[:, 1:])], dim=1)
    following = {
        "inputs_embeds": model.get_input_embeddings()(ids),
        "position_ids": policy.places(positions.expand(3, -1, -1)),
    }
    more = sampling.decode_step(model, following, cache, seen)
    return torch.cat([states, more], dim=1), answered
