"""How many tokens one forward pass may have: as the recipe says, or as the memory of the GPU allows."""

from __future__ import annotations

import torch

from zipr1.core.recipe import Recipe
from zipr1.models import memory
from zipr1.models.policy import Policy

# Of the memory that is free, what a pass may take: the rest is for what fragments and for what is not counted.
SHARE = 0.7


def token_budget(policy: Policy, recipe: Recipe, update: bool) -> int | None:
    """Most tokens, padding included, in one pass of the update or of the rollouts; None for no bound.

    `train.micro_tokens` if it is set; else on a GPU what is free now, by `bytes_per_token`.
    """
    if recipe.train.micro_tokens is not None or policy.device.type != "cuda":
        return recipe.train.micro_tokens
    free, _ = torch.cuda.mem_get_info(policy.device)
    cached = torch.cuda.memory_reserved(policy.device) - torch.cuda.memory_allocated(policy.device)
    return max(1, int(SHARE * (free + cached) / bytes_per_token(policy, recipe, update)))


def bytes_per_token(policy: Policy, recipe: Recipe, update: bool) -> int:
    """As the plan of a run counts them (memory.py). Rollouts: keys and values of all layers, unpruned, and what one
    layer makes on its way. The update: what is kept for the backward pass."""
    merge = policy.processor.settings.merge
    s = memory.loaded_shape(policy.model.config.to_dict(), policy.name, merge)
    size = next(policy.decoder.parameters()).element_size()
    if update:
        return memory.update_bytes(s, size, recipe.model.gradient_checkpointing)
    return memory.cache_bytes(s, size) + memory.layer_bytes(s, size)
