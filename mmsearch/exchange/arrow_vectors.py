"""Vectors inside Arrow columns as numpy rows, and which column holds them. Needs pyarrow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow
from numpy.typing import NDArray

from mmsearch.errors import InputError
from mmsearch.exchange.base import TEXT_PARTS, TEXT_VECTORS

_NAMES = ("vector", "embedding", "emb", "image_embedding", "img_emb", "clip_embedding", "embeddings")


def is_vectors(kind: pyarrow.DataType) -> bool:
    """Whether a column of that type holds vectors: lists of floats, of one length or any."""
    types = pyarrow.types
    if not (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
        return False
    return bool(types.is_floating(kind.value_type))


def vector_column(schema: pyarrow.Schema, *, named: str | None, where: str) -> str | None:
    """The column with vectors, `named` or the only one (of several, the one called as usual); None without one.

    Raises `InputError` when the named one is none, or several might be meant.
    """
    found = [field.name for field in schema if is_vectors(field.type)]
    if named is not None:
        if named not in found:
            got = ", ".join(found) or f"none among {', '.join(schema.names)[:200]}"
            raise InputError(where, expected=f"a column {named!r} of vectors", got=got)
        return named
    usual = [name for usual in _NAMES for name in found if name.lower() == usual]
    if len(found) > 1 and not usual:
        raise InputError(
            where, expected="one column of vectors", got=", ".join(found), do="Say which one: --vector-column NAME."
        )
    return next(iter(usual or found), None)


def dim_of(column: pyarrow.Array) -> int | None:
    """d of the first vector in a column; None when all are null."""
    if pyarrow.types.is_fixed_size_list(column.type):
        return int(column.type.list_size)
    lengths = column.value_lengths().drop_null()
    return int(lengths[0].as_py()) if len(lengths) else None


def matrix_of(column: pyarrow.Array, dim: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """A column of vectors -> ((n, d), (n,) which are not null); a vector of another length becomes NaN."""
    there = np.asarray(column.is_valid().to_numpy(zero_copy_only=False), dtype=bool)
    lengths = np.full(len(column), dim)
    if not pyarrow.types.is_fixed_size_list(column.type):
        lengths = np.nan_to_num(column.value_lengths().to_numpy(zero_copy_only=False), nan=-1).astype(np.int64)
    elif column.type.list_size != dim:
        lengths = np.full(len(column), column.type.list_size)
    fits = there & (lengths == dim)
    wanted = column.filter(pyarrow.array(fits))
    # `flatten` leaves out what is null and what lies outside a slice
    numbers = wanted.flatten().to_numpy(zero_copy_only=False)
    rows = np.full((len(column), dim), np.nan, dtype=numbers.dtype if numbers.dtype.kind == "f" else np.float32)
    rows[fits] = numbers.reshape(-1, dim)
    return rows, there


def texts_of(batch: pyarrow.RecordBatch, dim: int) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    """The vectors of captions in a batch: (m, d) rows, (m,) which row of the batch, (m,) which caption."""
    names = batch.schema.names
    if TEXT_VECTORS not in names or TEXT_PARTS not in names:
        return np.empty((0, dim), np.float32), np.empty(0, np.int64), np.empty(0, np.int64)
    vectors, parts = batch.column(TEXT_VECTORS), batch.column(TEXT_PARTS)
    counts = [
        np.nan_to_num(side.value_lengths().to_numpy(zero_copy_only=False), nan=0).astype(np.int64)
        for side in (vectors, parts)
    ]
    if not np.array_equal(*counts):
        raise InputError(
            TEXT_VECTORS, expected=f"as many vectors as {TEXT_PARTS} names", got="another number",
            do="Export the index again, or take the two columns out of the table.",
        )  # fmt: skip
    rows, _ = matrix_of(vectors.flatten(), dim)
    which = np.asarray(parts.flatten().to_numpy(zero_copy_only=False)).astype(np.int64)
    return rows, np.repeat(np.arange(len(batch), dtype=np.int64), counts[0]), which


def is_text_vectors(kind: pyarrow.DataType) -> bool:
    """Whether a column of that type may hold the vectors of captions: lists of vectors."""
    lists = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
    return bool(lists and is_vectors(kind.value_type))
