"""What a reader sees: one generation, held by a read transaction and a mapping of its vector file.

Decisions:
- The manifest is read before the transaction begins, so it is never ahead of what is read (unless
  files of different generations were mixed, which is refused).
- Compaction may remove the vector file between the two: then the snapshot is begun again.
- A snapshot may be shared by threads; SQL runs under a lock, mapped rows need none.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import IndexDamagedError, UsageError
from mmsearch.store.base import Derived, ItemState, Known, Located
from mmsearch.store.checksums import is_intact
from mmsearch.store.disk import REBUILD, sqlite_guard
from mmsearch.store.manifest import Manifest, read_manifest, refuse_mixed
from mmsearch.store.migrations import check_format
from mmsearch.store.sqlite import (
    ITEM_COLUMNS,
    ITEMS_NAME,
    KNOWN_COLUMNS,
    ReaderConnection,
    is_text,
    item_of,
    known_of,
    read_meta,
)
from mmsearch.store.vectors import VectorFile
from mmsearch.types import Embeddings, Modality, ModelIdentity, Rows
from mmsearch.where import Where

_TRIES = 5
_PAGE = 1000


class DirectorySnapshot:
    """See `base.Snapshot`."""

    def __init__(self, folder: str, *, lenient: bool = False) -> None:
        """`lenient`: a damaged manifest is passed over (a writer rewrites it, `verify` reports it)."""
        self._folder, self._items = folder, os.path.join(folder, ITEMS_NAME)
        self._lock = threading.RLock()
        for left in reversed(range(_TRIES)):
            try:
                self._begin(lenient=lenient)
                break
            except FileNotFoundError as error:
                if left == 0:
                    raise IndexDamagedError(
                        str(error.filename), expected="the file with the rows", got="no such file", do=REBUILD
                    ) from error

    def _begin(self, *, lenient: bool) -> None:
        self.manifest: Manifest | None = None
        try:
            self.manifest = read_manifest(self._folder)
        except IndexDamagedError:
            if not lenient:
                raise
        self._reader = ReaderConnection(self._items)
        try:
            with sqlite_guard(self._items):
                self._reader.db.execute("BEGIN")
                check_format(self._reader.db, self._items)
                self.meta = read_meta(self._reader.db)
            self._read_facts(self.meta)
            self._vectors = VectorFile(self.vectors_path, dim=self.dim, rows=self.row_count)
        except BaseException:
            self._reader.close()
            raise
        try:
            refuse_mixed(self.manifest, self.generation, self._items)
        except IndexDamagedError:
            self.close()
            raise

    def _read_facts(self, meta: dict[str, Any]) -> None:
        try:
            self.generation, self.row_count = int(meta["generation"]), int(meta["rows"])
            self.dim, self.vectors_name = int(meta["dim"]), str(meta["vectors"])
            inside = os.path.basename(self.vectors_name) == self.vectors_name and self.vectors_name not in ("", "..")
            if self.row_count < 0 or self.dim < 1 or not inside:
                raise ValueError("numbers or names that cannot be")
        except (KeyError, ValueError, TypeError) as error:
            raise IndexDamagedError(self._items, got=f"facts that cannot be ({error!r})", do=REBUILD) from error

    @property
    def model(self) -> ModelIdentity:
        """The model whose rows this generation holds."""
        try:
            return ModelIdentity(**self.fact("model"))
        except TypeError as error:
            raise IndexDamagedError(self._items, got=f"no readable model ({error!r})", do=REBUILD) from error

    @property
    def vectors_path(self) -> str:
        """The vector file of this generation."""
        return os.path.join(self._folder, self.vectors_name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the generation."""
        with self._lock:
            self._reader.close()

    def execute(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of one query at this generation."""
        with self._lock, sqlite_guard(self._items):
            return self._reader.db.execute(query, values).fetchall()

    def fact(self, key: str) -> Any:  # noqa: ANN401 - JSON is what it is
        """A fact of `meta` that is stored as JSON."""
        try:
            return json.loads(self.meta[key])
        except (KeyError, ValueError, TypeError) as error:
            raise IndexDamagedError(self._items, got=f"no readable {key} ({error!r})", do=REBUILD) from error

    def ranges(self, modality: Modality) -> list[tuple[int, int]]:
        """Sorted half-open ranges of rows of that modality, dead ones included; neighbours are joined."""
        joined: list[tuple[int, int]] = []
        query = "SELECT first, count FROM blocks WHERE is_text = ? ORDER BY first"
        for first, count in self.execute(query, (is_text(modality),)):
            if joined and joined[-1][1] == first:
                joined[-1] = (joined[-1][0], first + count)
            else:
                joined.append((first, first + count))
        if joined and joined[-1][1] > self.row_count:
            raise IndexDamagedError(self._items, expected=f"{self.row_count} rows", got=str(joined[-1][1]), do=REBUILD)
        return joined

    def dead_rows(self, modality: Modality) -> Rows:
        """Sorted rows that must not be returned. (n,) int64."""
        found = self.execute("SELECT row FROM dead WHERE is_text = ? ORDER BY row", (is_text(modality),))
        return np.fromiter((row for (row,) in found), np.int64, len(found))

    def rows_where(self, modality: Modality, where: Where) -> Rows:
        """Sorted rows of that modality whose items fulfil all conditions. (n,) int64."""
        from mmsearch.store.listing import rows_where

        return rows_where(self, modality, where)

    def alive_rows(self, modality: Modality) -> Rows:
        """Sorted rows of items that are there. (n,) int64."""
        pieces = [np.arange(start, stop, dtype=np.int64) for start, stop in self.ranges(modality)]
        rows: Rows = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
        dead = self.dead_rows(modality)
        return rows if not len(dead) else rows[~np.isin(rows, dead, assume_unique=True)]

    def count(self, modality: Modality) -> int:
        """How many rows are alive."""
        total = sum(stop - start for start, stop in self.ranges(modality))
        return total - int(self.execute("SELECT count(*) FROM dead WHERE is_text = ?", (is_text(modality),))[0][0])

    def block(self, start: int, stop: int) -> NDArray[np.float16]:
        """Rows start..stop as stored, a view of the mapped file."""
        return self._vectors.block(start, stop)

    def scattered(self) -> NDArray[np.float16]:
        """Every row of the file as stored, (rows, d), for picking some: see `VectorFile.scattered`."""
        return self._vectors.scattered()

    def vectors(self, rows: Rows) -> Embeddings:
        """(n,) -> (n, d) float32."""
        wanted = np.asarray(rows, dtype=np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= self.row_count):
            raise UsageError("rows", expected=f"0 to {self.row_count - 1}", got=f"{wanted.min()} to {wanted.max()}")
        return self._vectors.gather(wanted)

    def derived(self, modality: Modality) -> Derived | None:
        """The derived file recorded for this vector file; None when there is none that fits."""
        found = None if self.manifest is None else self.manifest.derived.get(modality.value)
        if found is None or found.vectors != self.vectors_name or found.rows > self.row_count:
            return None
        return found

    def take(self, rows: Rows) -> NDArray[np.float16]:
        """(n,) -> (n, d) as stored, a copy."""
        return self._vectors.take(rows)

    def read(self, rows: Rows) -> NDArray[np.float16]:
        """As `take`, for whoever goes through all rows in order: read, not mapped."""
        return self._vectors.read(rows)

    def intact(self, derived: Derived) -> str | None:
        """The path of a derived file whose size and checksum are those recorded (see `checksums.is_intact`)."""
        path = os.path.join(self._folder, derived.file)
        return path if is_intact(path, derived, thorough=False) else None

    def locate(self, rows: Rows | Sequence[int]) -> list[Located]:
        """What rows stand for, in the order asked for."""
        wanted = [int(row) for row in rows]
        query = (
            f"SELECT r.row, r.part, {ITEM_COLUMNS} FROM json_each(?) AS w"
            " JOIN rows AS r ON r.row = w.value JOIN items AS i ON i.item = r.item"
        )
        found = {row[0]: row for row in self.execute(query, (json.dumps(sorted(set(wanted))),))}
        return [self._located(found.get(row), row) for row in wanted]

    def _located(self, found: tuple[Any, ...] | None, row: int) -> Located:
        if found is None:
            raise UsageError("row", expected="a row of an item that is there", got=str(row))
        part = found[1]
        item = item_of(found[2:], self._items)
        if part is None:
            return Located(row, item, Modality.IMAGE)
        if not 0 <= part < len(item.captions):
            raise IndexDamagedError(self._items, expected=f"caption {part} of {item.id}", got="none", do=REBUILD)
        return Located(row, item, Modality.TEXT, item.captions[part])

    def content_hashes(self, rows: Rows | Sequence[int]) -> list[bytes | None]:
        """The content hash of each row's item; see `base.Snapshot.content_hashes`."""
        wanted = [int(row) for row in rows]
        query = (
            "SELECT r.row, i.hash FROM json_each(?) AS w JOIN rows AS r ON r.row = w.value"
            " JOIN items AS i ON i.item = r.item WHERE i.hash IS NOT NULL"
        )
        found: dict[int, bytes] = dict(self.execute(query, (json.dumps(sorted(set(wanted))),)))
        return [found.get(row) for row in wanted]

    def pictures(self) -> Iterator[tuple[bytes, str]]:
        """(content hash, path) of every item with a picture file, in pages; see `base.Snapshot.pictures`."""
        query = (
            "SELECT hash, image, item, path FROM items WHERE hash IS NOT NULL AND image IS NOT NULL"
            " AND path IS NOT NULL AND state = ? AND (hash, image, item) > (?, ?, ?)"
            f" ORDER BY hash, image, item LIMIT {_PAGE}"
        )
        last: tuple[bytes, int, int] = (b"", -1, -1)
        while page := self.execute(query, (ItemState.OK, *last)):
            yield from ((digest, os.fsdecode(path)) for digest, _, _, path in page)
            last = page[-1][:3]

    def rows_of(self, item_id: str, modality: Modality) -> Rows:
        """The rows of one item by its public id, in caption order."""
        query = (
            "SELECT r.row FROM rows AS r JOIN items AS i ON i.item = r.item"
            " WHERE i.id = ? AND (r.part IS NOT NULL) = ? ORDER BY r.part"
        )
        found = self.execute(query, (item_id, is_text(modality)))
        return np.array([row for (row,) in found], dtype=np.int64)

    def present(self, ids: Iterable[str]) -> set[str]:
        """Those of these public ids that are there."""
        query = "SELECT i.id FROM json_each(?) AS w JOIN items AS i ON i.id = w.value WHERE i.state = ?"
        return {found for (found,) in self.execute(query, (json.dumps(sorted(set(ids))), ItemState.OK))}

    def items(self, *, state: ItemState | None = ItemState.OK) -> Iterator[Known]:
        """Every item in order of (root, name), in pages."""
        query = (
            f"SELECT {KNOWN_COLUMNS} FROM items AS i WHERE (i.root, i.name) > (?, ?)"
            f" AND (? IS NULL OR i.state = ?) ORDER BY i.root, i.name LIMIT {_PAGE}"
        )
        last: tuple[bytes, bytes] = (b"", b"")
        while page := self.execute(query, (*last, state, state)):
            yield from (known_of(row, self._items) for row in page)
            last = (page[-1][2], page[-1][3])
