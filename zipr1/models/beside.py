"""JSON files beside the weights of a model, in a folder or on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from zipr1.core.errors import InputError
from zipr1.core.jsontext import loads


def read_json(folder: str | Path, name: str, revision: str | None) -> dict[str, Any] | None:
    """A JSON object beside the weights of a model folder or of a hub id, downloaded if it was not; None where there is
    none. Raises InputError for a file that holds something else."""
    path: Any = Path(folder) / name
    if not folder:
        return None
    if not Path(folder).is_dir():
        try:
            path = cached_file(
                str(folder),
                name,
                revision=revision,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                _raise_exceptions_for_gated_repo=False,
            )
        except OSError:
            path = None
    if path is None or not Path(path).is_file():
        return None
    try:
        return dict(loads(Path(path).read_bytes()))
    except (ValueError, TypeError):
        raise InputError(f"{path}: not a JSON object; copy the model folder again") from None
