"""Which model a command means, and the sparsity that it was trained for.

Commands share one default: the newest run under runs/ that has a checkpoint, else the embedded `tiny`.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from zipr1.errors import InputError
from zipr1.recipe import Probes, Sparse, load

# The section `sparse` of recipes/tiny.yaml: the embedded model's prompts are short, so none is too short to be pruned.
TINY = Sparse(skip="layer", keep_last=1, probes=Probes(recent=12, random=0), dense_below=0)


def find_model(given: str | None, base: Path = Path("runs")) -> tuple[str, str]:
    """(what `zipr1.load` takes, a line that says so and why).

    given: a run directory, a model folder, a hub id or `tiny`; None takes the newest run with a checkpoint in `base`.
    """
    if given is not None:
        return given, f"model: {given}"
    runs = [p for p in base.glob("*") if (p / "recipe.yaml").is_file() and (p / "last").exists()]
    if not runs:
        return (
            "tiny",
            f"model: tiny, the embedded one ({base}/ has no trained run; name one with --model)",
        )
    newest = max(runs, key=lambda p: ((p / "last").stat().st_mtime, p.name))
    return str(newest), f"model: {newest}, the newest run (name another with --model)"


def sparsity_of(model: str) -> tuple[Sparse, str]:
    """(how tokens are chosen, where that is written): a run's recipe, an exported folder's zipr1.json, or defaults."""
    folder = Path(model)
    if model == "tiny":
        return TINY, "the embedded model's"
    if (folder / "run.json").is_file() and (folder / "recipe.yaml").is_file():
        return load(folder / "recipe.yaml").sparse, f"{folder / 'recipe.yaml'}"
    written = folder / "zipr1.json"
    if written.is_file():
        try:
            return Sparse.model_validate(json.loads(written.read_text())["sparse"]), str(written)
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            reason = " ".join(str(error).split())[:120]
            raise InputError(
                f"{written}: holds no sparsity settings ({reason}); export the run again"
            ) from None
    return Sparse(), "the defaults"
