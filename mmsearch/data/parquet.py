"""Parquet tables (pyarrow): their rows, and pictures inside them.

Decisions:
- Rows are read in small batches without reading ahead: a row group may hold gigabytes of pictures.
- A picture is taken out by its row. That reads its whole row group, so files whose row groups hold a hundred pictures
  (as the `datasets` library writes them) are quick to train on and files with one huge row group are not.
"""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Iterator
from functools import lru_cache

import pyarrow
from pyarrow import parquet

from mmsearch.data.columns import batch_records, check_schema, picture_column, rows_at_once
from mmsearch.data.packed import Packed
from mmsearch.data.records import Record
from mmsearch.data.texts import OnSkip
from mmsearch.errors import ImageError, InputError
from mmsearch.types import SkipReason


def read_parquet(path: str, *, on_skip: OnSkip) -> Iterator[Record]:
    """Rows of a Parquet file; pictures may be named in a column, or be inside it."""
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            check_schema(path, file.schema_arrow)
            first = 0
            for batch in file.iter_batches(batch_size=rows_at_once(file.schema_arrow), use_threads=False):
                start = first

                def place(i: int, name: str, start: int = start) -> str:
                    return Packed(path, name, row=start + i).address

                yield from batch_records(path, batch, first=start, place=place, on_skip=on_skip)
                first += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(path, expected="a Parquet file", got=str(error).splitlines()[0]) from error


def picture_bytes(path: str, row: int) -> bytes:
    """The encoded picture of one row, counted from 0; b"" where it has none.

    Raises `ImageError` where the file is no longer what it was, `OSError` where it cannot be read.
    """
    try:
        group, first = _group_of(path, os.stat(path).st_mtime_ns, row)
        found = group[row - first]
    except (pyarrow.ArrowException, IndexError) as error:
        detail = str(error).splitlines()[0] if str(error) else f"no row {row}"
        raise ImageError(f"{path}: row {row}", reason=SkipReason.DAMAGED, detail=detail) from None
    return bytes(found.as_buffer()) if found.is_valid else b""


def _group_of(path: str, mtime_ns: int, row: int) -> tuple[pyarrow.ChunkedArray, int]:
    starts = _starts(path, mtime_ns)
    number = bisect.bisect_right(starts, row) - 1
    if number >= len(starts) - 1:
        raise IndexError(f"no row {row}, {starts[-1]} rows")
    return _group(path, mtime_ns, number), starts[number]


@lru_cache(maxsize=256)
def _starts(path: str, mtime_ns: int) -> tuple[int, ...]:
    """The first row of each row group, and after them the number of rows. `mtime_ns` makes a new file a new key."""
    with parquet.ParquetFile(path) as file:
        counts = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    return (0, *itertools.accumulate(counts))


@lru_cache(maxsize=1)
def _group(path: str, mtime_ns: int, number: int) -> pyarrow.ChunkedArray:
    """(rows of the group) the encoded pictures."""
    with parquet.ParquetFile(path, pre_buffer=False) as file:
        pictures = picture_column(file.schema_arrow)
        if pictures is None:
            raise IndexError("no column with pictures")
        name = f"{pictures.name}.bytes" if pictures.parted else pictures.name
        table = file.read_row_group(number, columns=[name], use_threads=False)
        return pyarrow.chunked_array([pictures.bytes_of(batch) for batch in table.to_batches()])
