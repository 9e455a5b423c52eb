"""zipr1.json: how an exported folder is meant to be run sparse, what was measured, and which weights it speaks of."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from zipr1.core.errors import InputError
from zipr1.core.jsontext import loads
from zipr1.core.recipe import Probes, Sparse
from zipr1.core.records import Count, Record, wrong
from zipr1.core.text import reason

# The section `sparse` of recipes/tiny.yaml: the embedded model's prompts are short, so none is too short to be pruned.
TINY = Sparse(skip="layer", keep_last=1, probes=Probes(recent=12, random=0), dense_below=0)

NAME = "zipr1.json"
VERSION = 1


class Weights(Record):
    bytes: Count
    header: str
    sha256: str | None = None


class Base(Record):
    path: str
    revision: str | None = None


class Manifest(Record):
    """What of zipr1.json is read."""

    zipr1: int
    sparse: Sparse
    weights: dict[Annotated[str, Field(pattern=r"^[^/\\]+\.safetensors$")], Weights]
    base: Base | None = None


def read(folder: Path) -> dict[str, Any] | None:
    """What zipr1.json in `folder` holds; None if there is none.

    Raises InputError if it is not one of ours, of a later version, or if it speaks of other weights than lie beside
    it: a file is missing, cut short, or its safetensors header was changed.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        values = loads(path.read_bytes())
        trouble = wrong(values, Manifest)
    except (OSError, ValueError) as error:
        trouble = reason(error, 120)
    if trouble:
        raise InputError(
            f"{path}: not written by zipr1 export ({trouble}); export the run again, or remove the file to use the "
            "folder as a dense model"
        )
    version, weights = values["zipr1"], values["weights"]
    if version != VERSION:
        raise InputError(
            f"{path}: version {version} and this zipr1 reads {VERSION}; install the zipr1 that wrote it"
        )
    for name, about in weights.items():
        _check(folder / name, about["bytes"], about["header"])
    strangers = {p.name for p in folder.glob("*.safetensors")} - set(weights)
    if strangers:
        raise InputError(
            f"{folder}: {NAME} knows nothing of {min(strangers)}; it belongs to another export: copy the whole folder"
        )
    return dict(values)


def check_bytes(folder: Path) -> None:
    """Raises InputError if a weight file is not the one whose hash zipr1.json in `folder` has. Reads every byte."""
    for name, about in ((read(folder) or {}).get("weights") or {}).items():
        if sha256(folder / name) != about.get("sha256"):
            raise InputError(
                f"{folder / name}: not as it was exported, its hash is another; copy or export the folder again"
            )


def weights(folder: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes, hash of the whole and hash of the header of every safetensors file, by name."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found[path.name] = {
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
            "header": _header(path),
        }
    return found


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _header(path: Path) -> str:
    """SHA-256 of a safetensors file's header: eight bytes of its length, then names, dtypes, shapes and places."""
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        # A changed length must not make us read gigabytes.
        rest = file.read(length) if length <= path.stat().st_size else b""
    return hashlib.sha256(start + rest).hexdigest()


def _check(path: Path, size: int, header: str) -> None:
    if not path.is_file():
        raise InputError(f"{path}: missing; {NAME} names it: copy or export the folder again")
    found = path.stat().st_size
    if found != size:
        raise InputError(
            f"{path}: has {found} bytes and {NAME} says {size}; copy or export the folder again"
        )
    if _header(path) != header:
        raise InputError(
            f"{path}: its header is not the one that {NAME} describes: it was changed or belongs to another model; "
            "copy or export the folder again"
        )
