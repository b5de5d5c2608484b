"""Ids and facts that lie beside vectors: a text with one id a line, JSON lines, an array of ids, or a table.

Decisions:
- JSON lines hold any file name (undecodable bytes as escapes) and need no package, so exports of .npy and FAISS files
  are accompanied by them, as NAME.ids.jsonl.
- Lines are counted once before anything is imported: a side-car that does not fit is refused as a whole, since nobody
  can say which of its lines belongs to which row.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import IO, Any

from mmsearch.data.texts import parse_json
from mmsearch.errors import InputError
from mmsearch.exchange.base import Facts, Table, spans
from mmsearch.exchange.matrices import open_npy
from mmsearch.exchange.roles import Roles, id_text

SIDECAR = ".ids.jsonl"
_LINE_BYTES = 1 << 24
_CHUNK = 1 << 20


def open_ids(path: str, *, id_column: str | None) -> Table:
    """The table in the file at `path`, by its first bytes and its ending. Raises `InputError`."""
    if not os.path.isfile(path):
        raise InputError(path, expected="a file with ids", got="no such file")
    with open(path, "rb") as file:
        magic = file.read(6)
    if magic == b"\x93NUMPY":
        _refuse_column(path, id_column)
        return NpyIds(path)
    if magic[:4] == b"PAR1" or magic == b"ARROW1":
        from mmsearch.exchange.arrow_tables import open_table

        return open_table(path, id_column=id_column)
    if path.endswith((".jsonl", ".ndjson")):
        return JsonLines(path, id_column=id_column)
    _refuse_column(path, id_column)
    return Lines(path)


def _refuse_column(path: str, id_column: str | None) -> None:
    if id_column is not None:
        got = f"--id-column {id_column!r} and a plain list of ids"
        raise InputError(path, expected="a table or JSON lines", got=got, do="Leave --id-column out.")


class NpyIds:
    """A `.npy` array of n integers or texts."""

    def __init__(self, path: str) -> None:
        self._ids = open_npy(path)
        if self._ids.ndim != 1 or self._ids.dtype.kind not in "iuUS":
            raise InputError(
                path, expected="integers or texts of shape (n,)", got=f"{self._ids.dtype} {self._ids.shape}"
            )
        self.count = len(self._ids)

    def facts(self, start: int, size: int) -> Iterator[list[Facts]]:
        """See `base.Table.facts`."""
        for first, last in spans(start, self.count, size):
            yield [Facts(id=id_text(one) or None) for one in self._ids[first:last].tolist()]


class Lines:
    """A text file with one id a line; an empty line is a row without an id."""

    def __init__(self, path: str) -> None:
        self._path, self.count = path, _count_lines(path)

    def facts(self, start: int, size: int) -> Iterator[list[Facts]]:
        """See `base.Table.facts`."""
        with open(self._path, "rb") as file:
            lines = itertools.islice(_lines(file, self._path), start, None)
            while some := list(itertools.islice(lines, size)):
                yield [Facts(id=id_text(line.rstrip(b"\r\n")) or None) for line in some]


class JsonLines:
    """One JSON object a row; its keys are what a table's columns are."""

    def __init__(self, path: str, *, id_column: str | None) -> None:
        self._path, self._id_column, self.count = path, id_column, _count_lines(path)
        self._roles: dict[tuple[str, ...], Roles] = {}
        if id_column is not None and self.count and not self._has(id_column):
            do = "Name another key with --id-column."
            raise InputError(path, expected=f"lines with the key {id_column!r}", got="none", do=do)

    def _has(self, key: str) -> bool:
        """Whether any line has that key; a line may lack it. Most often the first one decides."""
        with open(self._path, "rb") as file:
            return any(key in self._entry(line, number) for number, line in enumerate(_lines(file, self._path), 1))

    def facts(self, start: int, size: int) -> Iterator[list[Facts]]:
        """See `base.Table.facts`."""
        with open(self._path, "rb") as file:
            lines = itertools.islice(_lines(file, self._path), start, None)
            first = start
            while some := list(itertools.islice(lines, size)):
                yield [self._facts(line, first + i + 1) for i, line in enumerate(some)]
                first += len(some)

    def _entry(self, line: bytes, number: int) -> dict[str, Any]:
        where = f"{self._path}:{number}"
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise InputError(where, expected="a JSON object", got=str(error)[:200]) from error
        if not isinstance(entry, dict):
            raise InputError(where, expected="a JSON object", got=type(entry).__name__)
        return entry

    def _facts(self, line: bytes, number: int) -> Facts:
        entry = self._entry(line, number)
        keys = tuple(entry)
        if keys not in self._roles:
            if len(self._roles) > 1000:  # every line with keys of its own: nothing to be gained by keeping them
                self._roles.clear()
            named = self._id_column if self._id_column in keys else None
            self._roles[keys] = Roles(keys, id_column=named, where=f"{self._path}:{number}")
        return self._roles[keys].facts(list(entry.values()))


def _lines(file: IO[bytes], path: str) -> Iterator[bytes]:
    while line := file.readline(_LINE_BYTES):
        if len(line) == _LINE_BYTES:
            raise InputError(path, expected=f"lines shorter than {_LINE_BYTES:,} bytes", got="a longer one")
        yield line


def _count_lines(path: str) -> int:
    """Lines of a file; what follows the last newline is one."""
    count, last = 0, b"\n"
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                count, last = count + chunk.count(b"\n"), chunk[-1:]
    except OSError as error:
        raise InputError(path, expected="a readable file", got=error.strerror or str(error)) from error
    return count + (last != b"\n")
