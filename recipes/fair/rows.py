"""CSV files that are only ever added to, and right and wrong answers packed into one cell of them."""

from __future__ import annotations

import base64
import csv
import io
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from zipr1.core.errors import InputError

Row = Mapping[str, str]


def read(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of `path`, none where there is no file. Raises InputError for other columns, or a row with fewer."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        head = next(reader, list(columns))
        if head != list(columns):
            raise InputError(
                f"{path}: has the columns {','.join(head)} and {','.join(columns)} are written; bring it back from "
                "version control, or rename it to begin a new one"
            )
        rows = []
        for values in reader:
            if len(values) != len(columns):
                raise InputError(
                    f"{path}:{reader.line_num}: {len(values)} cells in a row of {len(columns)}; bring the file back "
                    "from version control"
                )
            rows.append(dict(zip(columns, values, strict=True)))
    return rows


def append(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Adds rows, all of them in one write, with a first line of names where the file is new."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if not path.is_file() or not path.stat().st_size:
        writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(text.getvalue())
        file.flush()
        os.fsync(file.fileno())


def pack(right: np.ndarray) -> str:
    """Outcomes of n questions, 0 or 1 each, as text of n / 6 characters or fewer. Raises InputError for others."""
    if not np.isin(right, (0, 1)).all():
        raise InputError("an answer is neither right nor wrong; use a check that says 0 or 1")
    bits = np.packbits(right.astype(np.uint8)).tobytes()
    return base64.b64encode(zlib.compress(bits, 9)).decode()


def unpack(text: str, number: int) -> np.ndarray:
    """The float array `(number,)` that was packed. Raises InputError for text that is no such thing."""
    try:
        # Data of a file: no more is unpacked than so many answers take.
        unpacker = zlib.decompressobj()
        bits = unpacker.decompress(base64.b64decode(text, validate=True), number + 8)
        right = np.unpackbits(np.frombuffer(bits if unpacker.eof else b"", np.uint8))
    except (ValueError, zlib.error):
        right = np.zeros(0)
    if not number <= len(right) < number + 8:
        raise InputError(f"packed answers are not of {number:,} questions; the file was changed")
    return right[:number].astype(float)
