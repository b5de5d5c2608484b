"""SQLite connections of this process, and how their files are read beside them.

POSIX locks belong to a process and a file: whoever closes *any* descriptor of the file drops every lock that the
process holds on it, SQLite's too (sqlite.org/howtocorrupt.html, section 2.2). A checksum taken with `open` would do
just that: the next reader of another process believes to be alone, and takes the log away from under the writer.

Decisions:
- Every connection is made here and counted by its file, and that of a database it attaches too (`hold`). What is opened
  to read such a file is kept, shared, and closed with the last connection.
- Known by device and inode, as the system knows locks: a file has several names.
- A cursor must be read to its end before its connection is closed: until then SQLite keeps the file, uncounted.
- A forked child has none of the locks, and counts from zero. It must not use connections from before the fork.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from mmsearch.store.checksums import digest_of
from mmsearch.store.disk import file_key

_PIECE = 1 << 20
_Key = tuple[int, int]


@dataclass(slots=True)
class _File:
    """A file that is in use. `users`: connections, and readers under way."""

    users: int = 0
    descriptors: list[int] = field(default_factory=list)


_files: dict[_Key, _File] = {}
_lock = threading.RLock()  # the collector may close a connection in the middle of anything


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()
    _files.clear()  # what is open stays open, as the parent's descriptors do


os.register_at_fork(after_in_child=_after_fork)


class Connection(sqlite3.Connection):
    """A connection that is counted until it is closed."""

    _keys: tuple[_Key, ...] = ()

    def hold(self, path: str) -> None:
        """Count as a user of the file at `path`; before the first statement, or that which attaches the file.

        Until then nothing is locked. Raises SQLite's own error when there is no such file.
        """
        with _lock:
            try:
                key = file_key(os.stat(path))
            except OSError as error:  # gone since it was opened
                gone = sqlite3.OperationalError(f"unable to open database file: {error.strerror}")
                gone.sqlite_errorcode, gone.sqlite_errorname = sqlite3.SQLITE_CANTOPEN, "SQLITE_CANTOPEN"
                raise gone from error
            self._keys += (key,)
            _files.setdefault(key, _File()).users += 1

    def close(self) -> None:
        """See `sqlite3.Connection.close`."""
        super().close()
        with _lock:
            keys, self._keys = self._keys, ()
            for key in keys:
                _let_go(key)

    def __del__(self) -> None:
        with contextlib.suppress(sqlite3.Error):  # one that was never opened
            self.close()


def connect(path: str, *, address: str | None = None) -> Connection:
    """The database in a file, made if need be; transactions are explicit. `address`: SQLite's URI for it, if any."""
    connection = sqlite3.connect(
        address or path, uri=address is not None, isolation_level=None, check_same_thread=False, factory=Connection
    )
    try:
        connection.hold(path)
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def _reading(path: str) -> Iterator[int]:
    """A descriptor for `os.pread`; it outlives the block while connections to the file are open."""
    with _lock:
        key = file_key(os.stat(path))
        if key not in _files or not _files[key].descriptors:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            key = file_key(os.fstat(descriptor))  # the name may stand for another file by now
            _files.setdefault(key, _File()).descriptors.append(descriptor)
        _files[key].users += 1
        descriptor = _files[key].descriptors[0]
    try:
        yield descriptor
    finally:
        with _lock:
            _let_go(key)


def _let_go(key: _Key) -> None:
    """One user less; the last one closes what was opened. Under the lock."""
    file = _files.get(key)
    if file is None:
        return  # of before a fork
    file.users -= 1
    if not file.users:
        del _files[key]
        for descriptor in file.descriptors:
            os.close(descriptor)


def _pieces(path: str) -> Iterator[bytes]:
    with _reading(path) as descriptor:
        at = 0
        while piece := os.pread(descriptor, _PIECE, at):
            yield piece
            at += len(piece)


def database_digest(path: str) -> tuple[int, str]:
    """(size in bytes, hex xxh3_64 of the content) of a database file that may be open."""
    return digest_of(_pieces(path))


def copy_database(path: str, target: str) -> None:
    """Copy a database file that may be open; not its log."""
    with open(target, "wb") as file:
        for piece in _pieces(path):
            file.write(piece)
