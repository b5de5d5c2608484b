"""Rows of Arrow tables: which column holds the pictures, and what a batch of rows says. Needs pyarrow.

Pictures are {"bytes", "path"} (as the `datasets` library keeps them), plain bytes, or names of files.

Decisions:
- A picture inside a table is who its bytes are (xxh3_128): rows that repeat it are one picture with several captions,
  and rows that repeat its name only are not. It is also its group, so that the same picture in two splits is noticed.
- Bytes are hashed where they lie and never copied; a batch is as small as its pictures are large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow
import xxhash

from mmsearch.data.records import Record
from mmsearch.data.table import IMAGE_COLUMNS, check_columns, record
from mmsearch.data.texts import OnSkip
from mmsearch.errors import InputError
from mmsearch.types import Skipped, SkipReason

ROWS_OF_NAMES, ROWS_OF_PICTURES = 1024, 32
"""Rows that are read at once, where pictures are named and where they are inside."""

_BINARY_NAMES = (*IMAGE_COLUMNS, "photo", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")


@dataclass(frozen=True, slots=True)
class PictureColumn:
    """A column that holds pictures themselves; `parted`: as {"bytes", "path"}, else as bytes."""

    name: str
    parted: bool

    def bytes_of(self, batch: pyarrow.RecordBatch) -> pyarrow.Array:
        """(rows) the encoded pictures, null where there are none."""
        column = batch.column(batch.schema.get_field_index(self.name))
        # Flattened, so that the parts of a null are null; the bytes stay where they are.
        return column.flatten()[column.type.get_field_index("bytes")] if self.parted else column

    def names_of(self, batch: pyarrow.RecordBatch) -> list[str | None]:
        """(rows) what the pictures are called, None where the table does not say."""
        if not self.parted:
            return [None] * batch.num_rows
        column = batch.column(batch.schema.get_field_index(self.name))
        at = column.type.get_field_index("path")
        return [None] * batch.num_rows if at < 0 else [name or None for name in column.flatten()[at].to_pylist()]


def picture_column(schema: pyarrow.Schema) -> PictureColumn | None:
    """The column with pictures inside; None where pictures are named at most."""
    found = [
        PictureColumn(field.name, parted=pyarrow.types.is_struct(field.type))
        for field in schema
        if _is_parted(field.type) or (_is_bytes(field.type) and field.name.lower() in _BINARY_NAMES)
    ]
    usual = [name for name in _BINARY_NAMES if any(column.name.lower() == name for column in found)]
    return next((column for column in found if not usual or column.name.lower() == usual[0]), None)


def rows_at_once(schema: pyarrow.Schema) -> int:
    """How many rows to hold at a time."""
    return ROWS_OF_NAMES if picture_column(schema) is None else ROWS_OF_PICTURES


def check_schema(path: str, schema: pyarrow.Schema) -> None:
    """`InputError` where there is neither a column of pictures nor one of captions."""
    if picture_column(schema) is None:
        check_columns(path, schema.names)


def batch_records(
    path: str,
    batch: pyarrow.RecordBatch,
    *,
    first: int,
    place: Callable[[int, str], str],
    on_skip: OnSkip,
) -> Iterator[Record]:
    """The records of a batch that begins with row `first` of `path`, counted from 0.

    `place(i, name)`: the address of the picture in row i of the batch. Broken rows are reported.
    """
    pictures = picture_column(batch.schema)
    texts = batch if pictures is None else batch.drop_columns([pictures.name])
    _validate(path, texts)
    rows = texts.to_pylist() if texts.num_columns else [{}] * batch.num_rows
    content = [None] * batch.num_rows if pictures is None else pictures.bytes_of(batch)
    names = [None] * batch.num_rows if pictures is None else pictures.names_of(batch)
    for i, (row, value, name) in enumerate(zip(rows, content, names, strict=True)):
        try:
            inside = None if value is None or not value.is_valid else value.as_buffer()
            if inside is None:
                yield record(first + i + 1, _entries(row, pictures, name))
            else:
                shown = name or f"row {first + i}"
                yield _inside(record(first + i + 1, _entries(row, pictures, _identity(inside))), place(i, shown))
        except ValueError as error:
            on_skip(Skipped(f"{path}:{first + i + 1}", SkipReason.BAD_ROW, str(error)))


def _identity(content: pyarrow.Buffer) -> str:
    return f"xxh3:{xxhash.xxh3_128_hexdigest(memoryview(content))}"


def _inside(found: Record, place: str) -> Record:
    return replace(found, place=place, group=found.group or found.image)


def _entries(row: dict[str, Any], pictures: PictureColumn | None, image: str | None) -> list[tuple[str, object]]:
    """A row as `table.record` wants it, the picture's name before columns that may name it too."""
    if pictures is None:
        return list(row.items())
    others = [(name, value) for name, value in row.items() if name.lower() != IMAGE_COLUMNS[0]]
    return [(IMAGE_COLUMNS[0], image), *others]


def _is_bytes(kind: pyarrow.DataType) -> bool:
    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def _is_parted(kind: pyarrow.DataType) -> bool:
    at = kind.get_field_index("bytes") if pyarrow.types.is_struct(kind) else -1
    return at >= 0 and _is_bytes(kind.field(at).type)


def _validate(path: str, batch: pyarrow.RecordBatch) -> None:
    """Offsets of a damaged file may point anywhere: they are checked before they are followed."""
    try:
        batch.validate(full=True)
    except pyarrow.ArrowInvalid as error:
        raise InputError(path, expected="sound Arrow data", got=str(error).splitlines()[0]) from error
