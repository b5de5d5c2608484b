"""The one writer: everything that changes an index directory.

Decisions:
- A commit appends and syncs rows first; the SQLite transaction that names them is the moment it counts.
- Facts (generation, rows) are read from the database before each change, never remembered across one
  that failed: a commit whose outcome is unknown is thus simply looked up.
- Old artefacts are removed only after the manifest no longer names them.
"""

from __future__ import annotations

import fnmatch
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from mmsearch.errors import IndexDamagedError, UsageError
from mmsearch.store import bridge_file, nested
from mmsearch.store.apply import Applier, plan_rows
from mmsearch.store.base import Batch, Derived
from mmsearch.store.check import ItemsFile, live_items
from mmsearch.store.connections import database_digest
from mmsearch.store.disk import REENCODE, Disk, sqlite_guard
from mmsearch.store.lock import WriterLock
from mmsearch.store.manifest import (
    DERIVED_FOLDER,
    FileRecord,
    Manifest,
    made_by,
    read_manifest,
    refuse_mixed,
    write_manifest,
)
from mmsearch.store.manifest import preprocessing_from as preprocessing_of
from mmsearch.store.migrations import check_format, migrate
from mmsearch.store.scan import Scan
from mmsearch.store.snapshot import DirectorySnapshot
from mmsearch.store.sqlite import BUSY_MS, ITEMS_NAME, read_meta, write_meta, writer_connection
from mmsearch.store.vectors import BYTES_PER_NUMBER, VectorFile, digest, encode, split
from mmsearch.types import Embeddings, Rows

_MANY = 4096
"""From so many changes in a batch on, SQLite is given more room."""
_ROOM_KIB = 1 << 16
"""How much: ids come in no order, and in a large index each is on another page."""
_PATIENCE_MS = 50
"""How long a reader with an old generation may hold up folding the log in; the next `finish` tries again."""


def now() -> str:
    """The time as indexes record it: UTC, ISO 8601, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Writer:
    """An index opened for writing; holds the lock until `close`."""

    def __init__(self, folder: str, *, disk: Disk, lock: WriterLock) -> None:
        """Takes over `lock`, which is held. Brings the format up to date; cuts off what was not committed."""
        self.folder, self.disk, self._lock = folder, disk, lock
        self.items_path = os.path.join(folder, ITEMS_NAME)
        self._read_ns: int | None = None
        self.scan: Scan | None = None
        manifest = _manifest_or_none(folder)
        before = ItemsFile(folder, manifest, limit=None)
        self.db = writer_connection(self.items_path)
        try:
            with sqlite_guard(self.items_path):
                check_format(self.db, self.items_path)
                generation = int(self.facts()["generation"])
                before.judge(generation)
                refuse_mixed(manifest, generation, self.items_path)
                migrate(self.db, self.items_path, disk)
        except BaseException:
            self.db.close()
            raise

    def facts(self) -> dict[str, Any]:
        """The committed facts about the index."""
        with sqlite_guard(self.items_path):
            return read_meta(self.db)

    def close(self) -> None:
        """Let go; without `finish` the manifest lags, which is fine."""
        self.db.close()
        self._lock.release()

    def path_of(self, facts: Mapping[str, Any]) -> str:
        """The current vector file."""
        return os.path.join(self.folder, str(facts["vectors"]))

    def settle_vectors(self, *, extend: bool) -> None:
        """Cut the vector file to the committed rows. A shorter one is damage, or filled with zeros (`extend`)."""
        facts = self.facts()
        path, need = self.path_of(facts), int(facts["rows"]) * int(facts["dim"]) * BYTES_PER_NUMBER
        size = os.path.getsize(path) if os.path.exists(path) else -1
        if size < need and extend:
            self.disk.append(path, [], at=0)
            self.disk.cut(path, need)
            self.disk.sync_dir(self.folder)
        elif size < need:
            raise IndexDamagedError(
                path,
                expected=f"{need:,} bytes",
                got=f"{size:,}" if size >= 0 else "no such file",
                do=REENCODE,
            )
        elif size > need:
            self.disk.cut(path, need)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One durable step: the generation grows by one, or nothing happened."""
        with sqlite_guard(self.items_path):
            self.db.execute("BEGIN IMMEDIATE")
            try:
                generation = int(self.db.execute("SELECT value FROM meta WHERE key = 'generation'").fetchone()[0])
                yield self.db
                write_meta(self.db, {"generation": generation + 1, "updated_at": now(), "made_by": made_by()})
                self.disk.commit(self.db, self.items_path)
            except BaseException:
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")
                raise

    def begin_scan(self) -> None:
        """See `base.Store.begin_scan`."""
        self._read_ns = time.time_ns()
        self.scan = Scan(self.db, self.items_path)

    def current_scan(self) -> Scan:
        """The scan that was begun."""
        if self.scan is None:
            raise UsageError("scan", expected="begin_scan() first", got="none")
        return self.scan

    def commit(self, batch: Batch) -> None:
        """See `base.Store.commit`."""
        if not len(batch):
            return
        facts = self.facts()
        first, dim, path = int(facts["rows"]), int(facts["dim"]), self.path_of(facts)
        if len(batch) >= _MANY:
            self.db.execute(f"PRAGMA cache_size = -{_ROOM_KIB}")

        def gather(rows: Rows) -> Embeddings:
            return VectorFile(path, dim=dim, rows=first).gather(rows)

        with sqlite_guard(self.items_path):
            plan = plan_rows(batch.upserts, dim, connection=self.db, gather=gather)
        images, texts = encode(plan.images), encode(plan.texts)
        if len(images) + len(texts):
            start = first * dim * BYTES_PER_NUMBER
            self.disk.append(path, [_bytes(images), _bytes(texts)], at=start, need=images.nbytes + texts.nbytes)
        blocks = [(*block, 0) for block in split(first, images)]
        blocks += [(*block, 1) for block in split(first + len(images), texts)]
        with self.transaction() as db:
            Applier(db, read_ns=self._read_ns or time.time_ns()).apply(batch, plan, first_row=first)
            self.add_blocks(blocks)
            write_meta(db, {**batch.facts, "rows": first + len(images) + len(texts)})

    def add_blocks(self, blocks: list[tuple[int, int, str, int]]) -> None:
        """Record checksums (first row, count, digest, 1 for texts); inside a transaction."""
        self.db.executemany("INSERT INTO blocks (first, count, xxh3, is_text) VALUES (?, ?, ?, ?)", blocks)

    def finish(self, derived: Mapping[str, Derived] | None = None) -> None:
        """Bring the manifest up to date (with these derived files, if given), then tidy up."""
        old = _manifest_or_none(self.folder)
        with DirectorySnapshot(self.folder, lenient=True) as snapshot:
            new = self._manifest(snapshot, old, derived)
        if old is None or _differs(old, new):
            write_manifest(self.folder, replace(new, items=self._items_record()), self.disk)
        self.tidy(new)

    def _manifest(
        self, snapshot: DirectorySnapshot, old: Manifest | None, derived: Mapping[str, Derived] | None
    ) -> Manifest:
        if derived is None:
            derived = {} if old is None else old.derived
        size = snapshot.row_count * snapshot.dim * BYTES_PER_NUMBER
        recorded = snapshot.execute("SELECT xxh3 FROM blocks ORDER BY first")
        return Manifest(
            generation=snapshot.generation,
            model=snapshot.model,
            preprocessing=preprocessing_of(snapshot.fact("preprocessing")),
            settings=snapshot.fact("settings"),
            created_at=str(snapshot.meta["created_at"]),
            updated_at=str(snapshot.meta["updated_at"]),
            vectors=FileRecord(snapshot.vectors_name, size, digest("".join(x for (x,) in recorded).encode())),
            rows=snapshot.row_count,
            items=FileRecord(ITEMS_NAME, 0, ""),
            counts=live_items(snapshot),
            derived={name: one for name, one in derived.items() if one.vectors == snapshot.vectors_name},
        )

    def _items_record(self) -> FileRecord:
        """Size and digest of items.sqlite, or none when a reader keeps the log from being folded in."""
        with sqlite_guard(self.items_path):
            self.db.execute(f"PRAGMA busy_timeout = {_PATIENCE_MS}")
            busy, *_ = self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            self.db.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
        if busy:
            return FileRecord(ITEMS_NAME, 0, "")
        return FileRecord(ITEMS_NAME, *database_digest(self.items_path))

    def tidy(self, manifest: Manifest | None = None) -> None:
        """Remove what neither the database nor the manifest names: leftovers of a killed writer."""
        manifest = manifest or _manifest_or_none(self.folder)
        current = str(self.facts()["vectors"])
        for keeper in (nested, bridge_file):
            keeper.tidy(self.folder, str(self.facts()["model"]), self.disk)
        for name in os.listdir(self.folder):
            if name != current and (fnmatch.fnmatch(name, "vectors*.f16") or name.endswith(".tmp")):
                self.disk.remove(os.path.join(self.folder, name))
        folder = os.path.join(self.folder, DERIVED_FOLDER)
        if not os.path.isdir(folder):
            return
        named = set() if manifest is None else {os.path.basename(one.file) for one in manifest.derived.values()}
        for name in os.listdir(folder):
            if name not in named and name.endswith((".faiss", ".tmp")):
                self.disk.remove(os.path.join(folder, name))


def _bytes(rows: np.ndarray[Any, Any]) -> memoryview:
    return memoryview(rows.tobytes())


def _differs(old: Manifest, new: Manifest) -> bool:
    """Whether the manifest must be written: anything but the digest of items.sqlite, or that is missing."""
    return not old.items.xxh3 or replace(old, items=new.items, made_by="") != replace(new, made_by="")


def _manifest_or_none(folder: str) -> Manifest | None:
    """The manifest, or None where it is missing or damaged: a writer writes it anew."""
    try:
        return read_manifest(folder)
    except IndexDamagedError:
        return None
