"""What in a model's folder would make transformers fetch and run code from the hub, or read weights from elsewhere,
without being asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zipr1.core.config import show
from zipr1.core.errors import InputError
from zipr1.models.beside import read_json

INDEX = "model.safetensors.index.json"


def refuse_code(folder: str, revision: str | None = None) -> None:
    """Raises InputError for an attention or experts implementation that is a kernel of the hub (`owner/name`), and for
    quantised weights, some kinds of which bring kernels of the hub along. None of them is handled here anyway."""
    for key, value in _entries(read_json(folder, "config.json", revision) or {}):
        name = key.rpartition(".")[2]
        if "implementation" in name and isinstance(value, str) and "/" in value:
            raise InputError(
                f"model.path: {folder}: config.json has {key}: {show(value)}, a kernel of the hub, which is code; take "
                "the entry out"
            )
        if name in ("quantization_config", "compression_config") and value:
            raise InputError(
                f"model.path: {folder}: its weights are quantised (config.json has {key}), which is not handled here; "
                "use the model in bfloat16 or float32"
            )


def refuse_elsewhere(folder: str) -> None:
    """Raises InputError for a folder whose index of weights names files that are not in it."""
    if not Path(folder).is_dir():
        return
    names = (read_json(folder, INDEX, None) or {}).get("weight_map")
    for name in names.values() if isinstance(names, dict) else ():
        if not isinstance(name, str) or name.startswith("/") or ".." in name.split("/"):
            raise InputError(
                f"model.path: {folder}: {INDEX} has {show(name)}, which is not a file in the folder; copy the model "
                "folder again"
            )


def _entries(values: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Every entry with its whole key."""
    for key, value in values.items():
        yield f"{before}{key}", value
        if isinstance(value, dict):
            yield from _entries(value, f"{before}{key}.")
