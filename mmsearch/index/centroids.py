"""Centres of very many inverted lists, learned in two levels.

Decisions:
- k-means with k lists of 40 rows each costs k squared: for 16,384 lists a quarter of an hour on two cores, for 65,536
  four hours. Two levels, sqrt(k) groups and within each its share of the lists, cost k to the power of 1.5: seconds and
  minutes. (Hierarchical k-means, Nistér and Stewénius 2006, with lists in proportion to a group's rows.)
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mmsearch.types import Embeddings

FROM = 1 << 14
"""So many lists and more are learned in two levels."""
_ITERATIONS = 12
_SEED = 1234


def two_level(rows: Embeddings, lists: int) -> Embeddings:
    """(n, d) unit rows -> (lists, d) unit centres; n >= lists. The same for the same rows."""
    groups = max(1, round(math.sqrt(lists)))
    owners = _nearest(rows, _means(rows, groups))
    sizes = np.bincount(owners, minlength=groups)
    shares = _shared(lists, sizes)
    centres = [_means(rows[owners == group], int(share)) for group, share in enumerate(shares) if share]
    return np.ascontiguousarray(np.concatenate(centres))


def _shared(lists: int, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many of the lists each group gets: in proportion to its rows, at most one a row, all of them in sum."""
    exact = lists * sizes / sizes.sum()
    shares: NDArray[np.int64] = np.minimum(np.floor(exact).astype(np.int64), sizes)
    for group in np.argsort(shares - exact, kind="stable"):
        missing = lists - int(shares.sum())
        if missing <= 0:
            break
        shares[group] += min(1, sizes[group] - shares[group])
    for group in np.argsort(-sizes, kind="stable"):  # where rounding was not enough: groups with rows to spare
        missing = lists - int(shares.sum())
        shares[group] += min(missing, int(sizes[group] - shares[group]))
    return shares


def _means(rows: Embeddings, k: int) -> Embeddings:
    import faiss

    if len(rows) <= k:
        return rows
    kmeans = faiss.Kmeans(
        rows.shape[1], k, niter=_ITERATIONS, seed=_SEED, spherical=True, min_points_per_centroid=1,
        max_points_per_centroid=len(rows),
    )  # fmt: skip
    kmeans.train(rows)
    return np.asarray(kmeans.centroids, dtype=np.float32)


def _nearest(rows: Embeddings, centres: Embeddings) -> NDArray[np.int64]:
    import faiss

    _, found = faiss.knn(rows, centres, 1, metric=faiss.METRIC_INNER_PRODUCT)
    nearest: NDArray[np.int64] = found[:, 0]
    return nearest
