"""The index directory: the public face of the store.

    with IndexStore.open("indexes/photos") as store, store.snapshot() as snapshot:
        snapshot.alive_rows(Modality.IMAGE)

Decisions:
- Opening for reading changes no content, and works where nothing can be written; opening for writing
  repairs nothing unless asked to.
- `create` puts the files of an index into an empty folder. Killed half way, it leaves something that
  counts as no index, and that the next `create` takes over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

from mmsearch.errors import IndexDamagedError, IndexMismatchError, IndexNotFoundError, StoreError, UsageError
from mmsearch.store import check, creation, upkeep
from mmsearch.store import settings as settings_of
from mmsearch.store.base import Batch, Change, DerivedWriter, ItemState, Known, Problem
from mmsearch.store.disk import REBUILD, Disk, os_guard, sqlite_guard
from mmsearch.store.facts import facts_of
from mmsearch.store.lock import WriterLock
from mmsearch.store.manifest import FORMAT, preprocessing_from, read_manifest
from mmsearch.store.migrations import check_format
from mmsearch.store.snapshot import DirectorySnapshot
from mmsearch.store.sqlite import (
    ITEMS_NAME,
    KNOWN_COLUMNS,
    ReaderConnection,
    known_of,
    read_meta,
)
from mmsearch.store.writer import Writer
from mmsearch.types import NO_METADATA, ModelIdentity, Preprocessing, SkipReason, Source


class IndexStore:
    """See `base.Store`. A context manager: leaving it closes the store, without `finish`."""

    def __init__(self, path: str, *, writer: Writer | None, meta: Mapping[str, Any], repaired: int = 0) -> None:
        self.path, self._writer, self.repaired = path, writer, repaired
        items = os.path.join(path, ITEMS_NAME)
        try:
            self.model = ModelIdentity(**_json(meta["model"]))
            self.preprocessing = preprocessing_from(_json(meta["preprocessing"]))
            self.settings: Mapping[str, Any] = _json(meta["settings"])
            self.dim = int(meta["dim"])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise IndexDamagedError(items, got=f"facts that cannot be read ({error!r})", do=REBUILD) from error

    @classmethod
    def exists(cls, path: str) -> bool:
        """Whether there is an index at `path` (also a damaged one). A creation that was killed is none."""
        return creation.exists(path)

    @classmethod
    def stored_settings(cls, path: str) -> Mapping[str, Any]:
        """The settings of the index at `path`, whatever became of its rows and its manifest.

        Raises `IndexNotFoundError`, `IndexDamagedError` when items.sqlite cannot be read, `IndexMismatchError`.
        """
        path = os.path.abspath(path)
        with os_guard(path):
            return settings_of.stored_settings(path)

    @classmethod
    def create(
        cls,
        path: str,
        *,
        model: ModelIdentity,
        preprocessing: Preprocessing,
        settings: Mapping[str, Any] = NO_METADATA,
        disk: Disk | None = None,
    ) -> Self:
        """A new, empty index at `path` (made if need be), opened for writing.

        Raises `StoreError` when there is an index or anything else, `ResourceError`, `IndexLockedError`.
        """
        path, disk = os.path.abspath(path), disk or Disk()
        with os_guard(path):
            return cls._create(path, disk, creation.first_facts(model, preprocessing, settings))

    @classmethod
    def _create(cls, path: str, disk: Disk, facts: Mapping[str, Any]) -> Self:
        disk.make_dir(path)
        lock = WriterLock(path)
        lock.acquire()
        try:
            creation.clear_half_made(path, disk)
            creation.make_files(path, disk, facts)
            writer = Writer(path, disk=disk, lock=lock)
        except BaseException:
            lock.release()
            raise
        try:
            writer.finish()
            return cls(path, writer=writer, meta=writer.facts())
        except BaseException:
            writer.close()
            raise

    @classmethod
    def open(
        cls,
        path: str,
        *,
        write: bool = False,
        repair: bool = False,
        model: ModelIdentity | None = None,
        disk: Disk | None = None,
    ) -> Self:
        """Open the index at `path`, to read or (`write`) as its one writer.

        `model`: refused with `IndexMismatchError` unless its rows can be compared with the index's.
        `repair` (with `write`): items whose stored rows are damaged are removed, `repaired` says how
        many, so that a scan finds them NEW; without it damage to rows that is noticed raises.
        Raises `IndexNotFoundError`, `IndexDamagedError`, `IndexMismatchError`, `IndexLockedError`.
        """
        path = os.path.abspath(path)
        with os_guard(path):
            return cls._open(path, write=write, repair=repair, model=model, disk=disk or Disk())

    @classmethod
    def _open(cls, path: str, *, write: bool, repair: bool, model: ModelIdentity | None, disk: Disk) -> Self:
        if not cls.exists(path):
            raise settings_of.no_index(path)
        if not os.path.exists(os.path.join(path, ITEMS_NAME)):
            raise settings_of.no_items(path)
        _bring_up_to_date(path, disk, write=write)
        store = cls._open_writer(path, disk, repair=repair) if write else cls._open_reader(path)
        if model is not None and not store.model.same_space(model):
            store.close()
            raise _other_model(path, store.model, model)
        return store

    @classmethod
    def replace(
        cls,
        path: str,
        *,
        model: ModelIdentity,
        preprocessing: Preprocessing,
        settings: Mapping[str, Any] = NO_METADATA,
        disk: Disk | None = None,
    ) -> Self:
        """Empty the index at `path` and give it to another model, in one durable step; opened for writing.

        Until that step the old index is whole. `created_at` and the generation count go on.
        """
        path = os.path.abspath(path)
        store = cls._open_writer(path, disk or Disk(), repair=True)
        writer = store._writing()
        try:
            upkeep.clear(writer, creation.first_facts(model, preprocessing, settings))
            return cls(path, writer=writer, meta=writer.facts())
        except BaseException:
            writer.close()
            raise

    @classmethod
    def _open_reader(cls, path: str) -> Self:
        with check.quick_check(path) as snapshot:
            return cls(path, writer=None, meta=snapshot.meta)

    @classmethod
    def _open_writer(cls, path: str, disk: Disk, *, repair: bool) -> Self:
        lock = WriterLock(path)
        lock.acquire()
        try:
            writer = Writer(path, disk=disk, lock=lock)
        except BaseException:
            lock.release()
            raise
        try:
            writer.settle_vectors(extend=repair)
            repaired = upkeep.drop_damaged(writer) if repair else 0
            writer.tidy()
            return cls(path, writer=writer, meta=writer.facts(), repaired=repaired)
        except BaseException:
            writer.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back. What was committed stays whether or not `finish` was called."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    @property
    def generation(self) -> int:
        """The newest committed generation."""
        return int(self._facts()["generation"])

    @property
    def row_count(self) -> int:
        """Committed rows, dead ones included."""
        return int(self._facts()["rows"])

    def _facts(self) -> dict[str, Any]:
        if self._writer is not None:
            return self._writer.facts()
        items = os.path.join(self.path, ITEMS_NAME)
        reader = ReaderConnection(items)
        try:
            with sqlite_guard(items):
                return read_meta(reader.db)
        finally:
            reader.close()

    def _writing(self) -> Writer:
        if self._writer is None:
            raise UsageError(self.path, expected="an index opened with write=True", got="one to read or closed")
        return self._writer

    def snapshot(self) -> DirectorySnapshot:
        """The newest generation, to read from; close it."""
        with os_guard(self.path):
            return DirectorySnapshot(self.path)

    def begin_scan(self) -> None:
        """Forget what was seen; stamps recorded from now on are judged against this moment's clock."""
        self._writing().begin_scan()

    def seen(self, sources: Iterable[Source]) -> int:
        """Note what a reader found, streaming; returns how many were new to this scan."""
        return self._writing().current_scan().seen(sources)

    def changes(
        self, *, scanned_roots: Sequence[str], keep_below: Sequence[str] = (), retry: Collection[SkipReason] = ()
    ) -> Iterator[Change]:
        """What differs, in order of (root, name), then what is gone; see `base.Store.changes`."""
        scan = self._writing().current_scan()
        yield from scan.changes(retry)
        yield from scan.gone(scanned_roots, keep_below)

    def was_seen(self, known: Known) -> bool:
        """Whether this scan found a source with that item's (root, name)."""
        return self._writing().current_scan().was_seen(known)

    def known_size(self, size: int) -> bool:
        """Whether any item's file has this size in bytes."""
        return bool(self._query("SELECT 1 FROM items WHERE size = ? LIMIT 1", size))

    def find_content(self, content_hash: bytes) -> list[Known]:
        """Items made of a file with this hash, oldest first."""
        found = self._query(f"SELECT {KNOWN_COLUMNS} FROM items AS i WHERE i.hash = ? ORDER BY i.item", content_hash)
        return [known_of(row, self._writing().items_path) for row in found]

    def find_moved(self, content_hash: bytes, *, after: int = 0) -> list[Known]:
        """At most 16 items with a picture of this hash that the scan did not find; see `base.Store.find_moved`."""
        return self._writing().current_scan().find_moved(content_hash, after=after)

    def find_copy(self, content_hash: bytes) -> Known | None:
        """Any one item with a picture of this hash."""
        return self._find("i.hash = ? AND i.image >= 0 AND i.state = ?", content_hash, ItemState.OK.value)

    def find(self, root: str, name: str) -> Known | None:
        """The item of that (root, name)."""
        return self._find("i.root = ? AND i.name = ?", os.fsencode(root), os.fsencode(name))

    def _find(self, where: str, *values: object) -> Known | None:
        found = self._query(f"SELECT {KNOWN_COLUMNS} FROM items AS i WHERE {where} LIMIT 1", *values)
        return known_of(found[0], self._writing().items_path) if found else None

    def _query(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        writer = self._writing()
        with sqlite_guard(writer.items_path):
            return writer.db.execute(query, values).fetchall()

    def commit(self, batch: Batch) -> None:
        """Make the batch durable: rows appended and synced, then one SQLite transaction. All or nothing."""
        self._writing().commit(batch)

    def note_settings(self, settings: Mapping[str, Any]) -> None:
        """Replace the stored settings in one durable step; nothing happens when they are the same."""
        settings_of.note_settings(self._writing(), settings)
        self.settings = _json(self._facts()["settings"])

    def update_derived(self, writer: DerivedWriter) -> None:
        """Bring derived files up to date with the committed rows, and write the manifest."""
        upkeep.update_derived(self._writing(), writer)

    def compact(self, *, share: float = 0.3, at_least: int = 1000) -> bool:
        """Rewrite the rows without dead ones when they are more than `share` of at least that many rows."""
        return upkeep.compact(self._writing(), share=share, at_least=at_least)

    def finish(self) -> None:
        """Write the manifest to match the committed generation, and remove leftovers."""
        self._writing().finish()

    def verify(self) -> list[Problem]:
        """Check every file against what was recorded; an empty list means that all is well."""
        return check.verify(self.path)

    def info(self) -> dict[str, Any]:
        """What is in the index: JSON values, sizes in bytes."""
        with self.snapshot() as snapshot:
            return facts_of(self.path, snapshot)


def verify(path: str) -> list[Problem]:
    """`IndexStore.verify` for an index that may be too damaged to open."""
    path = os.path.abspath(path)
    if not IndexStore.exists(path):
        raise IndexNotFoundError(path, expected="an index", got="none", do="Name another.")
    return check.verify(path)


def _json(text: str) -> Any:  # noqa: ANN401 - JSON is what it is
    return json.loads(text)


def _bring_up_to_date(path: str, disk: Disk, *, write: bool) -> None:
    """An index of an older format, opened to read, is migrated first; a writer does it by itself."""
    read_manifest_format(path)
    if write:
        return
    items = os.path.join(path, ITEMS_NAME)
    reader = ReaderConnection(items)
    try:
        with sqlite_guard(items):
            found = check_format(reader.db, items)
    finally:
        reader.close()
    if found < FORMAT:
        IndexStore._open_writer(path, disk, repair=False).close()


def read_manifest_format(path: str) -> None:
    """Refuse a newer format, whatever else is wrong with the manifest."""
    try:
        read_manifest(path)
    except IndexMismatchError:
        raise
    except StoreError:
        return  # judged by whoever opens it: a reader refuses, a writer writes it anew


def _other_model(path: str, has: ModelIdentity, got: ModelIdentity) -> IndexMismatchError:
    def shown(model: ModelIdentity) -> str:
        return f"{model.name} (weights {model.weights}, preprocessing {model.preprocessing}, dim {model.dim})"

    return IndexMismatchError(
        path,
        expected=f"the model it was made with, {shown(has)}",
        got=shown(got),
        do="Use that model, or build another index with this one.",
    )
