"""Arrow files (pyarrow), as the `datasets` library saves them: their rows, and pictures inside them.

Decisions:
- The file is mapped, and a picture's address is where its bytes lie in it: taking one out later is a single read that
  needs no pyarrow. A file cut short while it is listed ends the process, which no file of a finished data set is.
- Both the stream and the file layout of Arrow are read; compressed ones are refused, since nothing lies in them as is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow
from numpy.typing import NDArray

from mmsearch.data.columns import ROWS_OF_NAMES, PictureColumn, batch_records, check_schema, picture_column
from mmsearch.data.packed import Packed
from mmsearch.data.records import Record
from mmsearch.data.texts import OnSkip
from mmsearch.errors import InputError


def read_arrow(path: str, *, on_skip: OnSkip) -> Iterator[Record]:
    """Rows of an Arrow file; pictures may be named in a column, or be inside it."""
    try:
        with pyarrow.memory_map(path) as file:
            whole = file.read_buffer()
            if whole.size == 0:
                raise InputError(path, expected="an Arrow file", got="an empty one")
            first, checked = 0, False
            for batch in _batches(whole):
                if not checked:
                    check_schema(path, batch.schema)
                    checked = True
                for start in range(0, batch.num_rows, ROWS_OF_NAMES):
                    part = batch.slice(start, ROWS_OF_NAMES)
                    place = _places(path, part, whole)
                    yield from batch_records(path, part, first=first + start, place=place, on_skip=on_skip)
                first += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(path, expected="an Arrow file", got=str(error).splitlines()[0]) from error


def _batches(whole: pyarrow.Buffer) -> Iterator[pyarrow.RecordBatch]:
    source = pyarrow.BufferReader(whole)
    if whole[:6].to_pybytes() == b"ARROW1":
        file = pyarrow.ipc.open_file(source)
        yield from (file.get_batch(i) for i in range(file.num_record_batches))
    else:
        yield from pyarrow.ipc.open_stream(source)


def _places(path: str, batch: pyarrow.RecordBatch, whole: pyarrow.Buffer) -> Callable[[int, str], str]:
    """Where in the file the pictures of a batch lie."""
    pictures = picture_column(batch.schema)
    nothing = np.empty(0, np.int64)
    starts, sizes = (nothing, nothing) if pictures is None else _spans(batch, pictures, path=path, whole=whole)
    return lambda i, name: Packed(path, name, offset=int(starts[i]), size=int(sizes[i])).address


def _spans(
    batch: pyarrow.RecordBatch, pictures: PictureColumn, *, path: str, whole: pyarrow.Buffer
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(rows) first byte in the file and number of bytes of each picture."""
    content = pictures.bytes_of(batch)
    _, offsets, data = content.buffers()
    wide = np.dtype(np.int64 if pyarrow.types.is_large_binary(content.type) else np.int32)
    count = len(content)
    if data is None or offsets is None:
        return np.zeros(count, np.int64), np.zeros(count, np.int64)
    if offsets.size < (content.offset + count + 1) * wide.itemsize:
        raise InputError(path, expected="sound Arrow data", got=f"too few offsets for {count} pictures")
    bounds = np.frombuffer(offsets, wide, count + 1, content.offset * wide.itemsize).astype(np.int64)
    sizes = np.diff(bounds)
    if not sizes.any():  # an empty buffer lies anywhere
        return np.zeros(count, np.int64), sizes
    base = data.address - whole.address
    if base < 0 or base + data.size > whole.size:
        raise InputError(
            path, expected="an uncompressed Arrow file", got="a compressed one", do="Save it again, uncompressed."
        )
    if (sizes < 0).any() or bounds[0] < 0 or bounds[-1] > data.size:
        raise InputError(path, expected="sound Arrow data", got="pictures outside the file")
    return base + bounds[:-1], sizes
