"""The formats of tables of pictures and texts, by name: the place to plug in another one.

A format is a function `(path, *, on_skip) -> Iterator[Record]`. To add one: a file, and a line in `_FORMATS`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Protocol, cast

from mmsearch.data.records import Finder, Record, table_places, wide_places
from mmsearch.data.texts import OnSkip
from mmsearch.errors import InputError, MissingExtraError, UsageError


class Format(Protocol):
    """Reads the rows of one file, in their order; what cannot be read is reported and left out.

    Raises `InputError` when the file as a whole is not of this format.
    """

    def __call__(self, path: str, *, on_skip: OnSkip) -> Iterator[Record]:
        """Rows of the file at `path` (absolute)."""
        ...


# name -> (module, function, package it needs, extra that brings the package)
_FORMATS: dict[str, tuple[str, str, str | None, str | None]] = {
    "csv": ("mmsearch.data.table", "read_csv", None, None),
    "tsv": ("mmsearch.data.table", "read_tsv", None, None),
    "jsonl": ("mmsearch.data.table", "read_jsonl", None, None),
    "parquet": ("mmsearch.data.table", "read_parquet", "pyarrow", "parquet"),
    "json": ("mmsearch.data.documents", "read_json", None, None),
    "karpathy": ("mmsearch.data.documents", "read_karpathy_file", None, None),
    "coco": ("mmsearch.data.documents", "read_coco_file", None, None),
}

_BY_EXTENSION = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".json": "json",
}
_NESTED = {"json", "karpathy", "coco"}


def names() -> tuple[str, ...]:
    """Names of all formats."""
    return tuple(_FORMATS)


def sniff(path: str) -> str | None:
    """The format of a file by its ending, None when it is no table."""
    return _BY_EXTENSION.get(os.path.splitext(path)[1].lower())


def open_table(path: str, *, format: str, on_skip: OnSkip) -> tuple[Iterator[Record], Finder]:
    """Rows of the table at `path` (absolute), and where to look for its pictures.

    Raises `UsageError` for an unknown format, `MissingExtraError` when its package is not installed,
    `InputError` when the file cannot be read or is no such table (at once or when rows are taken).
    """
    if format not in _FORMATS:
        raise UsageError("format", expected=" or ".join(_FORMATS), got=format)
    module, function, package, extra = _FORMATS[format]
    if package and extra and importlib.util.find_spec(package) is None:
        raise MissingExtraError(path, package=package, extra=extra)
    if not os.path.isfile(path):
        raise InputError(path, expected="a file", got="something else", do="Check the path.")
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise InputError(path, expected="a readable file", got=error.strerror or str(error)) from error
    read = cast(Format, getattr(importlib.import_module(module), function))
    places = wide_places if format in _NESTED else table_places
    return read(path, on_skip=on_skip), Finder(places(path))
