"""Where rows come from: files by their ending, folders, and the `datasets` library for everything else.

A reader yields (row number from 1, a function that gives the row): a row that cannot be parsed is a bad row, not a
bad file. .jsonl and .json need no library, .parquet needs pyarrow, the hub and saved datasets need `datasets`.
"""

from __future__ import annotations

import contextlib
import mmap
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from os.path import expanduser  # pathlib's raises RuntimeError for a user that there is none of
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

_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{},]', re.DOTALL)
_BLANK = b" \t\r\n\xef\xbb\xbf"  # before the list; a file may begin with a byte order mark
FORGET = 2**24  # bytes of a .json file
_SLICE = re.compile(r"(.+):\[(-?\d*):(-?\d*)\]")


@dataclass(frozen=True)
class StoredPicture:
    """An encoded picture in a dataset on disk (memory-mapped), read when it is needed.

    place: the way to it from its row: a column, then positions in lists and names of fields.
    """

    table: Any
    fingerprint: str
    row: int
    place: tuple[str | int, ...]

    @property
    def key(self) -> str:
        return ":".join(map(str, (self.fingerprint, self.row, *self.place)))

    def read(self) -> bytes:
        value = self.table[self.row]
        for step in self.place:
            value = value[step]
        return bytes(value["bytes"])


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
    path, split = place(source)
    if path.suffix.lower() in READERS and not path.is_dir():
        return path.name, path.parent, _limited(READERS[path.suffix.lower()](path), data)
    if path.is_dir() and (files := _split_files(path, split)):
        return f"{path.name} ({split})", path, _limited(_chained(files), data)
    return f"{path} ({split})", path, _datasets(path, split, data)


def place(source: str) -> tuple[Path, str]:
    """The file, folder or hub id of a source, and its split; nothing is opened. Raises Missing for a file or folder
    that is not there, and InputError for what is none of the three."""
    if match := _SLICE.fullmatch(source):
        return place(match[1])
    path, split = _path_and_split(expanduser(source))
    if path.suffix.lower() in READERS and not path.is_dir():
        if not path.is_file():
            raise Missing(f"{path}: no such data file; check data.source and data.heldout")
        return path, split
    if path.is_file():
        raise InputError(
            f"{path}: a data file that ends in {path.suffix or 'nothing'}; allowed: {', '.join(READERS)}; convert it"
        )
    if path.is_dir() or _is_hub_id(str(path)):
        return path, split
    if source.startswith((".", "/", "~")):
        raise Missing(f"{source}: no such file or folder; check data.source and data.heldout")
    endings = ", ".join(f"a {ending} file" for ending in READERS)
    raise InputError(
        f"data source {source!r}: unknown; allowed: {', '.join(SOURCES)}, {endings}, a folder, "
        "owner/name of a dataset of the hub; change data.source"
    )


def file_of(source: str) -> Path | None:
    """The file or folder that a source names, whether it is there or not; None for a dataset of the hub."""
    if match := _SLICE.fullmatch(source):
        source = match[1]
    path, _ = _path_and_split(expanduser(source))
    return None if _is_hub_id(str(path)) and not path.exists() else path


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
        LookupError,
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
    """The same feature with pictures and clips left as bytes or paths, however deep they lie; None: it has none."""
    kinds = [getattr(datasets, name, ()) for name in ("Image", "Video")]
    if any(isinstance(feature, kind) for kind in kinds):
        return type(feature)(decode=False)
    if isinstance(feature, dict):
        raw = {name: _undecoded(datasets, inner) for name, inner in feature.items()}
        if any(raw.values()):
            return {name: raw[name] or inner for name, inner in feature.items()}
    elif isinstance(feature, list):
        inner = _undecoded(datasets, feature[0])
        return inner and [inner]
    elif hasattr(feature, "feature"):  # List and LargeList
        inner = _undecoded(datasets, feature.feature)
        return inner and replace(feature, feature=inner)
    return None


def _with_stored_pictures(table: Any, fingerprint: str, index: int) -> dict[str, Any]:
    """A row whose encoded pictures stay in the table: each becomes a StoredPicture."""

    def stored(value: Any, place: tuple[str | int, ...]) -> Any:
        if isinstance(value, dict):
            if value.get("bytes"):
                return StoredPicture(table, fingerprint, index, place)
            return {name: stored(inner, (*place, name)) for name, inner in value.items()}
        if isinstance(value, list):
            return [stored(inner, (*place, position)) for position, inner in enumerate(value)]
        return value

    return {column: stored(value, (column,)) for column, value in table[index].items()}


def _jsonl(path: Path) -> NumberedRows:
    for number, line in enumerate(lines(path), 1):
        if line.strip():
            yield number, lambda line=line: _parse(line)  # type: ignore[misc]


def _json(path: Path) -> NumberedRows:
    """A list of rows, of which one is held at a time."""
    if not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        try:
            for number, piece in enumerate(_elements(text), 1):
                yield number, lambda piece=piece: _parse(piece)  # type: ignore[misc]
        except ValueError as error:  # no list: an object, lines of JSON, or nothing whole
            why, kind = reason(error), "list"
            try:
                kind = type(loads(text[:])).__name__
            except ValueError as fault:
                why = reason(fault)
            problem = f"not JSON ({why}); check quotes, commas and UTF-8"
            if kind != "list":
                problem = f"{kind}; allowed: a list of rows; or name it .jsonl"
            raise InputError(f"{path}: {problem}") from None


def _elements(text: mmap.mmap | bytes) -> Iterator[bytes]:
    """The texts of the elements of a JSON list, whatever is wrong within them, one after the other. Raises ValueError
    in the end if it is not one whole list."""
    start, depth, read = 0, 0, 0
    for token in _TOKEN.finditer(text):
        place = token.start()
        mark = text[place : place + 1]
        if depth == 0 and (mark != b"[" or text[:place].strip(_BLANK)):
            raise ValueError("no list")
        if mark in b"[{":
            depth += 1
            start = token.end() if depth == 1 else start
        elif mark in b"]}":
            depth -= 1
        if (mark == b"," and depth == 1) or (depth == 0 and text[start:place].strip()):
            yield text[start:place]
            start = token.end()
        if depth == 0:
            if text[token.end() :].strip():
                raise ValueError("there is more behind the list")
            return
        if isinstance(text, mmap.mmap) and start - read > FORGET:
            read = start // mmap.PAGESIZE * mmap.PAGESIZE
            text.madvise(mmap.MADV_DONTNEED, 0, read)  # what was read is no longer held in memory
    raise ValueError("the list does not end")


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
