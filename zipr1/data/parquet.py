"""Rows of a parquet file, a few at a time: what a dictionary holds once is not written out for each row.

Files whose pictures lie in a dictionary take, while they are read, the memory of the dictionary of one row group:
pyarrow decodes it as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from zipr1.core.errors import InputError
from zipr1.core.extras import install
from zipr1.core.text import reason, size

# Rows that are decoded together, at most.
ROWS = 256
# Bytes of one row with all of its texts written out, at most; of a batch, to be made Python objects at once.
MAX_ROW = 2**28
MAX_BATCH = 2**26


def rows(path: Path) -> Iterator[tuple[int, Callable[[], Any]]]:
    """(row number from 1, a function that gives the row), in order. Raises InputError for a file that cannot be read;
    the functions do for a row that cannot."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(
            f"{path}: parquet needs pyarrow ({error}); {install('data')}, or convert it to .jsonl"
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = _columns(file)
        with parquet.ParquetFile(path, read_dictionary=columns) as file:
            for batch in _batches(file):
                held = _Batch(batch)
                for place in range(batch.num_rows):
                    number += 1
                    yield number, lambda held=held, place=place: held.row(place)  # type: ignore[misc]
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"{path}: not a parquet file that can be read ({reason(error)}); copy it again"
        ) from error


def _batches(file: Any) -> Iterator[Any]:
    """All rows, some MAX_BATCH bytes of a row group together; one group after the other, or pyarrow would hold
    several."""
    for group in range(file.num_row_groups):
        about = file.metadata.row_group(group)
        # What a dictionary holds counts once; it is not written out.
        most = MAX_BATCH * about.num_rows // max(1, about.total_byte_size)
        yield from file.iter_batches(batch_size=max(1, min(ROWS, most)), row_groups=[group])


def _columns(file: Any) -> list[str]:
    """The paths of the columns of texts and bytes, nested ones too."""
    columns = [file.schema.column(i) for i in range(len(file.schema))]
    return [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]


class _Batch:
    """Some rows as Arrow holds them; they become Python objects when the first is asked for."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch
        self.made: list[Any] | None = None

    def row(self, place: int) -> Any:
        """Raises InputError."""
        if self.made is None and _written_out(self.batch) <= MAX_BATCH:
            try:
                self.made = self.batch.to_pylist()
            except (ValueError, OverflowError):
                self.made = None  # one of the rows, which says so when it is asked for
        if self.made is not None:
            return self.made[place]
        one = self.batch.slice(place, 1)
        if (bytes_ := _written_out(one)) > MAX_ROW:
            raise InputError(
                f"{size(bytes_)} in one row; at most {size(MAX_ROW)}: make it shorter, or give paths of files"
            )
        try:
            return one.to_pylist()[0]
        except (ValueError, OverflowError) as error:
            raise InputError(f"a cell cannot be read ({reason(error)}); write it again") from error


def _written_out(data: Any) -> int:
    """Bytes of a batch or an array as it would be without dictionaries."""
    import pyarrow
    from pyarrow import compute

    if isinstance(data, pyarrow.RecordBatch):
        return sum(_written_out(column) for column in data.columns)
    if isinstance(data, pyarrow.DictionaryArray):
        lengths = compute.binary_length(data.dictionary).take(data.indices)
        return int(compute.sum(lengths.cast("int64")).as_py() or 0)
    if pyarrow.types.is_struct(data.type):
        return sum(_written_out(field) for field in data.flatten())
    if pyarrow.types.is_list(data.type) or pyarrow.types.is_large_list(data.type):
        return _written_out(data.flatten())
    return int(data.nbytes)
