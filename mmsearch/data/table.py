"""Tables of pictures and texts: CSV, TSV, JSON lines, and a JSON list of objects.

Columns, whatever their case: a picture is in the first of `IMAGE_COLUMNS` that there is; captions are in
`caption`, `captions`, `title`, `text` and `caption_...`, where there are none of them in the first of `ELSE_CAPTIONS`;
`id`, `split` and `group` mean what they say; everything else is metadata.

Decisions:
- A bad row is reported with its line and costs itself only; a table without a usable column is an error.
- Lines and fields are bounded, so that a broken file costs no memory.
- The separator of a CSV is the one that makes its header meaningful (",", ";", tab or "|").
- Bytes that are not UTF-8 are kept: they may be the name of a file.
"""

from __future__ import annotations

import csv
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, TypeAlias

from mmsearch.data.records import Record
from mmsearch.data.texts import OnSkip, captions_in, clean, json_value, parse_json
from mmsearch.errors import InputError
from mmsearch.types import Skipped, SkipReason

FILE_COLUMNS = ("image_path", "filepath", "path", "file", "filename", "file_name", "image_name", "image_file")
IMAGE_COLUMNS = ("image", *FILE_COLUMNS, "img", "img_path", "picture")
ELSE_CAPTIONS = ("sentence", "sentences", "description", "descriptions", "comment", "comments", "alt", "alt_text")
"""What a column of captions is called where none is called so."""

Row: TypeAlias = Sequence[tuple[str, object]]

_CAPTION = re.compile(r"caption_.*|caption\d*|captions|title|text")
_GAPS = re.compile(r"[\s-]+")
_LINE_CHARACTERS, _HEADER_CHARACTERS = 1 << 24, 4096
_SEPARATORS = ",;\t|"
_COLUMNS = f"a column {IMAGE_COLUMNS[0]} (or {', '.join(IMAGE_COLUMNS[1:])}) or caption"


def read_csv(path: str, *, on_skip: OnSkip) -> Iterator[Record]:
    """Rows of comma-separated values with a header; `InputError` when the header has no usable column."""
    return _separated(path, on_skip, _SEPARATORS)


def read_tsv(path: str, *, on_skip: OnSkip) -> Iterator[Record]:
    """Rows of tab-separated values with a header; otherwise as `read_csv`."""
    return _separated(path, on_skip, "\t")


def read_jsonl(path: str, *, on_skip: OnSkip) -> Iterator[Record]:
    """One JSON object a line; empty lines are passed over."""
    with _open_text(path) as file:
        for number, line in enumerate(_lines(file, _reporter(path, on_skip)), 1):
            if not line.strip():
                continue
            try:
                entry = parse_json(line)
                if not isinstance(entry, dict):
                    raise ValueError("not an object")
                yield record(number, list(entry.items()))
            except ValueError as error:
                on_skip(_bad(path, number, str(error)))


def read_list(path: str, entries: Iterable[object], *, on_skip: OnSkip) -> Iterator[Record]:
    """Rows that are the objects of one JSON list, already parsed."""
    for number, entry in enumerate(entries, 1):
        try:
            if not isinstance(entry, dict):
                raise ValueError("not an object")
            yield record(number, list(entry.items()))
        except ValueError as error:
            on_skip(_bad(path, number, str(error)))


def record(line: int, row: Row) -> Record:
    """One row's meaning; `ValueError` when it has neither picture nor text."""
    keys = [plain_name(name) for name, _ in row]
    lower = {key: position for position, key in enumerate(keys)}
    image_at = next((lower[name] for name in IMAGE_COLUMNS if name in lower), None)
    stated: dict[str, str | None] = {"id": None, "split": None, "group": None}
    captions: tuple[str, ...] = ()
    metadata: dict[str, object] = {}
    of_captions = caption_columns(lower)
    for position, (key, (name, value)) in enumerate(zip(keys, row, strict=True)):
        if position == image_at or value is None or value == "":
            continue
        if key in of_captions:
            captions += captions_in(_listed(value))
        elif key in stated:
            stated[key] = clean(str(value))
        else:
            metadata[clean(name)] = json_value(value)
    image = None if image_at is None else _image(row[image_at][1])
    if image is None and not captions:
        raise ValueError("neither picture nor text")
    return Record(line, image, captions, stated["id"], stated["split"], stated["group"], metadata)


def _image(value: object) -> str | None:
    if isinstance(value, dict):  # the `datasets` library: {"bytes": ..., "path": ...}
        value = value.get("path")
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise ValueError(f"a picture's name expected, got {type(value).__name__}")
    return value.strip() or None


def _listed(value: object) -> object:
    """A CSV cell may hold a JSON list of captions."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        try:
            return parse_json(value)
        except ValueError:
            return value
    return value


def _separated(path: str, on_skip: OnSkip, separators: str) -> Iterator[Record]:
    with _open_text(path) as file:
        lines = _lines(file, _reporter(path, on_skip))
        first = next(lines, "")
        separator = max(separators, key=lambda s: (_usable(_split(first, s)), first.count(s)))
        header = _split(first, separator)
        check_columns(path, header)
        reader = csv.reader(lines, delimiter=separator)
        while True:
            try:
                cells = next(reader, None)
                if cells is None:
                    return
                if len(cells) > len(header):
                    raise ValueError(f"{len(cells)} cells, {len(header)} columns (a separator without quotes?)")
                if any(cells):
                    yield record(reader.line_num + 1, list(zip(header, cells, strict=False)))
            except (ValueError, csv.Error) as error:
                on_skip(_bad(path, reader.line_num + 1, str(error)))


def _split(line: str, separator: str) -> list[str]:
    return next(csv.reader([line], delimiter=separator), [])


def _usable(header: Iterable[str]) -> int:
    names = {plain_name(name) for name in header}
    return len(names & set(IMAGE_COLUMNS)) + len(caption_columns(names))


@functools.lru_cache(maxsize=256)
def plain_name(name: str) -> str:
    """A column's name as it is compared. Known values: " File Name" and "file-name" are file_name."""
    return _GAPS.sub("_", name.strip().lower())


def caption_columns(names: Iterable[str]) -> frozenset[str]:
    """Those of the names, plain (`plain_name`), that hold captions.

    Known values: caption, comment -> caption; image, comment, alt -> comment.
    """
    return _captions_among(tuple(names))


@functools.lru_cache(maxsize=4)
def _captions_among(names: tuple[str, ...]) -> frozenset[str]:
    """Remembered: rows of one table have the same few headers."""
    found = frozenset(name for name in names if _CAPTION.fullmatch(name))
    return found or frozenset([name for name in ELSE_CAPTIONS if name in names][:1])


def is_table(path: str) -> bool:
    """Whether the first line of a text file is a header with a column of pictures and one of captions."""
    if not os.path.isfile(path):  # a pipe would be waited for
        return False
    try:
        with _open_text(path) as file:
            first = file.readline(_HEADER_CHARACTERS)
    except (OSError, UnicodeError):
        return False
    names = [{plain_name(name) for name in _split(first, separator)} for separator in _SEPARATORS]
    return any(caption_columns(some) and not some.isdisjoint(IMAGE_COLUMNS) for some in names)


def check_columns(path: str, header: Sequence[str]) -> None:
    """`InputError` when a header has neither a column of pictures nor one of captions."""
    if not _usable(header):
        got = ", ".join(header)[:200] or "an empty file"
        raise InputError(path, expected=_COLUMNS, got=got, do="Give the table a header line.")


def _open_text(path: str) -> IO[str]:
    with open(path, "rb") as file:
        wide = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    return open(
        path, encoding="utf-16" if wide else "utf-8-sig", errors="replace" if wide else "surrogateescape", newline=""
    )


def _lines(file: IO[str], report: Callable[[int, str], None]) -> Iterator[str]:
    """The lines, an empty one in place of each that is too long."""
    number = 0
    while line := file.readline(_LINE_CHARACTERS):
        number += 1
        if len(line) == _LINE_CHARACTERS and not line.endswith("\n"):
            while line and not line.endswith("\n"):
                line = file.readline(_LINE_CHARACTERS)
            report(number, "line too long")
            line = "\n"
        yield line


def _reporter(path: str, on_skip: OnSkip) -> Callable[[int, str], None]:
    return lambda line, what: on_skip(_bad(path, line, what))


def _bad(path: str, line: int, what: str) -> Skipped:
    return Skipped(f"{path}:{line}", SkipReason.BAD_ROW, what)
