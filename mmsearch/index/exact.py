"""Exact search with numpy: the one that is right by construction, and that others are tested against.

Decisions:
- Rows are looked at in blocks, so that half-precision rows on disk never become one big array.
- Each row's score is summed in float32 and does not depend on the block it is in beyond rounding.
- A small index keeps its rows as float32 after the first search: the next ones are one matrix product.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import IndexDamagedError
from mmsearch.index.base import best_first, check_allowed, check_k, merged, padded
from mmsearch.similarity import check_embeddings, top_k
from mmsearch.types import Embeddings, Rows, Scores

_BLOCK_BYTES = 16 << 20
_KEEP_BYTES = 64 << 20
_FEW_EXCLUDED = 256


class ExactIndex:
    """Every row against every query. `rows`: (n, d) float32 or float16 unit rows, may be memory-mapped."""

    kind = "exact"

    def __init__(self, rows: NDArray[np.floating[Any]]) -> None:
        """Takes rows that were checked when they were stored; `build` checks them."""
        self._rows = rows
        self._wide: Embeddings | None = None

    @classmethod
    def build(cls, rows: Embeddings) -> Self:
        """An index of (n, d) rows; `UsageError` unless they are unit rows."""
        return cls(check_embeddings(rows, where="index rows"))

    @property
    def dim(self) -> int:
        """d."""
        return int(self._rows.shape[1])

    @property
    def size(self) -> int:
        """n."""
        return int(self._rows.shape[0])

    def search(
        self, queries: Embeddings, k: int, *, allowed: Rows | None = None, excluded: Rows | None = None
    ) -> tuple[Scores, Rows]:
        """See `base.NeighbourIndex.search`."""
        queries = check_embeddings(queries, dim=self.dim, where="query")
        check_k(k, len(queries))
        wanted = check_allowed(allowed, self.size)
        if excluded is not None and len(excluded):
            return self._without(queries, k, wanted, excluded)
        return self._searched(queries, k, wanted)

    def _without(self, queries: Embeddings, k: int, wanted: Rows | None, excluded: Rows) -> tuple[Scores, Rows]:
        """Every row but those: as long as they are few, more answers are asked for and theirs dropped."""
        if wanted is None and len(excluded) <= min(_FEW_EXCLUDED, self.size // 2):
            scores, rows = self._searched(queries, k + len(excluded), None)
            scores = np.where(np.isin(rows, excluded), -np.inf, scores)
            order = best_first(scores, np.where(np.isneginf(scores), -1, rows))[:, :k]
            scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
            return scores, np.where(np.isneginf(scores), -1, rows)
        left = np.arange(self.size, dtype=np.int64) if wanted is None else wanted
        return self._searched(queries, k, left[~np.isin(left, excluded)])

    def _searched(self, queries: Embeddings, k: int, wanted: Rows | None) -> tuple[Scores, Rows]:
        total = self.size if wanted is None else len(wanted)
        step = max(1, _BLOCK_BYTES // (4 * self.dim))
        best = (np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64))
        for start in range(0, total, step):
            stop = min(start + step, total)
            if wanted is None:
                block, numbers = self._block(start, stop), np.arange(start, stop, dtype=np.int64)
            else:
                numbers = wanted[start:stop]
                block = np.asarray(self._rows[numbers], dtype=np.float32)
            scores, columns = top_k(queries @ block.T, k)
            best = merged([best, (scores, numbers[columns])], min(k, stop))
        return padded(*best, k)

    def _block(self, start: int, stop: int) -> Embeddings:
        if self._rows.dtype == np.float32:
            return np.asarray(self._rows[start:stop], dtype=np.float32)
        if self.size * self.dim * 4 > _KEEP_BYTES:
            return np.asarray(self._rows[start:stop], dtype=np.float32)
        if self._wide is None:
            self._wide = np.asarray(self._rows, dtype=np.float32)
        return self._wide[start:stop]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rows as a `.npy` file."""
        with open(path, "wb") as file:
            np.save(file, np.asarray(self._rows), allow_pickle=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Map a file that `save` wrote. Raises `IndexDamagedError` when it cannot be one."""
        where = os.fspath(path)
        try:
            rows = np.load(Path(path), mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise IndexDamagedError(where, expected="rows saved by mmsearch", got=str(error)) from error
        if rows.ndim != 2 or rows.dtype not in (np.float32, np.float16):
            raise IndexDamagedError(where, expected="(n, d) floats", got=f"{rows.shape} {rows.dtype}")
        return cls(rows)
