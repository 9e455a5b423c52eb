"""How a model's tokens are chosen: as its run was trained, as its exported folder says, or by default."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from zipr1.errors import InputError
from zipr1.recipe import Probes, Sparse, load

# The section `sparse` of recipes/tiny.yaml: the embedded model's prompts are short, so none is too short to be pruned.
TINY = Sparse(skip="layer", keep_last=1, probes=Probes(recent=12, random=0), dense_below=0)


def sparsity_of(model: str) -> tuple[Sparse, str]:
    """(the settings, where they are written)."""
    folder = Path(model)
    if model == "tiny":
        return TINY, "the embedded model"
    if (folder / "run.json").is_file() and (folder / "recipe.yaml").is_file():
        return load(folder / "recipe.yaml").sparse, str(folder / "recipe.yaml")
    written = folder / "zipr1.json"
    if written.is_file():
        try:
            values = json.loads(written.read_text(encoding="utf-8"))["sparse"]
            return Sparse.model_validate(values), str(written)
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            reason = " ".join(str(error).split())[:120]
            raise InputError(
                f"{written}: holds no sparsity settings ({reason}); export the run again"
            ) from None
    return Sparse(), "the defaults"
