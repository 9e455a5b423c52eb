"""The optimiser, its schedule, and its state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from zipr1.errors import InputError
from zipr1.recipe import Optim


def build(named: Sequence[tuple[str, torch.nn.Parameter]], settings: Optim) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over the trainable parameters; vectors (norms, biases) are not decayed."""
    if not named:
        raise InputError(
            "the recipe trains nothing: every parameter is frozen; set model.lora or another model"
        )
    matrices = [p for _, p in named if p.ndim > 1]
    vectors = [p for _, p in named if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98))


def learning_rate(settings: Optim, step: int, steps: int) -> float:
    """Rate of `step` (from 0) of `steps`: linear warm-up, then the schedule; the last step is above 0."""
    warm = round(settings.warmup * steps)
    if step < warm:
        return settings.lr * (step + 1) / warm
    if settings.schedule == "constant":
        return settings.lr
    done = (step - warm + 0.5) / max(1, steps - warm)
    floor = 0.1 if settings.schedule == "cosine" else 0.0
    return settings.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def state_tensors(
    optimizer: torch.optim.Optimizer, named: Sequence[tuple[str, torch.nn.Parameter]]
) -> dict[str, torch.Tensor]:
    """Moments and step counts by parameter name, to be saved as safetensors."""
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for name, parameter in named
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore(
    optimizer: torch.optim.Optimizer,
    named: Sequence[tuple[str, torch.nn.Parameter]],
    tensors: dict[str, torch.Tensor],
) -> None:
    """Put back what `state_tensors` gave. Raises InputError for the state of another model."""
    parameters = dict(named)
    names = {key.rsplit("/", 1)[0] for key in tensors}
    if strange := names - set(parameters):
        raise InputError(
            f"the checkpoint's optimiser knows '{min(strange)}', which this model does not train"
        )
    for key, value in tensors.items():
        name, field = key.rsplit("/", 1)
        parameter = parameters[name]
        if field != "step" and value.shape != parameter.shape:
            raise InputError(
                f"the checkpoint's '{name}' is {tuple(value.shape)}, the model's {tuple(parameter.shape)}"
            )
        where = "cpu" if field == "step" else parameter.device
        optimizer.state[parameter][field] = value.to(where)
