"""What a run directory holds, read for export: recipe, measurements, the newest checkpoint, and where it began."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zipr1.core.checksums import COMPLETE
from zipr1.core.config import parse
from zipr1.core.errors import InputError
from zipr1.core.load import load_written
from zipr1.core.recipe import Model, Recipe
from zipr1.core.records import read
from zipr1.core.runs import how_it_stopped
from zipr1.export.request import find_checkpoint
from zipr1.models.open import find_source, origin, resolve, stored_dtype

# Of the weights in this package; the digits they were trained on are CC BY 4.0.
TINY_LICENCE = "apache-2.0"


@dataclass(frozen=True)
class Source:
    """A run, ready to be exported. base, revision: what its recipe started from, followed back through runs of runs;
    summary: empty where it does not speak of these weights, for the run did not finish or another checkpoint was asked
    for; stopped: where an unfinished run stopped, else empty; weights: the checkpoint's model folder; trained_on: what
    the adapter was trained on, None where the run trained all weights."""

    root: Path
    recipe: Recipe
    run: dict[str, Any]
    summary: dict[str, Any]
    weights: Path
    step: int
    base: str
    revision: str | None
    stopped: str
    trained_on: Model | None

    @property
    def base_is_public(self) -> bool:
        """Whether the base is named as the hub names models, rather than a folder of this machine."""
        return self.base != "tiny" and not Path(self.base).exists()

    def licence(self) -> str | None:
        """The licence that the base's own model card states; None if there is no card here."""
        if self.base == "tiny":
            return TINY_LICENCE
        text = _file_of(self.base, "README.md", self.revision)
        if text is None or not text.startswith("---"):
            return None
        try:
            head = parse(text.split("---", 2)[1], "README.md")
        except InputError:
            return None
        known = head.get("license") if isinstance(head, dict) else None
        if known == "other":
            known = head.get("license_name") or known
        return known if known and isinstance(known, str) else None

    def dtype(self) -> str:
        """The dtype of the weights that were trained, or of the base that an adapter belongs to."""
        found = stored_dtype(str(self.weights))
        return "float32" if found == "auto" else found


def open_run(path: Path, checkpoint: str | None = None) -> Source:
    """The run `path`, or the run that `path` is a checkpoint of (RUN/best). checkpoint: as of `find_checkpoint`.

    Raises InputError if there is no such run or checkpoint.
    """
    path, last = find_checkpoint(path, checkpoint)
    recipe = load_written(path / "recipe.yaml")
    weights = (last / "model").resolve()
    step = read(last / COMPLETE, "name another checkpoint")["step"]
    written, start = path / "summary.json", origin(recipe.model)
    nothing = (
        "bring it back from a copy, or remove it: the export then says that nothing was measured"
    )
    summary = read(written, nothing) if written.is_file() else {}
    return Source(
        root=path,
        recipe=recipe,
        run=read(path / "run.json", "bring it back from a copy"),
        summary=summary if summary.get("steps") == step else {},
        weights=weights,
        step=step,
        base=start.path,
        revision=start.revision,
        stopped=how_it_stopped(path),
        trained_on=find_source(str(weights)).base,
    )


def _file_of(model: str, name: str, revision: str | None) -> str | None:
    """The text of a small file of a model: of a folder, of `tiny`, or of what was downloaded of a hub id."""
    from huggingface_hub import try_to_load_from_cache

    if model == "scratch":
        return None
    folder = Path(resolve(model)) if model == "tiny" else Path(model)
    if folder.is_dir():
        path = folder / name
    else:
        try:
            found = try_to_load_from_cache(model, name, revision=revision)
        except ValueError:  # no name that the hub could have: there is no such file
            return None
        if not isinstance(found, str):
            return None
        path = Path(found)
    return path.read_text(encoding="utf-8") if path.is_file() else None
