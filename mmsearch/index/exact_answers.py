"""The right answers to a few queries over all rows, against which approximate searches are judged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmsearch.index.base import merged
from mmsearch.types import Embeddings, Rows, Scores

_AT_ONCE = 1 << 16
"""Rows that are compared with the queries together: 100 MB of them as float32 at d = 384."""


def exact_answers(
    queries: Embeddings, blocks: Iterable[tuple[int, NDArray[np.float16]]], k: int, *, dead: Rows
) -> tuple[Scores, Rows]:
    """The k best of all rows that are not `dead` (sorted), for (q, d) queries: (q, k), (q, k) int64, -1 pads.

    `blocks`: (first row, (b, d)); held a few at a time, whatever there is in all.
    """
    best = (np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64))
    for rows, wide in in_pieces(blocks, _AT_ONCE):
        alive = ~np.isin(rows, dead, assume_unique=True)
        if not alive.all():
            rows, wide = rows[alive], wide[alive]
        if len(rows):
            scores, columns = _knn(queries, wide, min(k, len(rows)))
            best = merged([best, (scores, rows[columns])], k)
    return best


def overlap(found: Rows, right: Rows) -> float:
    """The share of the right rows, (q, k), -1 padding not counted, that are among those found, (q, k)."""
    hit = sum(len(np.intersect1d(a[a >= 0], b[b >= 0])) for a, b in zip(found, right, strict=True))
    return hit / max(int((right >= 0).sum()), 1)


def in_pieces(
    blocks: Iterable[tuple[int, NDArray[np.float16]]], most: int
) -> Iterable[tuple[Rows, NDArray[np.float32]]]:
    """Blocks joined to pieces of at most about `most` rows: ((m,) row numbers, (m, d) float32)."""
    numbers: list[Rows] = []
    parts: list[NDArray[np.float32]] = []
    held = 0
    for first, block in blocks:
        for start in range(0, len(block), most):
            piece = np.asarray(block[start : start + most], dtype=np.float32)
            if held and held + len(piece) > most:
                yield np.concatenate(numbers), np.concatenate(parts)
                numbers, parts, held = [], [], 0
            numbers.append(np.arange(first + start, first + start + len(piece), dtype=np.int64))
            parts.append(piece)
            held += len(piece)
    if held:
        yield np.concatenate(numbers), np.concatenate(parts)


def _knn(queries: Embeddings, rows: Embeddings, k: int) -> tuple[Scores, NDArray[np.int64]]:
    import faiss

    found: tuple[Any, Any] = faiss.knn(queries, rows, k, metric=faiss.METRIC_INNER_PRODUCT)
    return found
