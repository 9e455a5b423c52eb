"""ZipR1: reinforcement learning that teaches a vision-language model to look at fewer tokens.

    import zipr1
    policy = zipr1.load("tiny")

Importing this loads no torch; `load` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zipr1.models import Policy

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(
    model: str = "tiny", *, device: str | None = None, seed: int = 0, **settings: Any
) -> Policy:
    """The policy behind `model`: `tiny`, a run directory, a model folder or a hub id.

    device: None takes CUDA where there is one. settings: the other keys of a recipe's `model` section.
    """
    from zipr1.models import load_policy
    from zipr1.recipe import validate

    recipe = validate({"model": {"path": model, **settings}}, "zipr1.load")
    return load_policy(recipe.model, device, seed)
