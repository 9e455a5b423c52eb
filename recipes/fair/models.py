"""What a path means to the lock-box and the table: its weights and their hash, its recipe, its untouched base."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zipr1.core.errors import InputError
from zipr1.core.load import load
from zipr1.core.recipe import Model, Recipe, Sparse
from zipr1.core.runs import how_it_stopped, run_of
from zipr1.core.types import Prompt
from zipr1.data.embedded import SOURCES
from zipr1.models.open import find_source, origin
from zipr1.models.policy import load_policy
from zipr1.train import heldout

RECIPE = Path(__file__).resolve().parents[1] / "tiny.yaml"


@dataclass(frozen=True)
class Subject:
    """A model to ask. name: of its run's folder, or `tiny`. folder: of the run, None without one. sparse: how its
    tokens are chosen, the run's inference p included. base: what the first run of its row of runs began with.
    weights: sha256 of its tensors."""

    path: str
    name: str
    folder: Path | None
    recipe: Recipe
    sparse: Sparse
    base: str
    weights: str

    @property
    def seedless(self) -> str:
        """A hash that runs share which differ by their seed alone."""
        return self.recipe.model_copy(update={"seed": 0}).sha256()


def find(path: str) -> Subject:
    """What `path` is: a finished run of the embedded tasks, a folder with its recipe, or `tiny`. Raises InputError."""
    source = find_source(path)
    if path == "tiny":
        recipe, folder, name = load(RECIPE), None, path
    else:
        if source.recipe is None:
            raise InputError(
                f"{path}: no run that zipr1 trained, so nobody knows what it was trained on; name a run's folder"
            )
        recipe, folder = source.recipe, run_of(Path(path))
        stopped = how_it_stopped(folder) if folder is not None else ""
        if stopped:
            raise InputError(f"{path}: this run {stopped}; finish it first")
        name = (folder or Path(path)).resolve().name
    if recipe.data.source not in SOURCES:
        raise InputError(
            f"{path}: trained on {recipe.data.source}; the questions are those of the embedded tasks "
            f"({', '.join(SOURCES)}): name a run of one of them"
        )
    base = origin(recipe.model).path
    if base == "scratch":
        raise InputError(
            f"{path}: trained from random weights, and what is asked is what it lost against its base; name a run that "
            "began with a model"
        )
    return Subject(path, name, folder, recipe, source.sparse, base, weights_hash(source.place))


def weights_hash(place: str) -> str:
    """sha256 of all tensors in the folder's safetensors files: names, dtypes, shapes and bytes, in the order of names,
    however they are spread over files."""
    import torch
    from safetensors import safe_open

    where = {}
    for path in sorted(Path(place).rglob("*.safetensors")):
        beside = path.parent.relative_to(place)
        with safe_open(path, "pt") as file:
            where |= {f"{beside}:{name}": (path, name) for name in list(file.keys())}
    if not where:
        raise InputError(f"{place}: no safetensors file; name a run's folder, or tiny")
    digest = hashlib.sha256()
    for key, (path, name) in sorted(where.items()):
        with safe_open(path, "pt") as file:
            tensor = file.get_tensor(name)
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def ask(
    path: str, recipe: Recipe, prompts: Sequence[Prompt], settings: Sequence[Sparse | None]
) -> list[heldout.Result]:
    """Answers of the model `path` to the same questions at each of the settings (None: dense)."""
    return heldout.evaluate(load_policy(Model(path=path)), recipe, prompts, settings)
