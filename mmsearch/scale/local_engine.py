"""An index directory as an engine: `file:///indexes/photos`. What the others are compared with, and what a shard holds.

Decisions:
- Searching is that of `index.derived`, whatever kind the index has; a filter becomes the rows that may be returned.
- Scores are summed again row by row, and equal ones ordered by id: so they do not depend on how many rows lie beside.
- A generation that somebody else makes is noticed by the manifest's time, and looked at from the next search on.
- The index is opened for writing by the first change, and held until `release` or `close`: one writer, as everywhere.
- Items that were pushed lie under a root of their own. `mmsearch index` leaves those alone, as no folder has that name.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Self
from urllib.parse import unquote_to_bytes

import numpy as np

from mmsearch.errors import UsageError
from mmsearch.index.base import NeighbourIndex, check_k
from mmsearch.index.derived import neighbours
from mmsearch.scale.address import Address
from mmsearch.scale.engine import Answer, Collection, Entry, Items, answer_of, best, check_entries, refuse_other_model
from mmsearch.similarity import check_embeddings
from mmsearch.store import listing
from mmsearch.store.base import Batch, Upsert
from mmsearch.store.directory import IndexStore
from mmsearch.store.filtered import FilteredRows
from mmsearch.store.manifest import MANIFEST_NAME
from mmsearch.store.settings import PUSHED
from mmsearch.store.snapshot import DirectorySnapshot
from mmsearch.types import Embeddings, Modality, Rows, Source
from mmsearch.where import Where

_SPARE = 8


class LocalEngine:
    """See `engine.Engine`."""

    files_are_here = True
    most_bytes: int | None = None

    def __init__(self, path: str) -> None:
        self.where = path
        self._lock = threading.RLock()
        self._store = IndexStore.open(path)
        self._writing = False
        self.collection = Collection(self._store.model, self._store.preprocessing, self._store.settings)
        self._look()

    @classmethod
    def open(cls, address: Address, *, create: Collection | None = None) -> Self:
        """See `engine.Engine.open`."""
        address.refuse_other_options(set())
        if address.parts.netloc not in ("", "localhost"):
            raise UsageError(address.shown, expected="file:///path/of/an/index", got="a host")
        path = os.fsdecode(unquote_to_bytes(address.parts.path))  # a file's name is bytes
        if create is not None and not IndexStore.exists(path):
            IndexStore.create(
                path, model=create.model, preprocessing=create.preprocessing, settings=dict(create.settings)
            ).close()
        engine = cls(path)
        try:
            if create is not None:
                refuse_other_model(engine.collection.model, create.model, where=path)
        except BaseException:
            engine.close()
            raise
        return engine

    def _look(self) -> None:
        """Look at the newest generation."""
        self._seen = self._manifest_time()
        self._snapshot: DirectorySnapshot = self._store.snapshot()
        self._model = self._snapshot.model
        self._indexes: dict[Modality, NeighbourIndex] = {}
        self._filtered = FilteredRows(self._snapshot)

    def _manifest_time(self) -> int:
        try:
            return os.stat(os.path.join(self.where, MANIFEST_NAME)).st_mtime_ns
        except OSError:
            return -1  # it is being replaced, or gone: what is open stays open

    def _look_again(self) -> None:
        """Let go of a generation that is not the newest any more. Raises `IndexMismatchError` for another model's."""
        if self._manifest_time() not in (-1, self._seen):
            self._snapshot.close()
            self._look()
        refuse_other_model(self.collection.model, self._model, where=self.where)

    def upsert(self, entries: Sequence[Entry]) -> None:
        """See `engine.Engine.upsert`. An item that was there keeps its place in the index."""
        check_entries(entries, dim=self._store.dim, where=self.where)
        with self._lock:
            known = listing.by_ids(self._snapshot, (entry.item.id for entry in entries))
            self._commit(Batch(upserts=[_upsert(entry, known.get(entry.item.id)) for entry in entries]))

    def delete(self, ids: Sequence[str]) -> None:
        """See `engine.Engine.delete`."""
        with self._lock:
            self._commit(Batch(removals=[one.number for one in listing.by_ids(self._snapshot, ids).values()]))

    def _commit(self, batch: Batch) -> None:
        if not len(batch):
            return
        self._write().commit(batch)
        self._snapshot.close()
        self._look()

    def _write(self) -> IndexStore:
        if not self._writing:
            writer = IndexStore.open(self.where, write=True, model=self.collection.model)
            self._store.close()
            self._store, self._writing = writer, True
        return self._store

    def search(self, queries: Embeddings, k: int, *, modality: Modality, where: Where = ()) -> Answer:
        """See `engine.Engine.search`."""
        with self._lock:
            queries = check_embeddings(queries, dim=self._store.dim, where="query")
            check_k(k, len(queries))
            self._look_again()
            allowed = self._filtered.rows(modality, where) if where else None
            width = min(k + _SPARE, self._snapshot.count(modality) if allowed is None else len(allowed))
            if not width:
                return answer_of([[] for _ in queries], k)
            _, rows = self._index(modality).search(queries, width, allowed=allowed)
            lists = [self._scored(query, found[found >= 0], k) for query, found in zip(queries, rows, strict=True)]
            return answer_of(lists, k)

    def _scored(self, query: np.ndarray, rows: Rows, k: int) -> list[tuple[float, str, int]]:
        """(score, id, part) of rows, best first. One row's sum never depends on its neighbours in the array."""
        scores = (self._snapshot.vectors(rows) * query).sum(axis=1, dtype=np.float32)
        located = self._snapshot.locate(rows)
        parts = self._parts(rows)
        return best([(float(s), one.item.id, p) for s, one, p in zip(scores, located, parts, strict=True)], k)

    def _parts(self, rows: Rows) -> list[int]:
        found = listing.parts_of(self._snapshot, rows)
        return [found[int(row)] for row in rows]

    def _index(self, modality: Modality) -> NeighbourIndex:
        if modality not in self._indexes:
            self._indexes[modality] = neighbours(self._snapshot, modality)
        return self._indexes[modality]

    def fetch(self, ids: Sequence[str]) -> Items:
        """See `engine.Engine.fetch`."""
        with self._lock:
            self._look_again()
            return Items({name: one.item for name, one in listing.by_ids(self._snapshot, ids).items()})

    def known(self, ids: Sequence[str]) -> list[str]:
        """Which of these items are there."""
        with self._lock:
            self._look_again()
            return sorted(listing.known_ids(self._snapshot, ids))

    def digests(self, ids: Sequence[str]) -> dict[str, str]:
        """See `engine.Engine.digests`. Made from the rows, so that they are right whoever wrote them."""
        with self._lock:
            self._look_again()
            found = list(listing.by_ids(self._snapshot, ids).values())
            return {entry.item.id: entry.digest() for entry in entries_of(self._snapshot, found)}

    def ids(self) -> Iterator[list[str]]:
        """See `engine.Engine.ids`."""
        last = -1
        while page := self.page_of_ids(last):
            last = page[-1][0]
            yield [name for _, name in page]

    def page_of_ids(self, after: int) -> list[tuple[int, str]]:
        """Some (number, id) of items above a number, in order; none at the end."""
        with self._store.snapshot() as snapshot:
            return [(one.number, one.item.id) for one in next(listing.pages(snapshot, after=after), [])]

    def count(self, modality: Modality) -> int:
        """See `engine.Engine.count`."""
        with self._lock:
            self._look_again()
            return self._snapshot.count(modality)

    def mark(self) -> str:
        """See `engine.Engine.mark`."""
        with self._lock:
            stored = self._store.settings if self._writing else IndexStore.stored_settings(self.where)
            return str(stored.get(PUSHED, ""))

    def set_mark(self, mark: str) -> None:
        """See `engine.Engine.set_mark`."""
        with self._lock:
            store = self._write()  # before the settings are read: others may have written until then
            store.note_settings({**store.settings, PUSHED: mark})

    def finish(self) -> list[str]:
        """See `engine.Engine.finish`. Derived files are completed by searching the rows that they lack."""
        with self._lock:
            self._write().finish()
        return []

    def release(self) -> None:
        """Give the lock back between changes. What was changed stays; derived files wait for `finish`."""
        with self._lock:
            if self._writing:
                self._store.close()
                self._writing = False

    def info(self) -> dict[str, Any]:
        """See `engine.Engine.info`."""
        return self._store.info()

    def close(self) -> None:
        """See `engine.Engine.close`."""
        with self._lock:
            self._indexes.clear()
            self._snapshot.close()
            self._store.close()


def entries_of(snapshot: DirectorySnapshot, listed: Sequence[listing.Listed]) -> list[Entry]:
    """Stored items with their rows as float32; the rows of all of them are read at once."""
    wanted = [row for one in listed for row in one.rows()]
    rows = snapshot.vectors(np.array(wanted, np.int64))
    entries, first = [], 0
    for one in listed:
        with_image, stop = one.image is not None, first + len(one.rows())
        texts = rows[first + with_image : stop]
        entries.append(Entry(one.item, rows[first] if with_image else None, texts, tuple(p for p, _ in one.texts)))
        first = stop
    return entries


def _upsert(entry: Entry, known: listing.Listed | None) -> Upsert:
    """What the store is told: the item at the place that it had, or at one of its own."""
    item = entry.item
    root, name = (PUSHED, item.id) if known is None else (os.fsdecode(known.root), os.fsdecode(known.name))
    return Upsert(
        Source(root, name, item.path, None, item.captions, item.metadata),
        width=item.width,
        height=item.height,
        taken_at=item.taken_at,
        image_vector=entry.image,
        text_vectors=entry.texts if len(entry.texts) else None,
        text_parts=entry.parts if len(entry.texts) else None,
        id=item.id,
    )
