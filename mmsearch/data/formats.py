"""The formats of tables of pictures and texts, by name: the place to plug in another one.

A format is a function `(path, *, on_skip) -> Iterator[Record]`. To add one: a file, and a line in `_FORMATS`.

Decisions:
- A folder is a data set only by what lies in the folder itself or in one named as a split is (train, val, test);
  pictures there make it what is usual, a folder of pictures with side-cars.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Protocol, cast

from mmsearch.data.reading import listed
from mmsearch.data.records import Finder, Record, table_places, wide_places
from mmsearch.data.sniffing import PICTURE_EXTENSIONS
from mmsearch.data.splits import split_in
from mmsearch.data.table import is_table
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
    "parquet": ("mmsearch.data.parquet", "read_parquet", "pyarrow", "parquet"),
    "json": ("mmsearch.data.documents", "read_json", None, None),
    "karpathy": ("mmsearch.data.documents", "read_karpathy_file", None, None),
    "coco": ("mmsearch.data.documents", "read_coco_file", None, None),
    "webdataset": ("mmsearch.data.webdataset", "read_webdataset", None, None),
    "huggingface": ("mmsearch.data.hf_dataset", "read_hf_dataset", None, None),
}

_BY_EXTENSION = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".json": "json",
    ".tar": "webdataset",
    ".tgz": "webdataset",
}
_NESTED = {"json", "karpathy", "coco"}
_MANY_FILES = {"webdataset", "huggingface"}


def names() -> tuple[str, ...]:
    """Names of all formats."""
    return tuple(_FORMATS)


def sniff(path: str) -> str | None:
    """The format of a file by its ending, of a .txt by its first line; None when it is no table."""
    lower = path.lower()
    ending = os.path.splitext(lower)[1]
    if ending == ".txt" and is_table(path):
        return "csv"
    return "webdataset" if lower.endswith(".tar.gz") else _BY_EXTENSION.get(ending)


def sniff_folder(path: str) -> str | None:
    """The format of a folder that is a data set of several files; None when it is one of pictures with side-cars.

    Raises `InputError` when it cannot be listed; a folder in it that cannot is no split.
    """
    from mmsearch.data.hf_dataset import is_dataset

    if is_dataset(path):
        return "huggingface"
    folders = [entry.path for entry in listed(path) if split_in(entry.name) and os.path.isdir(entry.path)]
    found = [_endings_in(folder) for folder in (path, *folders)]
    tars = any(".tar" in endings for endings in found)
    return "webdataset" if tars and all(endings.isdisjoint(PICTURE_EXTENSIONS) for endings in found) else None


def _endings_in(folder: str) -> set[str]:
    """Endings in a folder, that of no folder called x.tar; none where it cannot be listed: whoever reads it says so."""
    found = set()
    try:
        for entry in listed(folder):
            ending = os.path.splitext(entry.name)[1].lower()
            if not entry.name.startswith(".") and not (ending == ".tar" and os.path.isdir(entry.path)):
                found.add(ending)
    except InputError:
        return set()
    return found


def is_pattern(path: str) -> bool:
    """Whether a path that does not exist may name WebDataset shards: it has braces or wildcards and ends in .tar."""
    return path.lower().endswith(".tar") and any(mark in path for mark in "{*?[")


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
    if format not in _MANY_FILES and not os.path.isfile(path):
        raise InputError(path, expected="a file", got="something else", do="Check the path.")
    try:
        if os.path.isfile(path):
            with open(path, "rb"):
                pass
    except OSError as error:
        raise InputError(path, expected="a readable file", got=error.strerror or str(error)) from error
    read = cast(Format, getattr(importlib.import_module(module), function))
    if format in _MANY_FILES:
        return read(path, on_skip=on_skip), Finder([path], closed=format == "webdataset")
    places = wide_places if format in _NESTED else table_places
    return read(path, on_skip=on_skip), Finder(places(path))
