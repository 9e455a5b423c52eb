"""Where rows come from: files by their ending, folders, and the `datasets` library for everything else.

A reader yields (row number from 1, a function that gives the row): a row that cannot be parsed is a bad row, not a
bad file. .jsonl and .json need no library, .parquet needs pyarrow, the hub and saved datasets need `datasets`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from zipr1.core import extras, hub
from zipr1.core.errors import InputError, Missing
from zipr1.core.jsontext import lines, loads
from zipr1.core.recipe import Data
from zipr1.core.text import reason
from zipr1.data import parquet
from zipr1.data.embedded import SOURCES

NumberedRows = Iterator[tuple[int, Callable[[], Any]]]

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{},]', re.DOTALL)
_SLICE = re.compile(r"(.+):\[(-?\d*):(-?\d*)\]")


@dataclass(frozen=True)
class StoredPicture:
    """An encoded picture in a dataset on disk (memory-mapped), read when it is needed.

    position: in the list that the cell of `column` holds; None where the cell is the picture itself.
    """

    table: Any
    fingerprint: str
    row: int
    column: str
    position: int | None

    @property
    def key(self) -> str:
        return f"{self.fingerprint}:{self.row}:{self.column}:{self.position}"

    def read(self) -> bytes:
        value = self.table[self.row][self.column]
        return bytes((value if self.position is None else value[self.position])["bytes"])


def read(source: str, data: Data) -> tuple[str, Path, NumberedRows]:
    """A name for messages, where relative media paths start, and the rows. Raises Missing if nothing is there.

    `SOURCE:[a:b]` takes a part of the rows, as Python slices a list: `[:-500]` to train on, `[-500:]` to hold out.
    """
    if match := _SLICE.fullmatch(source):
        bounds = [int(bound) if bound else None for bound in match.groups()[1:]]
        total = sum(1 for _ in read(match[1], data)[2])  # none of them is parsed
        start, stop, _ = slice(*bounds).indices(total)
        name, folder, rows = read(match[1], data)
        return name, folder, islice(rows, start, max(start, stop))
    path, split = _path_and_split(
        str(Path(source).expanduser()) if source.startswith("~") else source
    )
    if path.suffix.lower() in READERS and not path.is_dir():
        if not path.is_file():
            raise Missing(f"{path}: no such data file; check data.source and data.heldout")
        return path.name, path.parent, _limited(READERS[path.suffix.lower()](path), data)
    if path.is_dir() and (files := _split_files(path, split)):
        return f"{path.name} ({split})", path, _limited(_chained(files), data)
    if path.is_dir() or _is_hub_id(str(path)):
        return f"{path} ({split})", path, _datasets(path, split, data)
    if source.startswith((".", "/", "~")):
        raise Missing(f"{source}: no such file or folder; check data.source and data.heldout")
    endings = ", ".join(f"a {ending} file" for ending in READERS)
    raise InputError(
        f"data source {source!r}: unknown; allowed: {', '.join(SOURCES)}, {endings}, a folder, "
        "owner/name of a dataset of the hub; change data.source"
    )


def _path_and_split(source: str) -> tuple[Path, str]:
    """`owner/name:split` -> the two; without one the split is `train`. A path that exists has no split."""
    if ":" in source and not Path(source).exists():
        name, _, split = source.rpartition(":")
        return Path(name), split or "train"
    return Path(source), "train"


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _split_files(folder: Path, split: str) -> list[Path]:
    """`train.jsonl`, `train-00000-of-00003.parquet`, also under data/, of one split and one ending, in order."""
    for ending in READERS:
        for where in (folder, folder / "data"):
            files = [*where.glob(f"{split}{ending}"), *sorted(where.glob(f"{split}[-_]*{ending}"))]
            if files:
                return files
    return []


def _chained(files: list[Path]) -> NumberedRows:
    number = 0
    for file in files:
        for _, row in READERS[file.suffix.lower()](file):
            number += 1
            yield number, row


def _limited(rows: NumberedRows, data: Data) -> NumberedRows:
    return islice(rows, data.prompts) if data.streaming else rows


def _datasets(path: Path, split: str, data: Data) -> NumberedRows:
    """Rows through the `datasets` library, pictures undecoded. Raises Missing where it cannot reach them."""
    try:
        import datasets
    except ImportError as error:
        raise Missing(
            f"{path}: a dataset needs the datasets library ({error}); {extras.install('data')}"
        ) from error
    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            table = datasets.load_from_disk(str(path))
            table = table[split] if isinstance(table, dict) else table
        else:
            with contextlib.nullcontext() if path.is_dir() else hub.offline_if_unreachable():
                table = datasets.load_dataset(
                    str(path), data.subset, split=split, streaming=data.streaming
                )
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
    ) as error:
        kind, hint = InputError, "check the folder, data.subset and the split after the colon"
        came = f"does not load ({reason(error)})"
        if not path.is_dir():
            kind, hint = Missing, hub.how_to_get(str(path), "dataset")
            why = hub.unreachable()
            came = came if why is None else f"is not on this machine, and {why}"
        raise kind(f"{path} ({split}): {came}; {hint}") from error
    for column, feature in (table.features or {}).items():
        raw = _undecoded(datasets, feature)
        if raw is not None:
            table = table.cast_column(column, raw)
    if data.streaming:
        for number, row in enumerate(islice(table, data.prompts), 1):
            yield number, lambda row=row: row  # type: ignore[misc]
        return
    fingerprint = str(getattr(table, "_fingerprint", path))
    for index in range(len(table)):
        yield index + 1, lambda index=index: _with_stored_pictures(table, fingerprint, index)  # type: ignore[misc]


def _undecoded(datasets: Any, feature: Any) -> Any:
    """The same feature with pictures and clips left as bytes or paths; None where it has none."""
    for name in ("Image", "Video"):
        kind = getattr(datasets, name, None)
        if kind is None:
            continue
        if isinstance(feature, kind):
            return kind(decode=False)
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        if isinstance(inner, kind):
            raw = kind(decode=False)
            return [raw] if isinstance(feature, list) else datasets.List(raw)
    return None


def _with_stored_pictures(table: Any, fingerprint: str, index: int) -> dict[str, Any]:
    """A row whose encoded pictures stay in the table: each becomes a StoredPicture."""

    def stored(value: Any, column: str, position: int | None) -> Any:
        if isinstance(value, dict) and value.get("bytes"):
            return StoredPicture(table, fingerprint, index, column, position)
        return value

    row = dict(table[index])
    for column, value in row.items():
        if isinstance(value, list):
            row[column] = [stored(one, column, position) for position, one in enumerate(value)]
        else:
            row[column] = stored(value, column, None)
    return row


def _jsonl(path: Path) -> NumberedRows:
    for number, line in enumerate(lines(path), 1):
        if line.strip():
            yield number, lambda line=line: _parse(line)  # type: ignore[misc]


def _json(path: Path) -> NumberedRows:
    # Bytes that are not UTF-8 are faults of the rows that hold them.
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    try:
        rows = loads(text) if text else []
    except ValueError as error:
        pieces = _elements(text)
        if pieces is None:
            raise InputError(
                f"{path}: not JSON ({error}); check quotes, commas and UTF-8"
            ) from error
        for number, piece in enumerate(pieces, 1):
            yield number, lambda piece=piece: _parse(piece)  # type: ignore[misc]
        return
    if not isinstance(rows, list):
        raise InputError(
            f"{path}: {type(rows).__name__}; allowed: a list of rows; or name it .jsonl"
        )
    for number, row in enumerate(rows, 1):
        yield number, lambda row=row: row  # type: ignore[misc]


def _elements(text: str) -> list[str] | None:
    """The texts of the elements of a JSON list, whatever is wrong within them; None if it is not one whole list."""
    start, depth, pieces = 0, 0, []
    for token in _TOKEN.finditer(text):
        mark = token[0]
        if depth == 0 and (mark != "[" or text[: token.start()].strip()):
            return None
        if mark in "[{":
            depth += 1
            start = token.end() if depth == 1 else start
        elif mark in "]}":
            depth -= 1
        if (mark == "," and depth == 1) or (depth == 0 and text[start : token.start()].strip()):
            pieces.append(text[start : token.start()])
            start = token.end()
        if depth == 0:
            return None if text[token.end() :].strip() else pieces
    return None


def _parse(text: str | bytes) -> Any:
    try:
        return loads(text)
    except ValueError as error:
        raise InputError(f"not JSON ({reason(error)}); check quotes, commas and UTF-8") from error


READERS: dict[str, Callable[[Path], NumberedRows]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": parquet.rows,
}
