"""The seam of neighbour search: what an index kind does, and which kinds there are.

Decisions:
- A kind numbers its rows 0..n-1 in the order given. What rows mean is told apart elsewhere (`derived`).
- Scores are inner products of unit rows. Queries and rows are checked to be unit rows at this border.
- Fewer than k answers are padded: row -1, score -inf. Equal scores: the lower row first.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import MissingExtraError, UsageError
from mmsearch.types import Embeddings, Rows, Scores

_LAST = np.iinfo(np.int64).max
MOST_ANSWERS = 1 << 26
"""q times k may not exceed this: the answer alone would take gigabytes."""


class NeighbourIndex(Protocol):
    """Finds the rows most similar to a query. Thread-safe for searching."""

    @property
    def kind(self) -> str:
        """The name in `_KINDS`."""
        ...

    @property
    def dim(self) -> int:
        """d."""
        ...

    @property
    def size(self) -> int:
        """n, the rows it holds."""
        ...

    def search(
        self, queries: Embeddings, k: int, *, allowed: Rows | None = None, excluded: Rows | None = None
    ) -> tuple[Scores, Rows]:
        """The k best rows for each query, best first: (q, d) unit rows -> (q, k), (q, k) int64.

        `allowed`: sorted row numbers that may be returned; None for all. `excluded`: sorted row numbers that are there
        and may not be; what is made of it is kept for the next search with the same array. Raises `UsageError` for
        k < 1 and for queries that are not unit rows of dimension d.
        """
        ...


class IndexKind(NeighbourIndex, Protocol):
    """A neighbour index that can be made of rows and kept in a file."""

    @classmethod
    def build(cls, rows: Embeddings) -> Self:
        """An index of these rows: (n, d), refused with `UsageError` unless they are unit rows."""
        ...

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file. Not durable by itself."""
        ...

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that `save` wrote. Raises `IndexDamagedError` when it cannot be one."""
        ...


_KINDS: dict[str, tuple[str, str, str | None, str | None]] = {
    "exact": ("mmsearch.index.exact", "ExactIndex", None, None),
    "faiss-flat": ("mmsearch.index.faiss", "FaissFlat", "faiss", None),
}
"""name -> (module, class, package it needs, extra that brings that package; None: always installed)."""


def index_kind(name: str) -> type[Any]:
    """The class behind a kind's name, imported when asked for."""
    if name not in _KINDS:
        raise UsageError("index kind", expected=" or ".join(sorted(_KINDS)), got=name)
    module, attribute, package, extra = _KINDS[name]
    if package is not None and importlib.util.find_spec(package) is None:
        raise MissingExtraError(f"index kind {name}", package=package, extra=extra or "")
    loaded: type[Any] = getattr(importlib.import_module(module), attribute)
    return loaded


def check_k(k: int, queries: int) -> None:
    """Raise `UsageError` for a k that cannot be answered."""
    if k < 1:
        raise UsageError("k", expected="1 or more", got=str(k))
    if k * max(queries, 1) > MOST_ANSWERS:
        raise UsageError("k", expected=f"at most {MOST_ANSWERS // max(queries, 1):,}", got=f"{k:,}")


def ascending(rows: Rows) -> Rows:
    """int64, sorted and each once; those that are so already are not sorted again."""
    found: Rows = np.asarray(rows, np.int64)
    return found if (found[1:] > found[:-1]).all() else np.unique(found)


def check_allowed(allowed: Rows | None, size: int) -> Rows | None:
    """`allowed` as sorted int64 rows of 0..size-1; others are dropped."""
    if allowed is None:
        return None
    rows = ascending(allowed)
    return rows[np.searchsorted(rows, 0) : np.searchsorted(rows, size)]


def padded(scores: Scores, rows: Rows, k: int) -> tuple[Scores, Rows]:
    """(q, m) -> (q, k), m <= k: row -1 and score -inf where there is no answer."""
    short = k - scores.shape[1]
    if short <= 0:
        return scores, rows
    width: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, short))
    return (
        np.pad(scores, width, constant_values=-np.inf).astype(np.float32, copy=False),
        np.pad(rows, width, constant_values=-1),
    )


def merged(parts: list[tuple[Scores, Rows]], k: int) -> tuple[Scores, Rows]:
    """The k best of several answers to the same queries, (q, k_i) each; equal scores: the lower row first."""
    scores = np.concatenate([part[0] for part in parts], axis=1)
    rows = np.concatenate([part[1] for part in parts], axis=1)
    order = best_first(scores, rows)[:, :k]
    return padded(np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1), k)


def best_first(scores: Scores, rows: Rows) -> NDArray[np.intp]:
    """Column order of each line: highest score first, then the lower row; -1 pads last."""
    last = np.where(rows < 0, _LAST, rows)
    return np.lexsort((last, -scores), axis=1)
