"""Parquet and Arrow IPC files as tables of facts and vectors. Needs pyarrow.

Decisions:
- Only columns that mean something here are read: pictures inside a table stay where they are.
- Parquet is read page by page without reading ahead (a row group may be larger than memory); Arrow files are mapped.
  A block is cut out of whatever batches a file has.
- Arrow data that comes from outside is validated before its offsets are followed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from mmsearch.data.table import FILE_COLUMNS
from mmsearch.errors import InputError
from mmsearch.exchange.arrow_vectors import (
    dim_of,
    is_text_vectors,
    is_vectors,
    matrix_of,
    texts_of,
    vector_column,
)
from mmsearch.exchange.base import HAS_IMAGE, TEXT_PART, TEXT_PARTS, TEXT_VECTORS, Block, Facts
from mmsearch.exchange.roles import Roles

_BUFFER = 1 << 20


def open_table(path: str, *, id_column: str | None) -> ArrowTable:
    """The table in a Parquet or Arrow file. Raises `InputError`."""
    return ArrowTable(path, id_column=id_column)


class ArrowTable:
    """Rows of a file; see `base.Table`. `vectors`: the column that holds them, None without one."""

    def __init__(self, path: str, *, id_column: str | None = None, vector_column_: str | None = None) -> None:
        self.path = path
        with _guarded(path):
            with open(path, "rb") as file:
                self._is_parquet = file.read(4) == b"PAR1"
            schema, self.count = self._look()
        self.vectors = vector_column(schema, named=vector_column_, where=path)
        self.has_text_vectors = TEXT_VECTORS in schema.names and is_text_vectors(schema.field(TEXT_VECTORS).type)
        facts = [field.name for field in schema if _says_something(field)]
        self._roles, self._facts = Roles(facts, id_column=id_column, where=path), facts
        inside = [self.vectors] if self.vectors else []
        inside += [TEXT_VECTORS, TEXT_PARTS] if self.has_text_vectors else []
        inside += [HAS_IMAGE, TEXT_PART]
        self._columns = [name for name in schema.names if name in {*facts, *inside}]
        if len(set(schema.names)) < len(schema.names):
            raise InputError(path, expected="columns of different names", got=", ".join(schema.names)[:200])

    def facts(self, start: int, size: int) -> Iterator[list[Facts]]:
        """See `base.Table.facts`."""
        return (self.facts_of(batch) for batch in self.batches(start, size))

    def facts_of(self, batch: pyarrow.RecordBatch) -> list[Facts]:
        """The facts of a batch's rows."""
        columns = [batch.column(name).to_pylist() for name in self._facts]
        if not columns:
            return [Facts() for _ in range(batch.num_rows)]
        return [self._roles.facts(values) for values in zip(*columns, strict=True)]

    def batches(self, start: int, size: int) -> Iterator[pyarrow.RecordBatch]:
        """From row `start` on, `size` rows at a time; only the columns that are used."""
        with _guarded(self.path):
            yield from _cut(self._read(start, size), size)

    def first_dim(self) -> int:
        """d of the vectors. Raises `InputError` when there is none to be found."""
        for batch in self.batches(0, 1024):
            columns = [] if self.vectors is None else [batch.column(self.vectors)]
            columns += [batch.column(TEXT_VECTORS).flatten()] if self.has_text_vectors else []
            found = next(filter(None, map(dim_of, columns)), None)
            if found:
                return found
        raise InputError(self.path, expected=f"vectors in column {self.vectors!r}", got="none")

    def _look(self) -> tuple[pyarrow.Schema, int]:
        if self._is_parquet:
            with parquet.ParquetFile(self.path) as file:
                return file.schema_arrow, int(file.metadata.num_rows)
        with pyarrow.memory_map(self.path) as mapped:
            schema, batches = _arrow_batches(mapped, None)
            return schema, sum(batch.num_rows for batch in batches)

    def _read(self, start: int, size: int) -> Iterator[pyarrow.RecordBatch]:
        """Batches as the file has them, from row `start` on."""
        source = self._parquet_batches(start, size) if self._is_parquet else self._mapped_batches(start)
        for left, batch in source:
            if left < batch.num_rows:
                yield batch.slice(left)

    def _parquet_batches(self, start: int, size: int) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
        with parquet.ParquetFile(self.path, pre_buffer=False, buffer_size=_BUFFER) as file:
            counts = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
            ends = list(itertools.accumulate(counts))
            first = next((i for i, end in enumerate(ends) if end > start), len(counts))
            left = start - (ends[first - 1] if first else 0)
            groups = list(range(first, len(counts)))
            for batch in file.iter_batches(size, row_groups=groups, columns=self._columns, use_threads=False):
                yield max(left, 0), batch
                left -= batch.num_rows

    def _mapped_batches(self, start: int) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
        with pyarrow.memory_map(self.path) as mapped:
            _, batches = _arrow_batches(mapped, self._columns)
            for batch in batches:
                if start < batch.num_rows:
                    batch.validate(full=True)
                    yield max(start, 0), batch
                start -= batch.num_rows


class ArrowPart:
    """A table whose rows hold their vectors; see `base.Part`. `modality` "text": they are of the captions."""

    def __init__(self, path: str, *, label: str, table: ArrowTable, modality: str | None) -> None:
        if table.vectors is None and not table.has_text_vectors:
            raise InputError(
                path, expected="a column of vectors (lists of floats)", got="none",
                do="Say which one it is with --vector-column, or give --ids with this table beside a .npy file.",
            )  # fmt: skip
        self.label, self._table, self._modality = label, table, modality
        self.notes: tuple[str, ...] = ()
        self.dim, self.count = table.first_dim() if table.count else 0, table.count

    def blocks(self, start: int, size: int) -> Iterator[Block]:
        """See `base.Part.blocks`."""
        for batch in self._table.batches(start, size):
            block = Block(self._table.facts_of(batch))
            if self._table.has_text_vectors:
                block.texts, block.text_of, block.text_part = texts_of(batch, self.dim)
            if self._table.vectors is not None:
                rows, there = matrix_of(batch.column(self._table.vectors), self.dim)
                if self._modality == "text" and not self._table.has_text_vectors:
                    place = np.flatnonzero(there)
                    block.texts, block.text_of, block.text_part = rows[place], place, np.zeros_like(place)
                else:
                    block.images, block.has_image = rows, there
            yield block


def _says_something(field: pyarrow.Field) -> bool:
    """Whether a column is a fact: no vectors, no pictures, no columns that only our own exports read."""
    kind, types = field.type, pyarrow.types
    if field.name in (TEXT_VECTORS, TEXT_PARTS, HAS_IMAGE, TEXT_PART):
        return False
    binary = types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)
    if is_vectors(kind) or (binary and field.name.lower() not in ("id", "key", *FILE_COLUMNS)):
        return False
    return not (types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def _arrow_batches(
    mapped: pyarrow.MemoryMappedFile, columns: list[str] | None
) -> tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch]]:
    """Schema and batches of a mapped Arrow file or stream; `columns`: only these, None for all."""
    is_file = mapped.read(6) == b"ARROW1"
    mapped.seek(0)

    def opened(fields: list[int] | None) -> Any:  # noqa: ANN401 - a reader of either kind
        options = pyarrow.ipc.IpcReadOptions(included_fields=fields)
        return (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(mapped, options=options)

    schema = opened(None).schema
    mapped.seek(0)
    reader = opened(None if columns is None else [schema.get_field_index(name) for name in columns])
    batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else iter(reader)
    return schema, batches


def _cut(batches: Iterator[pyarrow.RecordBatch], size: int) -> Iterator[pyarrow.RecordBatch]:
    """The same rows, `size` at a time."""
    waiting: list[pyarrow.RecordBatch] = []
    rows = 0
    for whole in batches:
        batch = whole
        while rows + batch.num_rows >= size:
            yield _joined([*waiting, batch.slice(0, size - rows)])
            batch, waiting, rows = batch.slice(size - rows), [], 0
        if batch.num_rows:
            waiting.append(batch)
            rows += batch.num_rows
    if waiting:
        yield _joined(waiting)


def _joined(batches: list[pyarrow.RecordBatch]) -> pyarrow.RecordBatch:
    if len(batches) == 1:
        return batches[0]
    return pyarrow.Table.from_batches(batches).combine_chunks().to_batches()[0]


@contextmanager
def _guarded(path: str) -> Iterator[None]:
    """What pyarrow raises for a file becomes an `InputError`."""
    try:
        yield
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(path, expected="a Parquet or Arrow file", got=first[:200]) from error
