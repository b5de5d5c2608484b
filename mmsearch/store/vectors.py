"""vectors.f16: unit rows as raw little-endian half floats, appended only, mapped by readers.

Decisions:
- Row r is the 2 d bytes from 2 d r on: no header, so the file can be read by anything.
- Checksums (xxh3_64 per appended block) are in items.sqlite, committed with the rows.
- The file is never overwritten below the committed rows nor shortened into them: a reader that has it
  mapped would die. Compaction writes a new file under a new name.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable, Iterator

import numpy as np
import xxhash
from numpy.typing import NDArray

from mmsearch.errors import IndexDamagedError
from mmsearch.store.disk import REENCODE, file_key
from mmsearch.types import Embeddings, Rows

FIRST_NAME = "vectors.f16"
BYTES_PER_NUMBER = 2
BLOCK_ROWS = 4096
"""At most so many rows share a checksum."""
HALF = np.dtype("<f2")


def file_name(generation: int) -> str:
    """The name of the vector file that compaction writes for a generation."""
    return f"vectors-{generation}.f16"


def encode(rows: Embeddings) -> NDArray[np.float16]:
    """(n, d) float32 unit rows -> little-endian half floats. Moves a row's length by less than 1e-3."""
    return np.ascontiguousarray(rows, dtype=HALF)


def digest(data: bytes | memoryview | NDArray[np.float16]) -> str:
    """Hex xxh3_64 of bytes."""
    plain = np.ascontiguousarray(data).tobytes() if isinstance(data, np.ndarray) else data
    return str(xxhash.xxh3_64_hexdigest(plain))


class VectorFile:
    """The committed rows of one vector file, mapped read-only."""

    def __init__(self, path: str, *, dim: int, rows: int) -> None:
        self.path, self.dim, self.rows = path, dim, rows
        need = rows * dim * BYTES_PER_NUMBER
        facts = os.stat(path)  # FileNotFoundError is the caller's to judge
        if facts.st_size < need:
            raise IndexDamagedError(
                path,
                expected=f"{need:,} bytes",
                got=f"{facts.st_size:,}",
                do=REENCODE,
            )
        self._file = file_key(facts)
        self._scattered: NDArray[np.float16] | None = None
        self._map: NDArray[np.float16] = (
            np.memmap(path, dtype=HALF, mode="r", shape=(rows, dim)) if rows else np.empty((0, dim), HALF)
        )

    def block(self, start: int, stop: int) -> NDArray[np.float16]:
        """Rows start..stop as stored, without a copy."""
        return np.asarray(self._map[start:stop])

    def scattered(self) -> NDArray[np.float16]:
        """All rows as stored, (rows, d), mapped once more for picking some here and there.

        The disk is asked for these alone. Otherwise each would bring 128 KiB of neighbours along, which is what the
        first query to an index that nobody has read yet would wait for.
        """
        if self._scattered is None:
            self._scattered = self._map_again()
        return self._scattered

    def _map_again(self) -> NDArray[np.float16]:
        if not self.rows:
            return self._map
        try:
            with open(self.path, "rb") as file:
                if file_key(os.fstat(file.fileno())) != self._file:
                    return self._map  # another index has taken the name
                mapped = mmap.mmap(file.fileno(), self.rows * self.dim * BYTES_PER_NUMBER, access=mmap.ACCESS_READ)
        except OSError:  # a compaction has replaced it; the first mapping is still there
            return self._map
        with contextlib.suppress(OSError, AttributeError):  # a hint that not every system takes
            mapped.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(mapped, dtype=HALF).reshape(self.rows, self.dim)

    def take(self, rows: Rows) -> NDArray[np.float16]:
        """(n,) row numbers -> (n, d) as stored, a copy."""
        return np.ascontiguousarray(self._map[rows])

    def read(self, rows: Rows) -> NDArray[np.float16]:
        """As `take`, but of sorted rows that lie close together by reading: the process does not grow by the file."""
        span = int(rows[-1] - rows[0]) + 1 if len(rows) else 0
        if span == 0 or span > 2 * len(rows) or (np.diff(rows) <= 0).any():
            return self.take(rows)
        try:
            first = int(rows[0]) * self.dim * BYTES_PER_NUMBER
            found = np.fromfile(self.path, HALF, count=span * self.dim, offset=first)
        except FileNotFoundError:  # a compaction has replaced it; the mapping is still there
            return self.take(rows)
        picked: NDArray[np.float16] = found.reshape(span, self.dim)[rows - rows[0]]
        return picked

    def gather(self, rows: Rows) -> Embeddings:
        """(n,) row numbers -> (n, d) float32."""
        return np.asarray(self._map[np.asarray(rows, dtype=np.int64)], dtype=np.float32)


def split(first: int, rows: NDArray[np.float16]) -> Iterator[tuple[int, int, str]]:
    """The blocks (first row, count, digest) that `rows`, stored from row `first` on, are recorded as."""
    for start in range(0, len(rows), BLOCK_ROWS):
        piece = rows[start : start + BLOCK_ROWS]
        yield first + start, len(piece), digest(piece)


def wrong_blocks(path: str, blocks: Iterable[tuple[int, int, str]], *, dim: int) -> Iterator[tuple[int, int, str]]:
    """The blocks (first row, count, recorded digest) whose bytes are not those recorded; reads them all.

    Yields (first row, count, digest of what is there: "" when the file ends before).
    """
    width = dim * BYTES_PER_NUMBER
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        for first, count, recorded in blocks:
            file.seek(first * width)
            data = file.read(count * width)
            found = digest(data) if len(data) == count * width else ""
            if found != recorded:
                yield first, count, found
