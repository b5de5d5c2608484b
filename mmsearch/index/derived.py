"""The rows of one modality of a stored index as a neighbour index: never wrong, never an error.

Decisions:
- A derived file that is missing, damaged, or of another vector file is passed over: the rows
  themselves are searched. One that is stale is completed by searching the rows it lacks.
- Below 30,000 rows numpy answers before faiss is even imported, so a file for exact search is left alone.
- Row numbers are those of the store. Dead rows are kept out inside the search, so nothing need be rebuilt.
- Which part of the rows a file covers is said by its record; files with inverted lists know rows by their numbers,
  others by their position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import IndexDamagedError
from mmsearch.index.base import NeighbourIndex, ascending, check_k, merged, padded
from mmsearch.index.exact import ExactIndex
from mmsearch.index.layouts import FLAT
from mmsearch.similarity import check_embeddings
from mmsearch.types import Embeddings, Modality, Rows, Scores

SMALL = 30_000
_FEW = 4096
"""So few allowed rows are gathered and searched exactly, rather than looked for among all."""


class DerivedFile(Protocol):
    """What a store records about a derived file."""

    @property
    def kind(self) -> str:
        """A kind of index."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """What its maker wrote down."""
        ...

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

    @property
    def row_count(self) -> int:
        """Every row number is below this one."""
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

    def scattered(self) -> NDArray[np.float16]:
        """(row_count, d) fp16: every row, for picking some here and there."""
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

    def all(self) -> Rows:
        """The rows, by position."""
        starts, lengths = self._starts.tolist(), (self._ends - self._firsts).tolist()
        pieces = [np.arange(first, first + n, dtype=np.int64) for first, n in zip(starts, lengths, strict=True)]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

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


class ByRow(Positions):
    """Row numbers where the index knows them as they are: positions are rows."""

    def rows(self, positions: Rows) -> Rows:
        """The same."""
        return positions

    def of(self, rows: Rows) -> Rows:
        """Those of them that are in the ranges."""
        return super().rows(super().of(rows))


class StoredIndex:
    """Parts of the rows, each with its own index, searched together under the store's row numbers."""

    def __init__(
        self,
        parts: Sequence[tuple[Positions, NeighbourIndex]],
        *,
        source: StoredRows[D],
        dead: Rows,
        kind: str,
        few: int = _FEW,
    ) -> None:
        self._parts, self._source, self._dead, self.kind, self._few = parts, source, dead, kind, few
        self.dim = source.dim
        self.size = sum(positions.size for positions, _ in parts) - len(dead)
        self._gone = [
            positions.of(dead) for positions, _ in parts
        ]  # one array for good: indexes keep what they make of it

    def search(
        self, queries: Embeddings, k: int, *, allowed: Rows | None = None, excluded: Rows | None = None
    ) -> tuple[Scores, Rows]:
        """See `base.NeighbourIndex.search`; row numbers are those of the store."""
        queries = check_embeddings(queries, dim=self.dim, where="query")
        check_k(k, len(queries))
        if excluded is not None and self._parts:
            allowed = self._others(excluded) if allowed is None else np.setdiff1d(allowed, excluded)
        wanted = None if allowed is None else self._alive(ascending(allowed))
        found = [self._search_part(number, queries, k, wanted) for number in range(len(self._parts))]
        if not found:
            return padded(np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64), k)
        scores, rows = merged(found, k) if len(found) > 1 else padded(*found[0], k)
        return np.where(rows < 0, -np.inf, np.clip(scores, -1.0, 1.0)).astype(np.float32), rows

    def _alive(self, rows: Rows) -> Rows:
        return rows[~np.isin(rows, self._dead, assume_unique=True)] if len(self._dead) else rows

    def _others(self, excluded: Rows) -> Rows:
        return np.setdiff1d(np.concatenate([positions.all() for positions, _ in self._parts]), excluded)

    def _search_part(self, number: int, queries: Embeddings, k: int, allowed: Rows | None) -> tuple[Scores, Rows]:
        positions, index = self._parts[number]
        gone = self._gone[number]
        if allowed is None and positions.size - len(gone) > self._few:
            scores, found = index.search(queries, min(k, positions.size), excluded=gone if len(gone) else None)
            return scores, positions.rows(found)
        wanted = positions.of(np.setdiff1d(positions.all(), self._dead) if allowed is None else allowed)
        if len(wanted) <= self._few:
            few = positions.rows(wanted)
            scores, columns = ExactIndex(self._source.vectors(few)).search(queries, min(k, max(len(few), 1)))
            return scores, np.where(columns < 0, -1, few[columns]) if len(few) else columns
        scores, found = index.search(queries, min(k, positions.size), allowed=wanted)
        return scores, positions.rows(found)


def neighbours(snapshot: StoredRows[D], modality: Modality, *, small: int = SMALL, few: int = _FEW) -> NeighbourIndex:
    """The alive rows of `modality` at that generation, ready to be searched.

    `small`: with fewer rows a file for exact search is not used (0: whenever it is there and intact). `few`: so many
    rows of a part, or fewer, are compared one by one rather than looked for in its file.
    """
    ranges = snapshot.ranges(modality)
    covered, kind = 0, ExactIndex.kind
    parts: list[tuple[Positions, NeighbourIndex]] = []
    derived = snapshot.derived(modality)
    if derived is not None and (derived.kind != FLAT or sum(stop - start for start, stop in ranges) >= small):
        loaded = _load(snapshot, derived, ranges)
        if loaded is not None:
            covered, kind = derived.rows, derived.kind
            parts.append(loaded)
    for start, stop in ranges:
        if stop > covered:
            first = max(start, covered)
            parts.append((Positions([(first, stop)]), ExactIndex(snapshot.block(first, stop))))
    return StoredIndex(parts, source=snapshot, dead=snapshot.dead_rows(modality), kind=kind, few=few)


def _load(
    snapshot: StoredRows[D], derived: D, ranges: Sequence[tuple[int, int]]
) -> tuple[Positions, NeighbourIndex] | None:
    """(positions, index) of the derived file, if it can be relied on."""
    path = snapshot.intact(derived)
    if path is None:
        return None
    covered = [(start, min(stop, derived.rows)) for start, stop in ranges if start < derived.rows]
    try:
        positions, index = _opened(snapshot, derived, path, covered)
    except (IndexDamagedError, TypeError, ValueError, AttributeError):
        return None  # the recorded bytes, but not what this FAISS, or this program, reads
    if index.size != derived.count or index.size != positions.size or index.dim != snapshot.dim:
        return None
    return positions, index


def _opened(
    snapshot: StoredRows[D], derived: D, path: str, covered: Sequence[tuple[int, int]]
) -> tuple[Positions, NeighbourIndex]:
    if derived.kind == FLAT:
        from mmsearch.index.faiss import FaissFlat

        return Positions(covered), FaissFlat.load(path)
    from mmsearch.index.approximate import read_file
    from mmsearch.index.opening import open_index

    positions, stored = Positions(covered), snapshot.scattered()
    index = open_index(read_file(path), derived.facts, kind=derived.kind, stored=stored, row_of=positions.all)
    return (ByRow(covered) if index.by_rows else positions), index
