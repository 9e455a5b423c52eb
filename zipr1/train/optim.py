"""The optimiser, its schedule, and its state as plain tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from zipr1.core import distributed, signals
from zipr1.core.errors import InputError, RunError
from zipr1.core.recipe import Optim
from zipr1.models.tensors import check_finite, check_names, shapes
from zipr1.models.transfer import fetch

# As transformers names them in all families here, with their norms and low-rank adapters; the towers have their own.
_CHOOSES = re.compile(r"\b(?:self_attn|attention|attn)\.(?:q|k)_(?:proj|norm)\b")
_SEES = re.compile(r"\b(?:visual|vision_tower|vision_model)\b")


class Optimizers:
    """AdamW (arXiv 1711.05101), or with `name: muon` Muon for matrices and AdamW for the rest, as one optimiser."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def set_rate(self, rate: float) -> None:
        """rate: of queries' and keys' projections; the others' is `optim.lr_ratio_rest` of it."""
        for group in self.param_groups:
            group["lr"] = rate * group["ratio"]

    def scale_rate(self, share: float) -> None:
        """Multiply this step's rates."""
        for group in self.param_groups:
            group["lr"] *= share

    def part_of(self, parameter: torch.nn.Parameter) -> torch.optim.Optimizer:
        """The optimiser that owns a parameter."""
        for part in self.parts:
            if any(parameter is p for group in part.param_groups for p in group["params"]):
                return part
        raise KeyError("not a parameter of this optimiser")

    def state_of(self, parameter: torch.nn.Parameter) -> dict[str, Any]:
        """The state of a parameter in the optimiser that owns it; to be changed in place."""
        state: dict[str, Any] = self.part_of(parameter).state[parameter]
        return state


def build(named: Sequence[tuple[str, torch.nn.Parameter]], settings: Optim) -> Optimizers:
    """Over the trainable parameters; vectors (norms, biases) are not decayed. Raises InputError if there are none.

    Muon orthogonalises the momentum of matrices; its updates are scaled to AdamW's size (arXiv 2502.16982), so one
    rate serves both. Embeddings and convolutions stay with AdamW.
    """
    if not named:
        raise InputError(
            "the recipe trains nothing: all is frozen; set model.lora or another model"
        )
    chooses = {id(p) for n, p in named if chooses_tokens(n)}
    if settings.lr_ratio_rest != 1 and not chooses:
        raise InputError(
            f"optim.lr_ratio_rest {settings.lr_ratio_rest:g} is the rate of all but the projections of queries and "
            "keys, and none of those is trained here; set it to 1"
        )
    muon = {
        id(p)
        for n, p in named
        if settings.name == "muon" and p.ndim == 2 and "embed_tokens" not in n
    }
    parts: list[torch.optim.Optimizer] = []
    for name in ("adamw", "muon"):
        groups = []
        # An order that saved runs rely on in nothing: the state is kept by the parameters' names.
        for chosen, decayed in ((False, True), (True, True), (False, False), (True, False)):
            some = [
                p
                for _, p in named
                if (id(p) in muon) == (name == "muon")
                and (id(p) in chooses) == chosen
                and (p.ndim > 1) == decayed
            ]
            decay = settings.weight_decay if decayed else 0.0
            ratio = 1.0 if chosen else settings.lr_ratio_rest
            if some:
                groups.append({"params": some, "weight_decay": decay, "ratio": ratio})
        if groups and name == "adamw":
            first, second = settings.betas
            parts.append(torch.optim.AdamW(groups, lr=settings.lr, betas=(first, second)))
        elif groups:
            parts.append(torch.optim.Muon(groups, settings.lr, adjust_lr_fn="match_rms_adamw"))
    return Optimizers(parts)


def chooses_tokens(name: str) -> bool:
    """Whether a parameter of this name makes queries or keys of the language model, by which tokens are chosen."""
    return bool(_CHOOSES.search(name)) and not _SEES.search(name)


def learning_rate(settings: Optim, step: int, steps: int) -> float:
    """Rate of `step` (from 0) of `steps`: linear warm-up, then the schedule; the last step is above 0."""
    warm = round(settings.warmup * steps)
    if step < warm:
        return settings.lr * (step + 1) / warm
    if settings.lr_scheduler_type == "constant_with_warmup":
        return settings.lr
    done = (step - warm + 0.5) / max(1, steps - warm)
    floor = settings.min_lr_ratio if settings.lr_scheduler_type == "cosine_with_min_lr" else 0.0
    return settings.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def clipped_step(
    optimizer: Optimizers,
    named: Sequence[tuple[str, torch.nn.Parameter]],
    max_norm: float,
    loss: torch.Tensor,
) -> float:
    """Clip the gradient, step, and return its norm before clipping.

    Raises RunError if it or `loss`, a scalar, is not finite; the weights are then as they were. A GPU is waited for
    once.
    """
    length = distributed.whole(torch.nn.utils.clip_grad_norm_([p for _, p in named], max_norm))
    norm, value = (float(x) for x in fetch(length, loss))
    if not (math.isfinite(value) and math.isfinite(norm)):
        raise RunError(
            f"the loss is {value} and its gradient's norm {norm}; start again with a lower optim.lr in another "
            "--output (model.path=RUN goes on from a run's last checkpoint)"
        )
    # From here on the weights are no longer those of before the step.
    signals.hold()
    optimizer.step()
    return norm


def state_tensors(
    optimizer: Optimizers,
    named: Sequence[tuple[str, torch.nn.Parameter]],
    newest: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Moments and step counts of every parameter by its name, to be saved as safetensors; of several ranks the first
    has them. All ranks must ask. A parameter that no gradient has reached yet has those it would begin with: zeros.
    newest: weights that the model's folder does not have, by name; they are saved beside."""
    return distributed.whole_state(
        {
            f"{name}/{key}": torch.as_tensor(value)
            for name, parameter in named
            for key, value in _state_of(optimizer, parameter).items()
        }
        | {f"{name}/weight": value for name, value in (newest or {}).items()}
    )


def restore(
    optimizer: Optimizers,
    named: Sequence[tuple[str, torch.nn.Parameter]],
    tensors: Mapping[str, torch.Tensor],
    where: str,
    weights: bool = False,
) -> dict[str, torch.Tensor]:
    """Put back what `state_tensors` gave, and return the newest weights by name. where: the file, for messages.
    weights: whether it must have them.

    Raises InputError that names tensors that are missing, of another model or shape, not finite, or a count of steps
    that is none.
    """
    wanted = {
        f"{name}/{field}": () if field == "step" else tuple(parameter.shape)
        for name, parameter in named
        for field in (*_fields(optimizer, parameter), *["weight"] * weights)
    }
    check_names(where, wanted, shapes(tensors))
    check_finite(where, tensors.items())
    newest = {}
    for name, parameter in named:
        if weights:
            newest[name] = _placed(tensors[f"{name}/weight"], parameter)
        for field in _fields(optimizer, parameter):
            value = tensors[f"{name}/{field}"]
            if field != "step":
                value = _placed(value, parameter)
            elif not (value >= 0 and float(value).is_integer()):
                raise InputError(
                    f"{where}: {name}/step is {float(value)}, and a count of steps is expected; bring the file back "
                    "from a copy"
                )
            optimizer.state_of(parameter)[field] = value
    return newest


def _placed(value: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """A whole tensor as a parameter of that shape is: its device, dtype, and shard."""
    value = value.to(device=parameter.device, dtype=parameter.dtype)
    return distributed.like(value, parameter.detach())


def _fields(optimizer: Optimizers, parameter: torch.nn.Parameter) -> tuple[str, ...]:
    """What the optimiser of a parameter remembers of it."""
    if isinstance(optimizer.part_of(parameter), torch.optim.Muon):
        return ("momentum_buffer",)
    return ("step", "exp_avg", "exp_avg_sq")


def _state_of(optimizer: Optimizers, parameter: torch.nn.Parameter) -> dict[str, Any]:
    """What is remembered of a parameter now; zeros, as the optimiser would make them, before its first gradient."""
    known = optimizer.state_of(parameter)
    if known:
        return known
    return {
        field: torch.tensor(0.0) if field == "step" else torch.zeros_like(parameter.detach())
        for field in _fields(optimizer, parameter)
    }
