"""items.sqlite: its schema, how it is opened, and how its rows become values.

Decisions:
- WAL with synchronous=FULL: a commit is on the disk when it returns, and readers never wait.
- File names are BLOBs (any bytes), captions and metadata are ASCII JSON (any Python string survives).
- A reader may make SQLite's side files (log and its index) where it can, and its close removes them
  again; that is why it opens the file writable, and then forbids itself to write (query_only).
- A folder that cannot be written to (or is on a full disk) cannot hold side files. Without a log the database
  is opened as immutable; with a log left by a writer that died, both are copied to a temporary folder.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Mapping
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mmsearch.errors import IndexDamagedError, ResourceError
from mmsearch.store.base import ItemState, Known
from mmsearch.store.connections import Connection, connect, copy_database
from mmsearch.store.disk import REBUILD, sqlite_fault, sqlite_guard
from mmsearch.types import NO_METADATA, Item, Modality, SkipReason, Stamp

ITEMS_NAME = "items.sqlite"
APPLICATION_ID = 0x6D6D7331  # "mms1"
BUSY_MS = 10_000
INT64_MAX = (1 << 63) - 1
_JSON = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=str)

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE items (
  item INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL UNIQUE,
  root BLOB NOT NULL,
  name BLOB NOT NULL,
  path BLOB,
  size INTEGER, mtime_ns INTEGER, ctime_ns INTEGER,
  read_ns INTEGER NOT NULL,
  hash BLOB,
  state TEXT NOT NULL,
  reason TEXT, detail TEXT NOT NULL DEFAULT '',
  image INTEGER,
  width INTEGER, height INTEGER, taken_at TEXT, note TEXT NOT NULL DEFAULT '',
  captions TEXT NOT NULL DEFAULT '[]',
  metadata TEXT NOT NULL DEFAULT '{}',
  UNIQUE (root, name)
);
CREATE INDEX items_hash ON items (hash, image) WHERE hash IS NOT NULL;
CREATE INDEX items_size ON items (size) WHERE size IS NOT NULL;
CREATE TABLE rows (row INTEGER PRIMARY KEY, item INTEGER NOT NULL, part INTEGER);
CREATE INDEX rows_item ON rows (item);
CREATE TABLE dead (row INTEGER PRIMARY KEY, is_text INTEGER NOT NULL);
CREATE TABLE blocks (
  first INTEGER PRIMARY KEY, count INTEGER NOT NULL, is_text INTEGER NOT NULL, xxh3 TEXT NOT NULL
);
"""
KNOWN_COLUMNS = (
    "i.item, i.id, i.root, i.name, i.path, i.size, i.mtime_ns, i.ctime_ns, i.hash, i.state, i.captions, "
    "i.metadata, i.image, i.reason, i.detail"
)
ITEM_COLUMNS = "i.id, i.path, i.captions, i.metadata, i.width, i.height, i.taken_at"


def is_text(modality: Modality) -> int:
    """How a modality is stored: 0 for pictures, 1 for texts."""
    return int(modality is Modality.TEXT)


def writer_connection(path: str) -> Connection:
    """Open (or make) the database for the one writer. Transactions are explicit."""
    with sqlite_guard(path):
        connection = connect(path)
        try:
            connection.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA temp_store = FILE")
        except BaseException:
            connection.close()
            raise
        return connection


class ReaderConnection:
    """A read-only connection, whatever the folder allows. `db` is the SQLite connection.

    `without_log`: a log that cannot be read in place is passed over, not copied; the last commits may be missing then.
    """

    def __init__(self, path: str, *, without_log: bool = False) -> None:
        self._without_log = without_log
        self._copy: tempfile.TemporaryDirectory[str] | None = None
        self.immutable = False
        try:
            writable = os.access(os.path.dirname(path), os.W_OK) and os.access(path, os.W_OK)
            self.db = _read_only(path, "mode=rw" if writable else "mode=ro")
        except sqlite3.OperationalError as error:
            if (error.sqlite_errorcode & 0xFF) == sqlite3.SQLITE_BUSY:
                raise sqlite_fault(error, path) from error
            self.db = self._without_side_files(path)
        except sqlite3.Error as error:
            raise sqlite_fault(error, path) from error

    def _without_side_files(self, path: str) -> sqlite3.Connection:
        log = path + "-wal"
        with sqlite_guard(path):
            if self._without_log or not os.path.exists(log) or os.path.getsize(log) == 0:
                self.immutable = True
                return _read_only(path, "mode=ro&immutable=1")
            try:
                self._copy = tempfile.TemporaryDirectory(prefix="mmsearch-")
                copy_database(path, os.path.join(self._copy.name, ITEMS_NAME))
                shutil.copyfile(log, os.path.join(self._copy.name, ITEMS_NAME + "-wal"))
            except OSError as error:
                raise ResourceError(
                    path,
                    got=f"a log that cannot be read in place, nor copied ({error.strerror})",
                    do="Make the index directory writable once, or make room in the temporary folder.",
                ) from error
            return _read_only(os.path.join(self._copy.name, ITEMS_NAME), "mode=rw")

    def close(self) -> None:
        """Close; a temporary copy goes."""
        self.db.close()
        if self._copy is not None:
            self._copy.cleanup()


def _read_only(path: str, query: str) -> sqlite3.Connection:
    address = f"file:{quote(os.fsencode(os.path.abspath(path)))}?{query}"
    connection = connect(path, address=address)
    try:
        connection.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
        connection.execute("PRAGMA query_only = ON")
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()  # opens the log too
    except BaseException:
        connection.close()
        raise
    return connection


def read_meta(connection: sqlite3.Connection) -> dict[str, Any]:
    """Every fact about the index as a whole."""
    return dict(connection.execute("SELECT key, value FROM meta"))


def write_meta(connection: sqlite3.Connection, values: Mapping[str, Any]) -> None:
    """Set facts; inside a transaction."""
    connection.executemany("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", values.items())


def is_unfinished(path: str) -> bool:
    """Whether the database is what a creation that was killed leaves: no database yet, or an empty one."""
    if not os.path.exists(path):
        return True
    if Path(path).stat().st_size == 0 and not os.path.exists(path + "-wal"):
        return True
    reader = ReaderConnection(path)
    try:
        with sqlite_guard(path):
            return not reader.db.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchall()
    finally:
        reader.close()


def encode_path(path: str | None) -> bytes | None:
    """File names as the bytes they are."""
    return None if path is None else os.fsencode(path)


def encode_json(value: object) -> str:
    """Canonical ASCII JSON: equal values give equal text; what is not JSON becomes its `str`."""
    return _JSON.encode(value)


def encode_texts(captions: tuple[str, ...], metadata: Mapping[str, Any]) -> tuple[str, str]:
    """Captions and metadata as stored (the empty ones, which most have, without work)."""
    return (
        "[" + ",".join(map(encode_basestring_ascii, captions)) + "]" if captions else "[]",
        encode_json(dict(metadata)) if metadata else "{}",
    )


def plain(text: str) -> str:
    """Text that SQLite can hold: lone surrogates (undecodable bytes of a file name) are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def encode_stamp(stamp: Stamp | None) -> tuple[int | None, int | None, int | None]:
    """Size and times as stored. Times beyond 64 bits (after the year 2262) are held at the end."""
    if stamp is None:
        return None, None, None
    size, mtime, ctime = stamp.size, stamp.mtime_ns, stamp.ctime_ns
    return min(size, INT64_MAX), max(-INT64_MAX, min(mtime, INT64_MAX)), max(-INT64_MAX, min(ctime, INT64_MAX))


def decode_captions(text: str) -> tuple[str, ...]:
    """Captions of their JSON."""
    return tuple(json.loads(text)) if text != "[]" else ()


def decode_metadata(text: str) -> Mapping[str, Any]:
    """Metadata of its JSON."""
    loaded: dict[str, Any] = json.loads(text) if text != "{}" else {}
    return loaded or NO_METADATA


def known_of(row: tuple[Any, ...], where: str) -> Known:
    """`Known` of a row of KNOWN_COLUMNS; bytes that are not what was written raise `IndexDamagedError`."""
    (item, id_, root, name, path, size, mtime, ctime, digest, state, captions, metadata, image, reason, detail) = row
    try:
        return Known(
            item=item,
            id=id_,
            root=os.fsdecode(root),
            name=os.fsdecode(name),
            path=None if path is None else os.fsdecode(path),
            stamp=None if size is None else Stamp(size, mtime, ctime),
            content_hash=digest,
            state=ItemState(state),
            captions=decode_captions(captions),
            metadata=decode_metadata(metadata),
            has_image=image is not None,
            reason=None if reason is None else SkipReason(reason),
            detail=detail,
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise IndexDamagedError(where, got=f"item {item} that cannot be read ({error})", do=REBUILD) from error


def item_of(row: tuple[Any, ...], where: str) -> Item:
    """`Item` of a row of ITEM_COLUMNS; bytes that are not what was written raise `IndexDamagedError`."""
    id_, path, captions, metadata, width, height, taken_at = row
    try:
        return Item(
            id=id_,
            path=None if path is None else os.fsdecode(path),
            captions=decode_captions(captions),
            metadata=decode_metadata(metadata),
            width=width,
            height=height,
            taken_at=taken_at,
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise IndexDamagedError(where, got=f"item {id_} that cannot be read ({error})", do=REBUILD) from error
