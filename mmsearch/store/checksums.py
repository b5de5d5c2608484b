"""Checksums of whole files: xxh3_64, read in pieces.

Up to 64 MiB a full check costs milliseconds and is made whenever an index is opened; beyond that
opening looks at sizes and ends only, and `verify` (and every writer) at everything.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import xxhash

from mmsearch.store.base import Derived

QUICK_BYTES = 64 << 20
_END = 64 << 10
_PIECE = 1 << 20


def file_digest(path: str) -> tuple[int, str]:
    """(size in bytes, hex xxh3_64 of the content) of a file that is no database: see `connections`."""
    with open(path, "rb", buffering=0) as file:
        return digest_of(iter(lambda: file.read(_PIECE), b""))


def digest_of(pieces: Iterable[bytes]) -> tuple[int, str]:
    """(bytes, hex xxh3_64) of pieces one after the other."""
    state, size = xxhash.xxh3_64(), 0
    for piece in pieces:
        state.update(piece)
        size += len(piece)
    return size, str(state.hexdigest())


def ends_digest(path: str) -> str:
    """Hex xxh3_64 of the first and the last 64 KiB."""
    state = xxhash.xxh3_64()
    with open(path, "rb", buffering=0) as file:
        state.update(file.read(_END))
        size = Path(path).stat().st_size
        file.seek(max(0, size - _END))
        state.update(file.read(_END))
    return str(state.hexdigest())


def is_intact(path: str, derived: Derived, *, thorough: bool) -> bool:
    """Whether a derived file is the one that was recorded; a missing or unreadable one is not."""
    try:
        if Path(path).stat().st_size != derived.size or ends_digest(path) != derived.ends:
            return False
        return not (thorough or derived.size <= QUICK_BYTES) or file_digest(path)[1] == derived.xxh3
    except OSError:
        return False
