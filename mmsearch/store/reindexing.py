"""A new model for an index: its items encoded into a nested index, then one step that puts those rows in place.

    with IndexStore.open(path, write=True) as store, Reindexing.begin(store, model=..., ...) as work:
        for task in work.pending():
            ...                      # encode, work.fresh.commit(Batch(...)); see `nested_source`
        store = work.switch(settings=...)

Decisions:
- A nested item is known by the number of the item it stands for: numbers are never used again and survive moves, so
  that the index may be brought up to date between two runs. What is up to date is asked of both databases, never
  remembered: a run that was killed goes on from what was committed.
- The switch is one SQLite transaction of the index. The nested vector file gets a second name beside the old one before
  it (a hard link, or a copy where there are none): killed before the transaction, both indexes are as they were.
- A picture that changed since it was indexed is stored as it now is, and its item takes over hash, stamp and size with
  the row: a row never stands under another picture's hash, or copies of it would be wrong.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from mmsearch.errors import IndexDamagedError, IndexMismatchError, UsageError
from mmsearch.store import nested
from mmsearch.store.base import Batch, ItemState, Known
from mmsearch.store.directory import IndexStore
from mmsearch.store.disk import Disk, os_fault, sqlite_guard
from mmsearch.store.sqlite import ITEMS_NAME, KNOWN_COLUMNS, encode_json, known_of, write_meta
from mmsearch.store.vectors import file_name, wrong_blocks
from mmsearch.types import ModelIdentity, Preprocessing, Source

_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK, errno.EACCES}
_PAGE = 1000
_REMOVALS = 10_000
_PIECE = 1 << 20
_KEY = "f.root = x'' AND f.name = CAST(printf('%016d', i.item) AS BLOB)"
_NUMBER = "CAST(CAST(f.name AS TEXT) AS INTEGER)"
_UP_TO_DATE = f"""(
  i.state = '{ItemState.OK}' AND f.state = '{ItemState.OK}'
  AND f.captions = i.captions AND (f.image IS NULL) = (i.image IS NULL)
  AND (f.hash IS i.hash OR json_extract(f.metadata, '$.of') IS hex(i.hash))
)"""
_LACKING = f"""
FROM main.items AS i LEFT JOIN fresh.items AS f ON {_KEY}
WHERE i.item > ? AND i.state = '{ItemState.OK}' AND (f.item IS NULL OR NOT {_UP_TO_DATE})
"""
_FRESH_COLUMNS = KNOWN_COLUMNS.replace("i.", "f.")
_OUTDATED = f"""
SELECT f.item FROM fresh.items AS f LEFT JOIN main.items AS i ON i.item = {_NUMBER}
WHERE i.item IS NULL OR NOT {_UP_TO_DATE} ORDER BY f.item
"""
_CHANGED_FILE = ("hash", "size", "mtime_ns", "ctime_ns", "read_ns", "width", "height", "taken_at", "note")
_SWITCH = (
    f"DELETE FROM main.items AS i WHERE i.state = '{ItemState.OK}'"
    f" AND NOT EXISTS (SELECT 1 FROM fresh.items AS f WHERE {_KEY})",
    "DELETE FROM main.rows",
    "DELETE FROM main.dead",
    "DELETE FROM main.blocks",
    f"INSERT INTO main.rows (row, item, part) SELECT r.row, {_NUMBER}, r.part"
    " FROM fresh.rows AS r JOIN fresh.items AS f ON f.item = r.item ORDER BY r.row",
    "INSERT INTO main.dead (row, is_text) SELECT row, is_text FROM fresh.dead",
    "INSERT INTO main.blocks (first, count, is_text, xxh3) SELECT first, count, is_text, xxh3 FROM fresh.blocks",
    "UPDATE main.items SET image ="
    " (SELECT r.row FROM main.rows AS r WHERE r.item = items.item AND r.part IS NULL) WHERE state = 'ok'",
    f"UPDATE main.items AS i SET {', '.join(f'{name} = f.{name}' for name in _CHANGED_FILE)}"
    f" FROM fresh.items AS f WHERE {_KEY} AND f.hash IS NOT NULL AND f.hash IS NOT i.hash",
)


@dataclass(frozen=True, slots=True)
class Task:
    """An item to be encoded: as the index knows it, and as the nested one does (None: it has nothing of it)."""

    known: Known
    fresh: Known | None

    @property
    def same_picture(self) -> bool:
        """Whether the nested index has this very picture, so that only texts are to be encoded."""
        fresh = self.fresh
        if fresh is None or fresh.state is not ItemState.OK or fresh.has_image != self.known.has_image:
            return False
        return fresh.content_hash == self.known.content_hash or fresh.metadata.get("of") == _hex(self.known)

    @property
    def source(self) -> Source:
        """What to store it under in the nested index."""
        known = self.known
        metadata = {"id": known.id, "of": _hex(known)}
        path = known.path if known.has_image else None  # an item without a picture's row does not get one now
        return Source("", f"{known.item:016d}", path, known.stamp, known.captions, metadata)


def _hex(known: Known) -> str:
    return (known.content_hash or b"").hex().upper()


class Reindexing:
    """An index held for writing (`store`) and the one of another model that grows in it (`fresh`)."""

    def __init__(self, store: IndexStore, fresh: IndexStore) -> None:
        """Takes over `fresh`, opened for writing."""
        self.store, self.fresh = store, fresh
        self._writer = store._writing()
        self._attached = False
        items = os.path.join(fresh.path, ITEMS_NAME)
        with sqlite_guard(items):
            self._writer.db.hold(items)
        self._execute("ATTACH DATABASE ? AS fresh", os.fsencode(items))
        self._attached = True

    @classmethod
    def begin(
        cls, store: IndexStore, *, model: ModelIdentity, preprocessing: Preprocessing, settings: Mapping[str, Any]
    ) -> Self:
        """Begin, or go on with what was begun, for an index opened for writing. `settings`: of the index to be.

        Raises `UsageError` when it has that model already, `IndexMismatchError` when a reindexing with another model
        (or other item vectors) has begun, `IndexDamagedError` when what was begun cannot be used.
        """
        if store.model.same_space(model):
            raise UsageError(
                store.path, expected="another model than the index has", got=model.name,
                do="Name the new one with --model.",
            )  # fmt: skip
        folder, disk = nested.folder_of(store.path), store._writing().disk
        if not nested.is_there(store.path):
            fresh = IndexStore.create(folder, model=model, preprocessing=preprocessing, settings=settings, disk=disk)
            return cls._over(store, fresh)
        try:
            fresh = IndexStore.open(folder, write=True, repair=True, disk=disk)
        except IndexDamagedError as error:
            do = f"It is work in progress: 'mmsearch reindex {store.path} --abort' removes it."
            raise IndexDamagedError(error.where, expected=error.expected, got=error.got, do=do) from error
        wanted = settings.get("item_vectors")
        if not fresh.model.same_space(model) or fresh.settings.get("item_vectors") != wanted:
            fresh.close()
            raise IndexMismatchError(
                folder,
                expected=f"a reindexing with {model.name}" + (f", item vectors {wanted}" if wanted else ""),
                got=f"one that was begun with {fresh.model.name}",
                do="Go on with that one, or give it up with --abort first.",
            )
        return cls._over(store, fresh)

    @classmethod
    def _over(cls, store: IndexStore, fresh: IndexStore) -> Self:
        try:
            fresh.begin_scan()  # stamps are judged against the clock before any file is read
            return cls(store, fresh)
        except BaseException:
            fresh.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the nested index; what was committed to it stays. The store stays open."""
        if self._attached:
            self._execute("DETACH DATABASE fresh")
            self._attached = False
        self.fresh.close()

    def _execute(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with sqlite_guard(self._writer.items_path):
            return self._writer.db.execute(query, values).fetchall()

    def left(self) -> int:
        """How many items the nested index lacks, or has of another content or other captions."""
        return int(self._execute(f"SELECT count(*) {_LACKING}", 0)[0][0])

    def items(self) -> int:
        """How many items the index has, those that `left` counts among them."""
        return int(self._execute("SELECT count(*) FROM main.items WHERE state = ?", ItemState.OK.value)[0][0])

    def pending(self) -> Iterator[Task]:
        """Those items, each once, in pages; `fresh` may be committed to meanwhile."""
        query = f"SELECT {KNOWN_COLUMNS}, {_FRESH_COLUMNS} {_LACKING} ORDER BY i.item LIMIT {_PAGE}"
        where, width, last = self._writer.items_path, len(KNOWN_COLUMNS.split(", ")), 0
        while page := self._execute(query, last):
            for row in page:
                fresh = known_of(row[width:], where) if row[width] is not None else None
                yield Task(known_of(row[:width], where), fresh)
            last = page[-1][0]

    def switch(self, *, settings: Mapping[str, Any], drop: int = 0) -> IndexStore:
        """Put the new rows in place in one durable step, remove the nested index and return the index, still open.

        Ids, roots, names, captions, metadata and remembered skips stay; so do stamps, except of files that changed.
        `drop`: so many items that the nested index lacks may be removed; `UsageError` when it lacks more.
        The store that this was begun with is closed for its caller: the one returned has its lock.
        """
        lacking = self.left()
        if lacking > drop:
            raise UsageError(
                self.store.path, expected=f"at most {drop} items not encoded", got=str(lacking),
                do="Run the same command again: something changed meanwhile.",
            )  # fmt: skip
        self._remove_outdated()
        self.fresh.compact()
        facts = self.fresh._facts()
        self.fresh.close()
        name = self._put_vectors_beside(facts)
        with self._writer.transaction() as db:
            for statement in _SWITCH:
                db.execute(statement)
            new = {key: facts[key] for key in ("rows", "dim", "model", "preprocessing")}
            write_meta(db, {**new, "vectors": name, "settings": encode_json(dict(settings))})
        self.close()
        self._writer.finish({})  # which removes the old rows, what was made of them, and the nested index
        self.store._writer = None
        return IndexStore(self.store.path, writer=self._writer, meta=self._writer.facts())

    def _remove_outdated(self) -> None:
        """So that what the nested index holds is what the index is to hold."""
        gone = [item for (item,) in self._execute(_OUTDATED)]
        for start in range(0, len(gone), _REMOVALS):
            self.fresh.commit(Batch(removals=gone[start : start + _REMOVALS]))

    def _put_vectors_beside(self, facts: Mapping[str, Any]) -> str:
        """The name that the nested vector file now has in the index, too."""
        source = os.path.join(self.fresh.path, str(facts["vectors"]))
        blocks = self._execute("SELECT first, count, xxh3 FROM fresh.blocks ORDER BY first")
        for first, count, _ in wrong_blocks(source, blocks, dim=int(facts["dim"])):
            got = f"rows {first} to {first + count - 1} that are not those written"
            raise IndexDamagedError(source, got=got, do=nested.REPAIR)
        name = file_name(int(self._writer.facts()["generation"]) + 1)
        link_or_copy(self._writer.disk, source, os.path.join(self.store.path, name))
        return name


def link_or_copy(disk: Disk, source: str, target: str) -> None:
    """Give a file a second name, durably; where the file system has no hard links, a copy of its own."""
    disk.remove(target)
    try:
        disk.step("link", target)
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise os_fault(error, target) from error
        disk.put(target, _pieces(source), need=os.path.getsize(source))
    disk.sync_dir(os.path.dirname(target))


def _pieces(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            yield piece


def abort(path: str, *, disk: Disk | None = None) -> bool:
    """Give up the reindexing that has begun for the index at `path`; whether there was one.

    Raises `IndexNotFoundError`, `IndexLockedError` while somebody writes (or reindexes).
    """
    with IndexStore.open(path, write=True, disk=disk) as store:
        return nested.discard(store.path, store._writing().disk)
