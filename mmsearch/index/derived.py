"""The rows of one modality of a stored index as a neighbour index: never wrong, never an error.

Decisions:
- A derived file that is missing, damaged, or of another vector file is passed over: the rows
  themselves are searched. One that is stale is completed by searching the rows it lacks.
- Below 30,000 rows numpy answers before faiss is even imported, so the file is left alone.
- Row numbers are those of the store. Dead rows are kept out by position, so nothing need be rebuilt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import IndexDamagedError
from mmsearch.index.base import NeighbourIndex, check_k, merged, padded
from mmsearch.index.exact import ExactIndex
from mmsearch.index.faiss import FaissFlat
from mmsearch.similarity import check_embeddings
from mmsearch.types import Embeddings, Modality, Rows, Scores

SMALL = 30_000
_FEW = 4096
"""So few allowed rows are gathered and searched exactly, rather than looked for among all."""


class DerivedFile(Protocol):
    """What a store records about a derived file."""

    @property
    def rows(self) -> int:
        """It covers the rows of its modality below this one."""
        ...

    @property
    def count(self) -> int:
        """How many rows those are."""
        ...


D = TypeVar("D", bound=DerivedFile)


class StoredRows(Protocol[D]):
    """What is needed of a store's snapshot."""

    @property
    def dim(self) -> int:
        """d."""
        ...

    def ranges(self, modality: Modality) -> list[tuple[int, int]]:
        """Sorted half-open row ranges."""
        ...

    def dead_rows(self, modality: Modality) -> Rows:
        """Sorted rows that must not be returned."""
        ...

    def block(self, start: int, stop: int) -> NDArray[np.float16]:
        """(stop - start, d) fp16 rows."""
        ...

    def vectors(self, rows: Rows) -> Embeddings:
        """(n,) -> (n, d) float32."""
        ...

    def derived(self, modality: Modality) -> D | None:
        """The derived file that fits."""
        ...

    def intact(self, derived: D) -> str | None:
        """Its path, when it is what was recorded."""
        ...


class Positions:
    """Row numbers of the store against positions 0..n-1 in an index made of `ranges` one after the other."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._starts = np.array([start for start, _ in ranges], np.int64)
        lengths = np.array([stop - start for start, stop in ranges], np.int64)
        self._ends = np.cumsum(lengths)  # position after each range
        self._firsts = self._ends - lengths
        self.size = int(lengths.sum())

    def rows(self, positions: Rows) -> Rows:
        """Positions to rows; -1 stays."""
        if not self.size:
            return np.full_like(positions, -1)
        which = np.searchsorted(self._ends, positions, side="right")
        rows: Rows = self._starts[which] + positions - self._firsts[which]
        return np.where(positions < 0, -1, rows)

    def of(self, rows: Rows) -> Rows:
        """Rows to positions; rows that are in no range are left out."""
        if not self.size:
            return np.empty(0, np.int64)
        which = np.maximum(np.searchsorted(self._starts, rows, side="right") - 1, 0)
        positions = rows - self._starts[which] + self._firsts[which]
        inside = (rows >= self._starts[which]) & (positions < self._ends[which])
        found: Rows = positions[inside]
        return found


class StoredIndex:
    """Parts of the rows, each with its own index, searched together under the store's row numbers."""

    def __init__(
        self, parts: Sequence[tuple[Positions, NeighbourIndex]], *, source: StoredRows[D], dead: Rows, kind: str
    ) -> None:
        self._parts, self._source, self._dead, self.kind = parts, source, dead, kind
        self.dim = source.dim
        self.size = sum(positions.size for positions, _ in parts) - len(dead)
        self._alive = [_alive_positions(positions, dead) for positions, _ in parts]

    def search(self, queries: Embeddings, k: int, *, allowed: Rows | None = None) -> tuple[Scores, Rows]:
        """See `base.NeighbourIndex.search`; row numbers are those of the store."""
        queries = check_embeddings(queries, dim=self.dim, where="query")
        check_k(k, len(queries))
        found = [
            self._search_part(number, queries, k, None if allowed is None else np.unique(np.asarray(allowed, np.int64)))
            for number in range(len(self._parts))
        ]
        if not found:
            return padded(np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64), k)
        scores, rows = merged(found, k)
        return np.where(rows < 0, -np.inf, np.clip(scores, -1.0, 1.0)).astype(np.float32), rows

    def _search_part(self, number: int, queries: Embeddings, k: int, allowed: Rows | None) -> tuple[Scores, Rows]:
        positions, index = self._parts[number]
        wanted = self._alive[number]
        if allowed is not None:
            wanted = positions.of(np.setdiff1d(allowed, self._dead, assume_unique=True))
        if wanted is not None and len(wanted) <= _FEW:
            few = positions.rows(wanted)
            scores, columns = ExactIndex(self._source.vectors(few)).search(queries, min(k, max(len(few), 1)))
            return scores, np.where(columns < 0, -1, few[columns]) if len(few) else columns
        scores, found = index.search(queries, min(k, positions.size), allowed=wanted)
        return scores, positions.rows(found)


def _alive_positions(positions: Positions, dead: Rows) -> Rows | None:
    """Positions that may be returned; None when that is all of them."""
    gone = positions.of(dead)
    if not len(gone):
        return None
    mask = np.ones(positions.size, dtype=np.bool_)
    mask[gone] = False
    return np.flatnonzero(mask).astype(np.int64)


def neighbours(snapshot: StoredRows[D], modality: Modality, *, small: int = SMALL) -> NeighbourIndex:
    """The alive rows of `modality` at that generation, ready to be searched.

    `small`: with fewer rows the derived file is not used (0: whenever it is there and intact).
    """
    ranges = snapshot.ranges(modality)
    covered, kind = 0, ExactIndex.kind
    parts: list[tuple[Positions, NeighbourIndex]] = []
    if sum(stop - start for start, stop in ranges) >= small:
        loaded = _load(snapshot, modality, ranges)
        if loaded is not None:
            covered, kind = loaded[0], FaissFlat.kind
            parts.append(loaded[1:])
    for start, stop in ranges:
        if stop > covered:
            first = max(start, covered)
            parts.append((Positions([(first, stop)]), ExactIndex(snapshot.block(first, stop))))
    return StoredIndex(parts, source=snapshot, dead=snapshot.dead_rows(modality), kind=kind)


def _load(
    snapshot: StoredRows[D], modality: Modality, ranges: Sequence[tuple[int, int]]
) -> tuple[int, Positions, NeighbourIndex] | None:
    """(rows covered, positions, index) of the derived file, if it can be relied on."""
    derived = snapshot.derived(modality)
    path = None if derived is None else snapshot.intact(derived)
    if derived is None or path is None:
        return None
    positions = Positions([(start, min(stop, derived.rows)) for start, stop in ranges if start < derived.rows])
    try:
        index = FaissFlat.load(path)
    except IndexDamagedError:
        return None  # the recorded bytes, but not what this FAISS reads
    if index.size != derived.count or index.size != positions.size or index.dim != snapshot.dim:
        return None
    return derived.rows, positions, index
