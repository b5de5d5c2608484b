"""One row of any table of pictures and texts, and how rows become items.

Decisions:
- Rows of one picture are one item with all their captions, wherever they stand; a temporary database on
  disk brings them together, so that a long table needs no memory. Items come in the order of the table.
- Identity below the table: the picture as the table writes it; a text without a picture has its `id`, else
  its content. Row numbers are no identity: a line put in at the top would change every item.
- The user's own table may name pictures anywhere, also by absolute paths and by addresses of pictures inside files
  (`data.packed`), as a run's table of held-out pairs does; they are only ever decoded.
- A picture that is inside its table has a `place` (`data.packed`), and its name is never looked for on the disk.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace

import xxhash

from mmsearch.data.packed import packed
from mmsearch.data.reading import skip_reason, stamp_of
from mmsearch.data.texts import OnSkip, unique
from mmsearch.errors import InputError, ResourceError
from mmsearch.types import Skipped, SkipReason, Source, Stamp

_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.I)


@dataclass(frozen=True, slots=True)
class Record:
    """One row: `image` as written (None: text only), `line` of the table for messages, counted from 1.

    `place`: the address of a picture that is inside a file (`data.packed`); `image` is then only its name.
    `split_of_file`: the split where no row of this name says one, because the file of the row is named after it.
    """

    line: int
    image: str | None
    captions: tuple[str, ...] = ()
    id: str | None = None
    split: str | None = None
    group: str | None = None
    metadata: dict[str, object] = field(default_factory=dict)
    place: str | None = None
    split_of_file: str | None = None

    @property
    def name(self) -> str:
        """Identity below the table."""
        if self.image is not None:
            return self.image
        if self.id is not None:
            return f"id:{self.id}"
        return "text:" + xxhash.xxh3_64_hexdigest("\0".join(self.captions).encode("utf-8", "surrogatepass"))


@dataclass(slots=True)
class Finder:
    """Finds the pictures a table names: relative to the first of `places` (folders) where there is one.

    `closed`: the table has its pictures inside, and a name is none of a file.
    """

    places: list[str]
    closed: bool = False

    def find(self, image: str) -> tuple[str, Stamp]:
        """Absolute path or address, and stamp; `FileNotFoundError` or another `OSError` when it is in none of them."""
        if os.path.isabs(image):
            inside = packed(image)
            return image, stamp_of(os.stat(inside.file if inside else image))
        for position, place in enumerate(self.places):
            path = os.path.normpath(os.path.join(place, image))
            try:
                stamp = stamp_of(os.stat(path))
            except (FileNotFoundError, NotADirectoryError):
                continue
            if position:  # the next one is most likely there too
                self.places.insert(0, self.places.pop(position))
            return path, stamp
        raise FileNotFoundError(2, "no such picture", image)


def table_places(path: str) -> list[str]:
    """Where the pictures of a table are looked for: its folder, or that folder's `images`."""
    base = os.path.dirname(path)
    return [base, os.path.join(base, "images"), os.path.join(base, "Images")]


def wide_places(path: str) -> list[str]:
    """As `table_places`, then every folder beside the table and beside its folder."""
    base = os.path.dirname(path)
    parent = os.path.dirname(base)
    return [*table_places(path), *_folders_in(base), parent, *_folders_in(parent)]


def joined(records: Iterable[Record], *, by_split: bool = False) -> Iterator[Record]:
    """Rows of one name become one: all captions in order, the first row's other values before later ones.

    `by_split`: only rows of one split too, so that no caption of another split comes with them. A row that says no
    split goes with the first of its name that does; the picture inside its table is that of all of them.
    """
    for _, group in itertools.groupby(_brought_together(records), key=lambda record: record.name):
        rows = list(group)
        if len(rows) == 1 and rows[0].split_of_file is None:  # nearly all of a long table
            yield rows[0]
            continue
        place = next((row.place for row in rows if row.place), None)
        for part in _by_split(rows) if by_split else [rows]:
            yield _one(part, place)


def _by_split(rows: Sequence[Record]) -> list[list[Record]]:
    """Rows of one name, those of each split together."""
    usual = _split_of(rows)
    parts: dict[str | None, list[Record]] = {}
    for row in rows:
        parts.setdefault(row.split or usual, []).append(row)
    return list(parts.values())


def _one(rows: Sequence[Record], place: str | None) -> Record:
    """All rows of one picture as one."""
    if len(rows) == 1:
        return replace(rows[0], split=_split_of(rows), place=place)
    metadata: dict[str, object] = {}
    for row in reversed(rows):
        metadata.update(row.metadata)
    return replace(
        rows[0],
        captions=tuple(caption for row in rows for caption in row.captions),
        split=_split_of(rows),
        group=next((row.group for row in rows if row.group), None),
        metadata=metadata,
        place=place,
    )


def _split_of(rows: Sequence[Record]) -> str | None:
    stated = (*(row.split for row in rows), *(row.split_of_file for row in rows))
    return next((split for split in stated if split), None)


def sources(table: str, records: Iterable[Record], *, finder: Finder, on_skip: OnSkip) -> Iterator[Source]:
    """The items of a table (absolute path), each caption once; rows whose picture cannot be found are reported.

    Pairs for evaluation keep a caption that two people wrote alike: test sets are counted that way.
    """
    for record in joined(records):
        if record.place is not None or (record.image and os.path.isabs(record.image) and packed(record.image)):
            raise InputError(
                table,
                expected="pictures that are files",
                got="pictures inside a table or an archive",
                do="Unpack them: an index shows where its pictures are.",
            )
        stated = {"id": record.id, "split": record.split, "group": record.group}
        metadata = {**{k: v for k, v in stated.items() if v is not None}, **record.metadata}
        path = stamp = None
        if record.image is not None:
            found = locate(table, record, finder=finder, on_skip=on_skip)
            if found is None:
                continue
            path, stamp = found
        yield Source(table, record.name, path, stamp, unique(record.captions), metadata)


def locate(table: str, record: Record, *, finder: Finder, on_skip: OnSkip) -> tuple[str, Stamp] | None:
    """The picture of a row; None, and a report, when it cannot be found."""
    image, line = record.image or "", f"line {record.line} of {os.path.basename(table)}"
    if finder.closed and record.place is None:
        on_skip(Skipped(f"{table}: {image}", SkipReason.BAD_ROW, "no picture"))
        return None
    if record.place is None and _URL.match(image):
        on_skip(Skipped(image, SkipReason.UNSUPPORTED, f"a URL, in {line}"))
        return None
    try:
        if record.place is not None:
            inside = packed(record.place)
            return record.place, stamp_of(os.stat(inside.file if inside else record.place))
        return finder.find(image)
    except (OSError, ValueError) as error:
        reason = skip_reason(error) if isinstance(error, OSError) else SkipReason.BAD_ROW
        path = record.place or os.path.normpath(os.path.join(os.path.dirname(table), image))
        on_skip(Skipped(path, reason, f"named in {line}"))
        return None


def _brought_together(records: Iterable[Record]) -> Iterator[Record]:
    """The same records with those of one name next to each other, names in order of first appearance."""
    try:
        with closing(sqlite3.connect("")) as db:  # a private file that goes with the connection
            db.execute("CREATE TABLE rows (row INTEGER PRIMARY KEY, name BLOB, record TEXT)")
            db.executemany(
                "INSERT INTO rows (name, record) VALUES (?, ?)",
                ((r.name.encode("utf-8", "surrogatepass"), json.dumps(asdict(r))) for r in records),
            )
            db.execute("CREATE TABLE firsts AS SELECT name, MIN(row) AS first FROM rows GROUP BY name")
            db.execute("CREATE INDEX by_name ON rows (name, row)")
            query = "SELECT record FROM firsts JOIN rows USING (name) ORDER BY first, row"
            for (text,) in db.execute(query):
                values = json.loads(text)
                values["captions"] = tuple(values["captions"])
                yield Record(**values)
    except sqlite3.OperationalError as error:
        raise ResourceError(
            "reading a table", expected="room for a temporary file", got=str(error), do="Free some disk space."
        ) from error


def _folders_in(path: str) -> Sequence[str]:
    try:
        with os.scandir(path) as entries:
            names = [e.name for e in entries if not e.name.startswith(".") and e.is_dir()]
    except OSError:
        return ()
    return [os.path.join(path, name) for name in sorted(names, key=os.fsencode)]
