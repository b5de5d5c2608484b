"""The few things the store does to a disk, each one an object's method so that tests can break any of them.

Decisions:
- Every operation passes through `Disk.step` first. A test's disk counts there, and dies or fails at the Nth.
- What the system refuses becomes one of two errors: out of a resource (no space, quota, I/O error,
  read-only file system: exit 5, with what was needed and what is there) or no permission.
- Reading is not here: readers map files, and a reader's fault is found by checksums.
"""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mmsearch.errors import IndexDamagedError, IndexLockedError, MmsearchError, ResourceError, StoreError, UsageError

_OUT_OF = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "disk quota used up",
    errno.EIO: "input/output error",
    errno.EROFS: "read-only file system",
    errno.EFBIG: "file size limit reached",
    errno.ENOMEM: "no memory left",
    errno.EMFILE: "too many open files",
    errno.ENFILE: "too many open files",
}
_BAD_PAGES = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT}
_SQLITE_OUT_OF = {
    sqlite3.SQLITE_FULL: "no space left",
    sqlite3.SQLITE_IOERR: "input/output error",
    sqlite3.SQLITE_READONLY: "read-only file system or file",
    sqlite3.SQLITE_CANTOPEN: "cannot open or create the database file",
    sqlite3.SQLITE_NOMEM: "no memory left",
}
REENCODE = "Run 'mmsearch index' with --force on this index: what is lost is encoded anew."
REBUILD = "Move the index directory away and run 'mmsearch index' again."


def os_fault(error: OSError, where: str, *, need: int | None = None) -> MmsearchError:
    """The error to raise for what the system refused; `need`: bytes that were to be written."""
    reason = _OUT_OF.get(error.errno or 0)
    if reason is None:
        return StoreError(
            where, got=error.strerror or str(error), do="Check the directory and its permissions, then run it again."
        )
    return ResourceError(
        where,
        expected=f"{need:,} bytes free" if need is not None else "",
        got=f"{reason}, {_free(where)} bytes free" if need is not None else reason,
        do="Nothing that was committed is lost. Make room (or choose another place), then run it again.",
    )


def _free(where: str) -> str:
    place = Path(where)
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return f"{shutil.disk_usage(place).free:,}"
    except OSError:
        return "unknown"


def sqlite_fault(error: sqlite3.Error, where: str) -> MmsearchError:
    """The error to raise for what SQLite met in the database file `where`."""
    code = getattr(error, "sqlite_errorcode", None)
    primary = code & 0xFF if isinstance(code, int) else None
    if primary in _SQLITE_OUT_OF:
        return ResourceError(
            where,
            got=f"{_SQLITE_OUT_OF[primary]} ({error}), {_free(where)} bytes free",
            do="Nothing that was committed is lost. Make room (or choose another place), then run it again.",
        )
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return IndexLockedError(where, got=str(error), do="Wait for the other process, then run it again.")
    # Bad pages, but also "no such table": the file is not what this program wrote.
    detail = "damaged page" if primary in _BAD_PAGES else "unexpected content"
    return IndexDamagedError(where, expected="an intact database", got=f"{detail} ({error})", do=REBUILD)


def file_key(facts: os.stat_result) -> tuple[int, int]:
    """Device and inode: what tells files apart whatever their names, for the system and its locks too."""
    return facts.st_dev, facts.st_ino


@contextmanager
def sqlite_guard(where: str) -> Iterator[None]:
    """Turn SQLite's errors into ours. Text that no longer decodes is damage as well."""
    try:
        yield
    except sqlite3.ProgrammingError as error:  # a closed connection: the caller's mistake, not the file's
        raise UsageError(where, expected="an open index", got=str(error)) from error
    except sqlite3.Error as error:
        raise sqlite_fault(error, where) from error
    except UnicodeDecodeError as error:
        raise IndexDamagedError(where, got=f"undecodable text ({error})", do=REBUILD) from error


@contextmanager
def os_guard(where: str) -> Iterator[None]:
    """Turn what the system refuses into errors of ours, at the public border."""
    try:
        yield
    except OSError as error:
        raise os_fault(error, os.fsdecode(error.filename) if error.filename else where) from error


class Disk:
    """The real disk. A test's disk overrides `step`, `_write` or `_sync`."""

    def step(self, operation: str, path: str) -> None:
        """Called before every operation; does nothing here."""

    def _write(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        return os.pwrite(descriptor, data, offset)

    def _sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def make_dir(self, path: str) -> None:
        """Create a directory and those above it, durably."""
        missing = []
        while not Path(path).is_dir():
            missing.append(path)
            path = os.path.dirname(path) or "."
        for folder in reversed(missing):
            try:
                self.step("make_dir", folder)
                os.mkdir(folder)
            except FileExistsError as error:
                if not Path(folder).is_dir():
                    raise StoreError(
                        folder, expected="a directory", got="a file", do="Choose another place."
                    ) from error
            except OSError as error:
                raise os_fault(error, folder) from error
            self.sync_dir(os.path.dirname(folder) or ".")

    def append(self, path: str, chunks: Iterable[bytes | memoryview], *, at: int, need: int | None = None) -> int:
        """Write `chunks` from byte `at` of an existing or new file and sync it; returns bytes written."""
        offset = at
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                for chunk in chunks:
                    offset += self._write_all(descriptor, memoryview(chunk).cast("B"), offset=offset, path=path)
                self.step("sync", path)
                self._sync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise os_fault(error, path, need=need if need is not None else offset - at) from error
        return offset - at

    def _write_all(self, descriptor: int, data: memoryview, *, offset: int, path: str) -> int:
        done = 0
        while done < len(data):
            self.step("write", path)
            done += self._write(descriptor, data[done:], offset + done)
        return done

    def cut(self, path: str, size: int) -> None:
        """Cut (or, with zeros, extend) a file to `size` bytes and sync it."""
        try:
            self.step("cut", path)
            descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.ftruncate(descriptor, size)
                self._sync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise os_fault(error, path) from error

    def put(self, path: str, chunks: Iterable[bytes | memoryview], *, need: int | None = None) -> int:
        """Put a whole file in place: temporary name, sync, rename, sync of the folder. Returns its size."""
        temporary = path + ".tmp"
        self.remove(temporary)
        size = self.append(temporary, chunks, at=0, need=need)
        try:
            self.step("replace", path)
            os.replace(temporary, path)
        except OSError as error:
            raise os_fault(error, path) from error
        self.sync_dir(os.path.dirname(path))
        return size

    def remove(self, path: str) -> None:
        """Remove a file if it is there."""
        if not os.path.lexists(path):
            return
        try:
            self.step("remove", path)
            os.unlink(path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise os_fault(error, path) from error

    def sync_dir(self, path: str) -> None:
        """Make names in a folder durable."""
        try:
            self.step("sync_dir", path)
            descriptor = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._sync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder, and need not
                raise os_fault(error, path) from error

    def commit(self, connection: sqlite3.Connection, path: str) -> None:
        """End the open transaction durably (SQLite syncs its log)."""
        try:
            self.step("commit", path)
        except OSError as error:
            raise os_fault(error, path) from error
        connection.execute("COMMIT")
        try:
            self.step("committed", path)
        except OSError as error:
            raise os_fault(error, path) from error
