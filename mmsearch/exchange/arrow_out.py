"""Items as Arrow tables: the columns of Parquet and Arrow exports and of clip-retrieval's metadata. Needs pyarrow.

Decisions:
- One row an item. `caption` is its first text, as other programs expect it; `captions` holds all of them.
- Metadata is one column of JSON: items need not have the same, and the schema is known before the first row.
- Vectors of captions are lists of vectors, beside which captions they are of.
- Parquet gets single precision, since few of its readers know half floats; Arrow files keep the halves.
"""

from __future__ import annotations

import os
from typing import Protocol

import numpy as np
import pyarrow
from numpy.typing import NDArray
from pyarrow import parquet

from mmsearch.exchange.base import HAS_IMAGE, TEXT_PART, TEXT_PARTS, TEXT_VECTORS
from mmsearch.exchange.incoming import PATH_KEY
from mmsearch.exchange.npy_out import NpyFile
from mmsearch.exchange.pages import Page
from mmsearch.store.records import ItemRecord
from mmsearch.store.sqlite import encode_json

_FACTS = [
    pyarrow.field("id", pyarrow.string()),
    pyarrow.field("image_path", pyarrow.string()),
    pyarrow.field("caption", pyarrow.string()),
    pyarrow.field("captions", pyarrow.list_(pyarrow.string())),
    pyarrow.field("width", pyarrow.int32()),
    pyarrow.field("height", pyarrow.int32()),
    pyarrow.field("taken_at", pyarrow.string()),
    pyarrow.field("metadata", pyarrow.string()),
]


class Shard(Protocol):
    """One file, or files of one number, of an export."""

    def add(self, page: Page) -> None:
        """Append items."""
        ...

    def close(self) -> None:
        """Finish the files."""
        ...


class TableShard:
    """`part_NNNN.parquet` or `.arrow`: items with their vectors in columns."""

    def __init__(self, folder: str, number: int, *, dim: int, ending: str, images: bool, texts: bool) -> None:
        self._dim, self._images, self._texts = dim, images, texts
        self._number = pyarrow.float32() if ending == "parquet" else pyarrow.float16()
        vector = pyarrow.list_(self._number, dim)
        fields = list(_FACTS) + ([pyarrow.field("vector", vector)] if images else [])
        fields += _text_fields(vector) if texts else []
        self._schema = pyarrow.schema(fields)
        path = os.path.join(folder, f"part_{number:04d}.{ending}")
        self._writer = (
            parquet.ParquetWriter(path, self._schema, compression="zstd")
            if ending == "parquet"
            else pyarrow.ipc.new_file(path, self._schema)
        )

    def add(self, page: Page) -> None:
        """See `Shard.add`."""
        columns = _fact_columns(page.records)
        if self._images:
            columns.append(_vectors(page.images, self._number, missing=~page.has_image))
        if self._texts:
            columns += _text_columns(page, self._number)
        self._writer.write_batch(pyarrow.record_batch(columns, schema=self._schema))

    def close(self) -> None:
        """See `Shard.close`."""
        self._writer.close()


class ClipShard:
    """Number N of clip-retrieval's layout: `img_emb`, `text_emb` and `metadata` of the same rows.

    With both kinds of vectors an item without a picture, or without texts, has a row of zeros there; `has_image` and
    `text_part` say so, and further captions' vectors are in the metadata.
    """

    def __init__(self, folder: str, number: int, *, dim: int, images: bool, texts: bool) -> None:
        def path(name: str, ending: str) -> str:
            os.makedirs(os.path.join(folder, name), exist_ok=True)
            return os.path.join(folder, name, f"{name}_{number:04d}.{ending}")

        self._images = NpyFile(path("img_emb", "npy"), dim) if images else None
        self._texts = NpyFile(path("text_emb", "npy"), dim) if texts else None
        fields = [*_FACTS, pyarrow.field(HAS_IMAGE, pyarrow.bool_())] if images else list(_FACTS)
        if texts:
            fields.append(pyarrow.field(TEXT_PART, pyarrow.int32()))
            fields += _text_fields(pyarrow.list_(pyarrow.float32(), dim))
        self._schema = pyarrow.schema(fields)
        self._writer = parquet.ParquetWriter(path("metadata", "parquet"), self._schema, compression="zstd")

    def add(self, page: Page) -> None:
        """See `Shard.add`."""
        columns = _fact_columns(page.records)
        if self._images is not None:
            self._images.add(page.images)
            columns.append(pyarrow.array(page.has_image))
        if self._texts is not None:
            first = np.diff(page.text_of, prepend=-1) > 0  # the first vector of each item that has some
            rows = np.zeros((len(page), page.images.shape[1]), np.float16)
            rows[page.text_of[first]] = page.texts[first]
            self._texts.add(rows)
            parts = np.full(len(page), -1, np.int32)
            parts[page.text_of[first]] = page.text_part[first]
            columns.append(pyarrow.array(parts, mask=parts < 0))
            columns += _text_columns(page, pyarrow.float32(), keep=~first)
        self._writer.write_batch(pyarrow.record_batch(columns, schema=self._schema))

    def close(self) -> None:
        """See `Shard.close`."""
        for file in (self._images, self._texts, self._writer):
            if file is not None:
                file.close()


def _text_fields(vector: pyarrow.DataType) -> list[pyarrow.Field]:
    return [
        pyarrow.field(TEXT_VECTORS, pyarrow.list_(vector)),
        pyarrow.field(TEXT_PARTS, pyarrow.list_(pyarrow.int32())),
    ]


def _fact_columns(records: list[ItemRecord]) -> list[pyarrow.Array]:
    captions = [[_text(one) for one in record.captions] for record in records]
    rows = [_path_and_metadata(record) for record in records]
    return [
        pyarrow.array([_text(record.id) for record in records], pyarrow.string()),
        pyarrow.array([path for path, _ in rows], pyarrow.string()),
        pyarrow.array([texts[0] if texts else None for texts in captions], pyarrow.string()),
        pyarrow.array(captions, pyarrow.list_(pyarrow.string())),
        pyarrow.array([record.width for record in records], pyarrow.int32()),
        pyarrow.array([record.height for record in records], pyarrow.int32()),
        pyarrow.array([record.taken_at for record in records], pyarrow.string()),
        pyarrow.array([metadata for _, metadata in rows], pyarrow.string()),
    ]


def _path_and_metadata(record: ItemRecord) -> tuple[str | None, str | None]:
    """A path that was kept in the metadata, since the picture is elsewhere, is a path again."""
    metadata = dict(record.metadata)
    path = record.path
    if path is None and isinstance(metadata.get(PATH_KEY), str):
        path = str(metadata.pop(PATH_KEY))
    return None if path is None else _text(path), encode_json(metadata) if metadata else None


def _text(text: str) -> str:
    """What a column of text can hold: bytes of a file name that are no text are escaped."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _vectors(rows: NDArray[np.float16], number: pyarrow.DataType, *, missing: NDArray[np.bool_]) -> pyarrow.Array:
    """(n, d) -> a column of vectors, null where `missing`."""
    flat = pyarrow.array(rows.reshape(-1).astype(number.to_pandas_dtype(), copy=False))
    mask = pyarrow.array(missing) if missing.any() else None
    return pyarrow.FixedSizeListArray.from_arrays(flat, rows.shape[1], mask=mask)


def _text_columns(
    page: Page, number: pyarrow.DataType, *, keep: NDArray[np.bool_] | None = None
) -> list[pyarrow.Array]:
    """The columns of captions' vectors and of which captions they are; `keep`: only these rows of `page.texts`."""
    kept = np.ones(len(page.texts), bool) if keep is None else keep
    ends = np.searchsorted(page.text_of[kept], np.arange(len(page) + 1)).astype(np.int32)
    rows = _vectors(page.texts[kept], number, missing=np.zeros(int(kept.sum()), bool))
    parts = pyarrow.array(page.text_part[kept].astype(np.int32))
    return [pyarrow.ListArray.from_arrays(pyarrow.array(ends), side) for side in (rows, parts)]
