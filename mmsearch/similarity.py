"""The only definition of "similar": the cosine of unit rows, higher is better.

Decisions:
- Rows are checked, not silently normalised, at every index border: inner products of forgotten
  un-normalised rows look like cosines and are wrong without crashing.
- Ties are broken by the lower row, so that results do not depend on shard count or block size.
"""

from __future__ import annotations

import numpy as np

from mmsearch.errors import UsageError
from mmsearch.types import Embeddings, Rows, Scores

UNIT_TOLERANCE = 2e-2
"""How far a row's length may be from 1: half-precision storage moves it by less than 1e-3."""


def normalise(rows: np.ndarray) -> Embeddings:
    """Scale each row to length 1: (n, d) any float -> (n, d) float32, each of norm 1.

    A zero or non-finite row has no direction; it raises `UsageError` naming the first such row.
    Known value: [[3, 4]] -> [[0.6, 0.8]].
    """
    wide = np.asarray(rows, dtype=np.float32)
    if wide.ndim != 2:
        raise UsageError("embeddings", expected="shape (n, d)", got=str(wide.shape))
    norms = np.linalg.norm(wide, axis=1, keepdims=True)  # (n, 1)
    bad = ~np.isfinite(norms[:, 0]) | (norms[:, 0] < 1e-12)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise UsageError(f"embedding row {row}", expected="a finite, non-zero row", got=f"norm {norms[row, 0]}")
    return np.ascontiguousarray(wide / norms)


def check_embeddings(rows: np.ndarray, *, dim: int | None = None, where: str = "embeddings") -> Embeddings:
    """Return `rows` as contiguous float32 (n, d) or raise `UsageError` if they are not unit rows.

    `dim`: the d that is required, when one is.
    """
    wide = np.ascontiguousarray(rows, dtype=np.float32)
    if wide.ndim != 2 or (dim is not None and wide.shape[1] != dim):
        raise UsageError(where, expected=f"shape (n, {dim or 'd'})", got=str(wide.shape))
    norms = np.linalg.norm(wide, axis=1)
    bad = ~(np.abs(norms - 1.0) <= UNIT_TOLERANCE)  # also true for NaN
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise UsageError(
            f"{where}, row {row}", expected="norm 1", got=f"norm {norms[row]:.4g}", do="Call normalise() first."
        )
    return wide


def cosine(a: Embeddings, b: Embeddings) -> Scores:
    """Cosine of every row of `a` with every row of `b`: (q, d), (n, d) unit rows -> (q, n) in [-1, 1]."""
    scores: Scores = np.clip(np.asarray(a, np.float32) @ np.asarray(b, np.float32).T, -1.0, 1.0)
    return scores


def top_k(scores: Scores, k: int) -> tuple[Scores, Rows]:
    """The k best columns of each row, best first: (q, n) -> ((q, m), (q, m) int64) with m = min(k, n).

    Ties: the lower column first. Columns scored -inf or NaN come last and are kept.
    """
    if k < 1:
        raise UsageError("k", expected="1 or more", got=str(k))
    q, n = scores.shape
    m = min(k, n)
    clean = np.where(np.isnan(scores), -np.inf, scores)
    columns = np.arange(n, dtype=np.int64)
    out_scores, out_rows = np.empty((q, m), np.float32), np.empty((q, m), np.int64)
    for i in range(q):
        row, candidates = clean[i], columns
        if m < n:  # keep every column that ties with the m-th best, or the tie order would be partition's
            bar = np.partition(row, n - m)[n - m]
            candidates = np.flatnonzero(row >= bar)
        order = candidates[np.lexsort((candidates, -row[candidates]))][:m]
        out_scores[i], out_rows[i] = scores[i, order], order
    return out_scores, out_rows
