"""tokens.sqlite: what a re-ranker reads of each picture, kept so that a search need not look at the picture again.

    with TokenStore.open("indexes/photos", identity=reranker.tokens_identity) as tokens:
        found = tokens.get(snapshot.content_hashes(rows))

Decisions:
- Keyed by the picture's content, not by its item: a moved photo keeps its tokens, copies share them.
- Derived, and never an error to who searches: a file that is missing, damaged, or of another identity holds nothing.
  To a writer it is the same, and it begins a new one. What was half written when its writer died is not there.
- A blob's checksum covers its key too, so that damage to SQLite's own pages cannot hand out another picture's tokens.
- A new identity means a new file (the old one is unlinked), never other content under an open reader.
- Pages of 2 KiB: a blob of 31,266 bytes costs 31,435 so, 32,810 with 4 KiB (64 of them are read in 3 ms instead of 1).
- `synchronous=NORMAL`: no commit waits for the disk. A power cut may cost the last ones, and only those.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Self, TypeAlias, TypeVar

import xxhash

from mmsearch.errors import IndexDamagedError, ResourceError, StoreError, UsageError
from mmsearch.store.connections import connect
from mmsearch.store.disk import os_guard, sqlite_guard
from mmsearch.store.lock import WriterLock
from mmsearch.store.sqlite import BUSY_MS, ReaderConnection

TOKENS_NAME = "tokens.sqlite"
APPLICATION_ID = 0x6D6D7074  # "mmpt"
FORMAT = 1
HASH_BYTES = 16
RETOKENISE = "Searches do without them. Run 'mmsearch index' on this index again with --tokens: they are made anew."
_PAGE_BYTES = 2048
_KEYS_AT_ONCE = 500
_SCHEMA = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID",
    "CREATE TABLE tokens (hash BLOB NOT NULL UNIQUE, xxh3 BLOB NOT NULL, tokens BLOB NOT NULL)",
)
_ROWS = "SELECT rowid, hash, xxh3, tokens FROM tokens"

T = TypeVar("T")
Key: TypeAlias = bytes
"""A picture's content hash: xxh3_128 of its file, 16 bytes."""
Blob: TypeAlias = bytes
"""A picture's tokens, as `rerank.tokens.pack` made them."""


class TokenStore:
    """The patch tokens of an index, to read or (with the index's writer lock) to fill. Thread-safe; close it."""

    def __init__(self, path: str, *, identity: str | None, lock: WriterLock | None) -> None:
        self.path, self._identity, self._writer_lock = path, identity, lock
        self._lock = threading.RLock()
        self._reader: ReaderConnection | None = None
        self._db: sqlite3.Connection | None = None
        if lock is None:
            self._begin_reading()
        else:
            self._begin_writing()

    @classmethod
    def open(cls, index_path: str | os.PathLike[str], *, identity: str | None, write: bool = False) -> Self:
        """The tokens in the index directory at `index_path`.

        `identity`: of what made them; tokens of another identity are as if there were none, and are removed with
        `write`. None reads them whoever made them. Reading raises nothing. `write` raises `IndexLockedError` while
        somebody updates the index (or its tokens), `ResourceError`, and `StoreError` where that is not allowed.
        """
        folder = os.path.abspath(os.fspath(index_path))
        path = os.path.join(folder, TOKENS_NAME)
        if not write:
            return cls(path, identity=identity, lock=None)
        if identity is None:
            raise UsageError("identity", expected="that of who makes the tokens", got="none")
        with os_guard(folder):
            lock = WriterLock(folder)
            lock.acquire()
            try:
                return cls(path, identity=identity, lock=lock)
            except BaseException:
                lock.release()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go. What `put` was handed is there whether or not this is called."""
        with self._lock:
            if self._reader is not None:
                self._reader.close()
            elif self._db is not None:
                self._db.close()
            if self._writer_lock is not None:
                self._writer_lock.release()

    @property
    def made_by(self) -> str | None:
        """The identity of who made them; None where there are none that can be read."""
        return self._ask(_identity, absent=None)

    @property
    def count(self) -> int:
        """Pictures that have tokens."""
        return self._ask(lambda db: int(db.execute("SELECT count(*) FROM tokens").fetchone()[0]), absent=0)

    @property
    def bytes(self) -> int:
        """Of all their tokens together, SQLite's own not counted."""
        query = "SELECT coalesce(sum(length(tokens)), 0) FROM tokens"
        return self._ask(lambda db: int(db.execute(query).fetchone()[0]), absent=0)

    def get(self, hashes: Iterable[Key | None]) -> dict[Key, Blob]:
        """The tokens of those pictures that have intact ones, by content hash; None among `hashes` is passed over."""
        wanted = list(dict.fromkeys(h for h in hashes if h is not None))

        def work(db: sqlite3.Connection) -> dict[Key, Blob]:
            found: dict[Key, Blob] = {}
            for part in _parts(wanted):
                rows = db.execute(f"{_ROWS} WHERE hash IN ({_marks(part)})", part)
                found.update((key, blob) for _, key, check, blob in rows if _is_intact(key, check, blob))
            return found

        return self._ask(work, absent={})

    def missing(self, hashes: Iterable[Key]) -> list[Key]:
        """Those without tokens, each once, in the order given. Damage that `repair` has not found counts as there."""
        wanted = list(dict.fromkeys(hashes))

        def work(db: sqlite3.Connection) -> list[Key]:
            there: set[Key] = set()
            for part in _parts(wanted):
                there.update(h for (h,) in db.execute(f"SELECT hash FROM tokens WHERE hash IN ({_marks(part)})", part))
            return [h for h in wanted if h not in there]

        return self._ask(work, absent=wanted)

    def put(self, pairs: Iterable[tuple[Key, Blob]]) -> None:
        """Keep (content hash, tokens), all or none; tokens that were there are replaced."""
        rows = [(key, _check(key, blob), blob) for key, blob in pairs]
        if any(len(key) != HASH_BYTES for key, _, _ in rows):
            raise UsageError("content hash", expected=f"{HASH_BYTES} bytes", got="another length")

        def work(db: sqlite3.Connection) -> None:
            with _transaction(db):
                db.executemany("INSERT OR REPLACE INTO tokens (hash, xxh3, tokens) VALUES (?, ?, ?)", rows)

        self._change(work)

    def prune(self, keep: Iterable[Key]) -> int:
        """Forget all pictures but those; how many. Their room in the file is used again."""
        kept = list(keep)  # asked for here: what goes wrong with the caller's own files is no damage of this one

        def work(db: sqlite3.Connection) -> int:
            with _transaction(db):
                db.execute("CREATE TEMP TABLE kept (hash BLOB PRIMARY KEY) WITHOUT ROWID")
                db.executemany("INSERT OR IGNORE INTO temp.kept VALUES (?)", ((h,) for h in kept))
                gone = db.execute("DELETE FROM tokens WHERE hash NOT IN (SELECT hash FROM temp.kept)").rowcount
                db.execute("DROP TABLE temp.kept")
            return int(gone)

        return self._change(work)

    def repair(self) -> int:
        """Read everything and forget what is damaged, so that `missing` names it; how many pictures that were.

        A file whose pages are damaged is begun anew as a whole.
        """

        def work(db: sqlite3.Connection) -> int:
            wrong = list(_wrong(db, self.path))
            if wrong:
                with _transaction(db):
                    db.executemany("DELETE FROM tokens WHERE rowid = ?", ((row,) for row, _ in wrong))
            return len(wrong)

        before = self.count
        dropped = self._change(work)
        return max(dropped, before - self.count)

    def _ask(self, work: Callable[[sqlite3.Connection], T], *, absent: T) -> T:
        """The answer of the file; `absent` where there is none that could be relied on."""
        if self._writer_lock is not None:
            return self._change(work)
        with self._lock:
            if self._db is None:
                return absent
            try:
                with sqlite_guard(self.path):
                    return work(self._db)
            except (StoreError, ResourceError):
                self._give_up()
                return absent

    def _change(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do it; in a file that turns out to be damaged, do it in a new one."""
        if self._writer_lock is None:
            raise UsageError(self.path, expected="tokens opened with write=True", got="opened to read")
        with self._lock:
            if self._db is None:
                raise UsageError(self.path, expected="open tokens", got="closed ones")
            try:
                with sqlite_guard(self.path):
                    return work(self._db)
            except IndexDamagedError:
                self._begin_anew()
                with sqlite_guard(self.path):
                    return work(self._db)

    def _begin_reading(self) -> None:
        if not os.path.exists(self.path):
            return
        try:
            self._reader = ReaderConnection(self.path, without_log=True)
            self._db = self._reader.db
            with sqlite_guard(self.path):
                fits = _identity(self._db)
        except (StoreError, ResourceError, OSError):
            fits = None
        if fits is None or self._identity not in (None, fits):
            self._give_up()

    def _give_up(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = self._db = None

    def _begin_writing(self) -> None:
        if not os.path.exists(self.path):
            self._begin_anew()
            return
        try:
            with sqlite_guard(self.path):
                self._db = _connect(self.path)
                fits = _identity(self._db) == self._identity
        except IndexDamagedError:
            fits = False
        except BaseException:
            if self._db is not None:
                self._db.close()
            raise
        if not fits:
            self._begin_anew()

    def _begin_anew(self) -> None:
        if self._db is not None:
            self._db.close()
        remove_tokens(os.path.dirname(self.path))
        with sqlite_guard(self.path):
            self._db = _connect(self.path)
            with _transaction(self._db) as db:
                for statement in _SCHEMA:
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {FORMAT}")
                db.execute("INSERT INTO meta VALUES ('identity', ?)", (self._identity,))


def remove_tokens(index_path: str | os.PathLike[str]) -> None:
    """Remove the tokens of an index altogether; for who holds its writer lock. Readers keep what they have open."""
    path = os.path.join(os.path.abspath(os.fspath(index_path)), TOKENS_NAME)
    with os_guard(path):
        for end in ("", "-wal", "-shm"):  # the log last: without its database it means nothing
            Path(path + end).unlink(missing_ok=True)


def tokens_identity(index_path: str | os.PathLike[str]) -> str | None:
    """Who made the tokens of an index; None where there are none that can be read."""
    with TokenStore.open(index_path, identity=None) as tokens:
        return tokens.made_by


def wrong_tokens(index_path: str) -> list[Key]:
    """Content hashes whose tokens are not what was written; reads everything. [] where there are no tokens at all.

    Raises `IndexDamagedError` when the file itself is damaged, `ResourceError`.
    """
    path = os.path.join(index_path, TOKENS_NAME)
    if not os.path.exists(path):
        return []
    reader = ReaderConnection(path, without_log=True)
    try:
        with sqlite_guard(path):
            if reader.db.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone() is None:
                return []  # begun by a writer that was killed, which is as good as none
            if _identity(reader.db) is None:
                raise IndexDamagedError(path, expected=f"patch tokens, format {FORMAT}", got="none", do=RETOKENISE)
            return [key if isinstance(key, bytes) else b"" for _, key in _wrong(reader.db, path)]
    finally:
        reader.close()


def _wrong(db: sqlite3.Connection, path: str) -> Iterator[tuple[int, Any]]:
    """(rowid, hash) of damaged blobs. Raises `IndexDamagedError` when pages are."""
    (said,) = db.execute("PRAGMA integrity_check(1)").fetchone()
    if said != "ok":
        raise IndexDamagedError(path, expected="an intact database", got=str(said), do=RETOKENISE)
    for row, key, check, blob in db.execute(_ROWS):
        if not _is_intact(key, check, blob):
            yield row, key


def _is_intact(key: object, check: object, blob: object) -> bool:
    """Whether a row is what was written; damage may have made numbers of its bytes."""
    return isinstance(key, bytes) and isinstance(blob, bytes) and check == _check(key, blob)


def _identity(db: sqlite3.Connection) -> str | None:
    """Who made the tokens; None for a file that was never finished, or that another version wrote."""
    if db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        return None
    if db.execute("PRAGMA user_version").fetchone()[0] != FORMAT:
        return None
    found = db.execute("SELECT value FROM meta WHERE key = 'identity'").fetchone()
    return None if found is None else str(found[0])


def _connect(path: str) -> sqlite3.Connection:
    connection = connect(path)
    try:
        connection.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
        connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")  # before the first page is written
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _check(key: Key, blob: Blob) -> bytes:
    """xxh3_64 of key and blob, 8 bytes."""
    return bytes(xxhash.xxh3_64_digest(key + blob))


def _parts(hashes: Sequence[Key]) -> Iterator[list[Key]]:
    rest = iter(hashes)
    while part := list(islice(rest, _KEYS_AT_ONCE)):
        yield part


def _marks(part: Sequence[Key]) -> str:
    return ",".join("?" * len(part))
