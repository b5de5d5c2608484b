"""The rows of one modality at one generation, as makers of derived files see them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import IndexDamagedError
from mmsearch.store.disk import REENCODE
from mmsearch.store.snapshot import DirectorySnapshot
from mmsearch.store.sqlite import is_text
from mmsearch.store.vectors import digest
from mmsearch.types import Embeddings, Modality, Rows


class ModalityRows:
    """See `derived.DerivedRows`."""

    def __init__(self, snapshot: DirectorySnapshot, modality: Modality, *, work: str) -> None:
        self._snapshot, self.modality, self.work = snapshot, modality, work
        self._ranges = snapshot.ranges(modality)
        self.count = sum(stop - start for start, stop in self._ranges)
        self.dim, self.stop, self.vectors_path = snapshot.dim, snapshot.row_count, snapshot.vectors_path
        self._dead: Rows | None = None

    @property
    def dead(self) -> Rows:
        """Sorted rows that are never returned."""
        if self._dead is None:
            self._dead = self._snapshot.dead_rows(self.modality)
        return self._dead

    def blocks(self, start: int = 0) -> Iterator[tuple[int, NDArray[np.float16]]]:
        """(first row, (b, d)) from row `start` on, each against its checksum: damage is not copied on."""
        query = "SELECT first, count, xxh3 FROM blocks WHERE is_text = ? AND first + count > ? ORDER BY first"
        for first, count, recorded in self._snapshot.execute(query, (is_text(self.modality), start)):
            block = self._snapshot.block(first, first + count)
            if digest(block) != recorded:
                raise IndexDamagedError(
                    self.vectors_path,
                    got=f"rows {first} to {first + count - 1} that are not those written",
                    do=REENCODE,
                )
            skip = max(0, start - first)
            yield first + skip, block[skip:]

    def vectors(self, rows: Rows) -> Embeddings:
        """(m,) rows of any modality -> (m, d) float32."""
        return self._snapshot.vectors(rows)

    def sample(self, n: int, *, seed: int) -> Rows:
        """At most n rows that are alive, at random, sorted."""
        if len(self.dead):
            alive = self._snapshot.alive_rows(self.modality)
            return alive if n >= len(alive) else alive[_draw(len(alive), n, seed)]
        positions = np.arange(self.count) if n >= self.count else _draw(self.count, n, seed)
        starts = np.array([first for first, _ in self._ranges], np.int64)
        firsts = np.cumsum([0, *(stop - first for first, stop in self._ranges)])[:-1]
        which = np.searchsorted(firsts, positions, side="right") - 1
        rows: Rows = starts[which] + positions - firsts[which]
        return rows


def _draw(count: int, n: int, seed: int) -> NDArray[np.int64]:
    """n different numbers below count, sorted, without a permutation of all of them."""
    return np.sort(np.random.default_rng(seed).choice(count, size=n, replace=False, shuffle=False))
