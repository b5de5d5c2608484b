"""What a reader found against what the index knows, in bounded memory.

Decisions:
- Sources go into a temporary SQLite table on disk, so a million files stream through.
- The outcome is read page by page by key, so that batches may be committed meanwhile.
- A stamp proves nothing when the file was last written less than two seconds before it was read, or
  later (clocks with coarse ticks, clocks that go back): such a file is SUSPECT, as git treats it.
- A file whose reason for being skipped can pass by itself is tried again. A timeout is not one: it would
  cost its full time at every scan.
- Which items of a hash were not found is worked out once for each hash, so that a thousand copies of one
  picture do not walk through all its items a thousand times.
"""

from __future__ import annotations

import itertools
import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from mmsearch.store.base import Change, ChangeKind, ItemState, Known
from mmsearch.store.disk import sqlite_guard
from mmsearch.store.sqlite import (
    INT64_MAX,
    KNOWN_COLUMNS,
    decode_captions,
    decode_metadata,
    encode_path,
    encode_stamp,
    encode_texts,
    known_of,
)
from mmsearch.types import SkipReason, Source, Stamp

RACY_NS = 2_000_000_000
_PAGE = 1000
_MOST_CANDIDATES = 16
_PASSING = frozenset({SkipReason.VANISHED, SkipReason.CHANGING, SkipReason.OUT_OF_MEMORY, SkipReason.UNREADABLE})
_SEEN_COLUMNS = "s.root, s.name, s.path, s.size, s.mtime_ns, s.ctime_ns, s.captions, s.metadata"
_SEEN_WIDTH = 8
_PAGE_OF_SEEN = f"""
SELECT {_SEEN_COLUMNS}, {KNOWN_COLUMNS}, i.read_ns, i.captions <> s.captions OR i.metadata <> s.metadata
FROM temp.seen AS s LEFT JOIN main.items AS i ON i.root = s.root AND i.name = s.name
WHERE (s.root, s.name) > (?, ?) ORDER BY s.root, s.name LIMIT {_PAGE}
"""
_NOT_SEEN = "NOT EXISTS (SELECT 1 FROM temp.seen AS s WHERE s.root = i.root AND s.name = i.name)"
_PAGE_OF_GONE = f"""
SELECT {KNOWN_COLUMNS} FROM main.items AS i
WHERE i.root = ? AND i.name > ? AND {_NOT_SEEN}
ORDER BY i.name LIMIT {_PAGE}
"""
_LIST_UNSEEN = f"""
INSERT INTO temp.unseen (hash, item) SELECT ?1, 0
UNION ALL SELECT i.hash, i.item FROM main.items AS i
  WHERE i.hash = ?1 AND i.image >= 0 AND i.state = '{ItemState.OK}' AND {_NOT_SEEN}
"""
_STILL_UNSEEN = f"""
SELECT {KNOWN_COLUMNS} FROM temp.unseen AS u CROSS JOIN main.items AS i ON i.item = u.item
WHERE u.hash = ? AND u.item > ? AND i.hash = u.hash AND i.image >= 0 AND i.state = '{ItemState.OK}' AND {_NOT_SEEN}
ORDER BY u.item LIMIT {_MOST_CANDIDATES}
"""


class Scan:
    """One scan on the writer's connection; `path` is the database file, for messages."""

    def __init__(self, connection: sqlite3.Connection, path: str) -> None:
        self._db, self._path = connection, path
        with sqlite_guard(path):
            connection.execute("DROP TABLE IF EXISTS temp.seen")
            connection.execute(
                "CREATE TEMP TABLE seen (root BLOB, name BLOB, path BLOB, size INTEGER, mtime_ns INTEGER,"
                " ctime_ns INTEGER, captions TEXT, metadata TEXT, PRIMARY KEY (root, name)) WITHOUT ROWID"
            )
            # What was not seen, hash by hash as they are asked for; item 0 says that a hash was.
            connection.execute("DROP TABLE IF EXISTS temp.unseen")
            connection.execute(
                "CREATE TEMP TABLE unseen (hash BLOB, item INTEGER, PRIMARY KEY (hash, item)) WITHOUT ROWID"
            )

    def seen(self, sources: Iterable[Source]) -> int:
        """Note sources as they come; of two with one (root, name) the first counts."""
        new, stream = 0, iter(sources)
        while page := [_seen_row(source) for source in itertools.islice(stream, _PAGE)]:
            with sqlite_guard(self._path):
                self._db.execute("BEGIN")
                try:
                    cursor = self._db.executemany(
                        "INSERT OR IGNORE INTO temp.seen VALUES (?, ?, ?, ?, ?, ?, ?, ?)", page
                    )
                    new += cursor.rowcount
                    self._db.execute("COMMIT")
                except BaseException:
                    self._db.execute("ROLLBACK")
                    raise
        return new

    def was_seen(self, known: Known) -> bool:
        """Whether the scan found that (root, name)."""
        with sqlite_guard(self._path):
            key = (os.fsencode(known.root), os.fsencode(known.name))
            found = self._db.execute("SELECT 1 FROM temp.seen WHERE root = ? AND name = ?", key).fetchone()
        return found is not None

    def find_moved(self, content_hash: bytes, *, after: int) -> list[Known]:
        """See `base.Store.find_moved`."""
        with sqlite_guard(self._path):
            asked = "SELECT 1 FROM temp.unseen WHERE hash = ? AND item = 0"
            if self._db.execute(asked, (content_hash,)).fetchone() is None:
                self._db.execute(_LIST_UNSEEN, (content_hash,))
            found = self._db.execute(_STILL_UNSEEN, (content_hash, after)).fetchall()
            first = found[0][0] if found else INT64_MAX
            passed = "DELETE FROM temp.unseen WHERE hash = ? AND item > ? AND item < ?"  # moved since, or not ok
            self._db.execute(passed, (content_hash, after, first))
        return [known_of(row, self._path) for row in found]

    def changes(self, retry: Collection[SkipReason]) -> Iterator[Change]:
        """What was found, each against what is known of it; skips for a reason in `retry` are CHANGED."""
        again = _PASSING.union(retry)
        last: tuple[bytes, bytes] = (b"", b"")
        while True:
            with sqlite_guard(self._path):
                page = self._db.execute(_PAGE_OF_SEEN, last).fetchall()
            if not page:
                return
            last = page[-1][:2]
            for row in page:
                yield self._change(row, again)

    def _change(self, row: tuple[Any, ...], again: Collection[SkipReason]) -> Change:
        source = _source(row[:_SEEN_WIDTH])
        if row[_SEEN_WIDTH] is None:
            return Change(ChangeKind.NEW, source, None)
        *known_row, read_ns, text_changed = row[_SEEN_WIDTH:]
        known = known_of(tuple(known_row), self._path)
        return Change(
            classify(source, known, read_ns=read_ns, text_changed=bool(text_changed), again=again),
            source,
            known,
            text_changed=bool(text_changed),
        )

    def gone(self, roots: Sequence[str], keep_below: Sequence[str]) -> Iterator[Change]:
        """Items of `roots` that were not found, except at or below the folders in `keep_below`."""
        kept = tuple(folder.rstrip("/") + "/" for folder in keep_below)
        for root in sorted(set(roots)):
            last = b""
            while True:
                with sqlite_guard(self._path):
                    page = self._db.execute(_PAGE_OF_GONE, (os.fsencode(root), last)).fetchall()
                if not page:
                    break
                for row in page:
                    known = known_of(row, self._path)
                    last = os.fsencode(known.name)
                    if not (kept and known.path is not None and (known.path + "/").startswith(kept)):
                        yield Change(ChangeKind.GONE, None, known)


def classify(
    source: Source, known: Known, *, read_ns: int, text_changed: bool, again: Collection[SkipReason]
) -> ChangeKind:
    """What a source that is known has become.

    `read_ns`: clock when it was last read or hashed. `again`: reasons for which a skip is tried again.
    """
    if source.path != known.path:
        return ChangeKind.CHANGED
    if known.state is ItemState.SKIPPED and known.reason in again:
        return ChangeKind.CHANGED
    now, then = encode_stamp(source.stamp), encode_stamp(known.stamp)
    if now[:2] != then[:2]:
        return ChangeKind.CHANGED
    if source.stamp is not None and (now[2] != then[2] or (now[1] or 0) >= read_ns - RACY_NS):
        return ChangeKind.SUSPECT
    if text_changed:
        # Nothing of a skipped item is indexed: new texts beside it give it another try.
        return ChangeKind.TEXT_CHANGED if known.state is ItemState.OK else ChangeKind.CHANGED
    return ChangeKind.UNCHANGED


def _seen_row(source: Source) -> tuple[Any, ...]:
    return (
        os.fsencode(source.root),
        os.fsencode(source.name),
        encode_path(source.path),
        *encode_stamp(source.stamp),
        *encode_texts(source.captions, source.metadata),
    )


def _source(row: tuple[Any, ...]) -> Source:
    root, name, path, size, mtime, ctime, captions, metadata = row
    return Source(
        root=os.fsdecode(root),
        name=os.fsdecode(name),
        path=None if path is None else os.fsdecode(path),
        stamp=None if size is None else Stamp(size, mtime, ctime),
        captions=decode_captions(captions),
        metadata=decode_metadata(metadata),
    )
