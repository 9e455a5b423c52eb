"""How many tokens one forward pass may have: as the recipe says, or as the memory of the GPU allows."""

from __future__ import annotations

import torch

from zipr1.core.recipe import Recipe
from zipr1.models.policy import Policy

# Of the memory that is free, what a pass may take: the rest is for what fragments and for what is not counted.
SHARE = 0.7


def most_tokens(policy: Policy, recipe: Recipe, update: bool) -> int | None:
    """Most tokens, padding included, in one pass of the update or of the rollouts; None for no bound.

    `train.micro_tokens` if it is set; else on a GPU what is free now, by `bytes_per_token`.
    """
    if recipe.train.micro_tokens is not None or policy.device.type != "cuda":
        return recipe.train.micro_tokens
    free, _ = torch.cuda.mem_get_info(policy.device)
    cached = torch.cuda.memory_reserved(policy.device) - torch.cuda.memory_allocated(policy.device)
    return max(1, int(SHARE * (free + cached) / bytes_per_token(policy, recipe, update)))


def bytes_per_token(policy: Policy, recipe: Recipe, update: bool) -> int:
    """Estimated. Rollouts: keys and values of all layers, unpruned, and what one layer makes on its way. The update:
    what every layer keeps for backward (about 24 hidden-sized and 3 MLP-sized tensors), with gradient checkpointing
    one hidden-sized tensor a layer and what one layer makes.
    """
    config = policy.decoder.config
    size = next(policy.decoder.parameters()).element_size()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = config.num_hidden_layers
    layer = 24 * config.hidden_size + 3 * config.intermediate_size
    if not update:
        return size * (layers * 2 * config.num_key_value_heads * head + layer)
    if recipe.model.gradient_checkpointing:
        return size * (layers * config.hidden_size + layer)
    return size * layers * layer
