"""The bytes of one file, read so that no file can block, grow without bound or change unnoticed.

Decisions:
- A path is looked at before it is opened: opening a device can already have an effect. A pipe put there
  between the look and the opening does not block either (O_NONBLOCK).
- The whole file is read, not mapped: a file cut short under a mapping kills the reader.
- Size and mtime are compared before and after; a file that changed is read again, a few times.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

import xxhash

from mmsearch.errors import ImageError, InputError
from mmsearch.types import SkipReason, Stamp

MAX_BYTES = 1 << 30
"""The largest file that is read, in bytes."""

Opener: TypeAlias = Callable[[str, int], int]
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_ATTEMPTS = 3
_PAUSE_S = 0.05


def stamp_of(status: os.stat_result) -> Stamp:
    """Size in bytes, mtime and ctime in nanoseconds."""
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def skip_reason(error: OSError) -> SkipReason:
    """VANISHED when there is no such file (any more), else UNREADABLE."""
    gone = isinstance(error, FileNotFoundError | NotADirectoryError)
    return SkipReason.VANISHED if gone else SkipReason.UNREADABLE


def listed(folder: str) -> Iterator[os.DirEntry[str]]:
    """What lies in a folder, in any order; `InputError` when it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        do, got = "Check its permissions.", error.strerror or str(error)
        raise InputError(folder, expected="a readable folder", got=got, do=do) from error


def read_file(path: str, *, max_bytes: int = MAX_BYTES, opener: Opener = os.open) -> tuple[bytes, Stamp]:
    """All bytes of a regular file, with the stamp they had.

    Raises `ImageError` with EMPTY, TOO_LARGE, NOT_A_FILE, VANISHED, UNREADABLE, or CHANGING when the file
    kept changing while it was read. `opener(path, flags)` returns a file descriptor.
    """
    try:
        _check_regular(path, os.stat(path))
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE_S)
            found = _read_once(path, max_bytes, opener)
            if found is not None:
                return found
    except OSError as error:
        raise ImageError(path, reason=skip_reason(error), detail=error.strerror or str(error)) from None
    except ValueError as error:  # a NUL in the name
        raise ImageError(path, reason=SkipReason.UNREADABLE, detail=str(error)) from None
    raise ImageError(path, reason=SkipReason.CHANGING, detail=f"{_ATTEMPTS} readings differ")


def file_digest(path: str, *, max_bytes: int = MAX_BYTES) -> tuple[bytes, Stamp]:
    """xxh3_128 of the file's bytes (16 bytes) and its stamp; errors as `read_file`."""
    data, stamp = read_file(path, max_bytes=max_bytes)
    return xxhash.xxh3_128_digest(data), stamp


def _check_regular(path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(path, reason=SkipReason.NOT_A_FILE, detail=_kind(status.st_mode))


def _read_once(path: str, max_bytes: int, opener: Opener) -> tuple[bytes, Stamp] | None:
    with open(opener(path, _FLAGS), "rb", buffering=0) as file:
        before = os.fstat(file.fileno())
        _check_regular(path, before)
        if before.st_size == 0:
            raise ImageError(path, reason=SkipReason.EMPTY)
        if before.st_size > max_bytes:
            detail = f"{before.st_size} bytes, limit {max_bytes}"
            raise ImageError(path, reason=SkipReason.TOO_LARGE, detail=detail)
        parts, wanted = [], before.st_size + 1  # one more, to notice growth
        while wanted > 0 and (part := file.read(wanted)):
            parts.append(part)
            wanted -= len(part)
        after = os.fstat(file.fileno())
    same = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    if not same or wanted != 1:
        return None
    return (parts[0] if len(parts) == 1 else b"".join(parts)), stamp_of(after)


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "not a file")
