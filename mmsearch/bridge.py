"""A linear bridge from the rows of one model into the space of another, so that new queries can search old rows.

A row x of the old model stands for W x / |W x| in the new space; the score of a new query q is q · W x / |W x|. No row
is touched: q · W x is (Wᵀ q) · x, so a search of the old rows with Wᵀ q finds the candidates, and dividing by |W x|
is left for those (`bridged`).

Decisions:
- Pictures and captions have a matrix each: in a dual encoder they lie apart, and one map fits neither.
- Four families are fitted: orthogonal Procrustes (a rotation; few data suffice), ridge regression at several strengths,
  a rotation with a ridge regression of what it leaves over, and ridge of reduced rank. Which is used is decided by rows
  that it was not fitted on, in folds.
- What is compared is scores, not rows: the correlation over the pictures of bridged with true scores, query by query.
  A map may err where no query looks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import IndexDamagedError, StoreError, UsageError
from mmsearch.similarity import normalise
from mmsearch.store import bridge_file
from mmsearch.store.disk import Disk
from mmsearch.types import Embeddings, Modality, ModelIdentity

Matrix = NDArray[np.float32]
LEAST = 16
"""Fewer pictures, or texts of their own, fit nothing that could be relied on."""
FOLDS = 5
STRENGTHS = (0.01, 0.1, 1.0)
"""Of ridge regression, in units of the mean of the eigenvalues of Σ x xᵀ."""
REST_STRENGTHS = (0.1, 1.0, 10.0)
"""The same, of what a rotation leaves over."""
RANKS = (32, 64, 128, 256)
_SAME = 1e-4
"""Correlations so close are the same: the plainer family, which comes first, is taken."""
_ASKED = 1000
"""So many queries decide; more would decide the same, more slowly."""
_QUANTILES = (0.001, 0.999)


@dataclass(frozen=True, slots=True, eq=False)
class Map:
    """One modality's matrix (d_new, d_old) and how it came about.

    `rank`: of the matrix. `agreement`: mean correlation of bridged with true scores on rows it was not fitted on, in
    [-1, 1]. `low`, `high`: |W x| of nearly all rows x lies between them.
    """

    matrix: Matrix
    method: str
    rank: int
    examples: int
    agreement: float
    low: float
    high: float

    def facts(self) -> dict[str, Any]:
        """All but the matrix, as JSON values."""
        return {name: getattr(self, name) for name in ("method", "rank", "examples", "agreement", "low", "high")}

    def lengths(self, rows: Embeddings) -> NDArray[np.float32]:
        """(n, d_old) unit rows -> (n,) |W x|."""
        found: NDArray[np.float32] = np.linalg.norm(rows @ self.matrix.T, axis=1)
        return found

    def carry(self, rows: Embeddings) -> Embeddings:
        """(n, d_old) unit rows -> (n, d_new) unit rows: W x / |W x|."""
        return normalise(rows @ self.matrix.T) if len(rows) else np.empty((0, len(self.matrix)), np.float32)

    def back(self, queries: Embeddings) -> tuple[Embeddings, NDArray[np.float32]]:
        """(q, d_new) unit rows -> Wᵀ q as (q, d_old) unit rows, and their (q,) lengths. Zero stays the first axis."""
        raw = queries @ self.matrix
        lengths = np.linalg.norm(raw, axis=1).astype(np.float32)
        raw[lengths < 1e-12] = np.eye(1, raw.shape[1], dtype=np.float32)
        return normalise(raw), lengths


@dataclass(frozen=True, slots=True, eq=False)
class Bridge:
    """From one model to another. `cost`: what it was measured to cost, as JSON values (see `bridge_build`)."""

    old: ModelIdentity
    new: ModelIdentity
    maps: Mapping[Modality, Map]
    cost: Mapping[str, Any]

    def facts(self) -> dict[str, Any]:
        """All but the matrices, as JSON values."""
        maps = {modality.value: one.facts() for modality, one in self.maps.items()}
        return {"old": asdict(self.old), "new": asdict(self.new), "maps": maps, "cost": dict(self.cost)}

    def save(self, index: str, *, disk: Disk | None = None) -> None:
        """Put it into an index directory, in place of the one that is there."""
        matrices = {modality.value: one.matrix for modality, one in self.maps.items()}
        try:
            bridge_file.write(index, matrices, self.facts(), disk or Disk())
        except StoreError:  # a writer that begins just now may tidy the temporary file away: it does so once
            bridge_file.write(index, matrices, self.facts(), disk or Disk())

    @classmethod
    def load(cls, index: str) -> Bridge | None:
        """The bridge of an index directory, None without one. Raises `IndexDamagedError`."""
        found = bridge_file.read(index)
        if found is None:
            return None
        matrices, facts = found
        try:
            old, new = ModelIdentity(**facts["old"]), ModelIdentity(**facts["new"])
            maps = {
                Modality(name): Map(matrix=matrices[name], **entry)
                for name, entry in facts["maps"].items()
                if matrices[name].shape == (new.dim, old.dim) and matrices[name].dtype == np.float32
            }
            return cls(old, new, maps, facts["cost"])
        except (KeyError, TypeError, ValueError) as error:
            raise IndexDamagedError(index, expected="a bridge", got=str(error), do=bridge_file.REFIT) from error


def fit(
    old: Embeddings, new: Embeddings, *, queries: Embeddings, groups: NDArray[np.int64], seed: int = 0
) -> tuple[Map, Embeddings]:
    """The best map for pairs of rows, (n, d_old) and (n, d_new), and what it makes of rows it was not fitted on.

    `queries` (q, d_new): what will be asked; scores with them decide. `groups` (n,): what is alike (captions of one
    picture) and must be in one fold. Returns the map, fitted on all pairs, and the (n, d_new) unit rows that each fold
    got from the other folds' pairs, for measuring without optimism.
    Raises `UsageError` for fewer than 16 groups. Known value: rows that a rotation turned come back exactly.
    """
    names, which = np.unique(groups, return_inverse=True)
    if not len(old) == len(new) == len(which) or len(names) < LEAST:
        got = f"{len(old)} and {len(new)} in {len(names)}"
        do = "Draw a larger sample, or reindex without a bridge."
        raise UsageError("bridge", expected=f"pairs of rows in {LEAST} groups or more", got=got, do=do)
    fold = (np.random.default_rng(seed).permutation(len(names)) % FOLDS)[which]
    held: dict[tuple[str, int], Embeddings] = {}
    for part in range(FOLDS):
        rest = fold != part
        for name, matrix in _candidates(old[rest], new[rest]):
            rows = held.setdefault(name, np.empty((len(old), new.shape[1]), np.float32))
            rows[~rest] = _unit(old[~rest] @ matrix.T)
    asked = queries[np.linspace(0, len(queries) - 1, min(len(queries), _ASKED)).astype(int)]
    scores = {name: agreement(asked, rows, new) for name, rows in held.items()}
    best = next(name for name, score in scores.items() if score >= max(scores.values()) - _SAME)
    matrix = dict(_candidates(old, new))[best]
    lengths = np.linalg.norm(old @ matrix.T, axis=1)
    low, high = (float(x) for x in np.quantile(lengths, _QUANTILES))
    return Map(matrix, best[0], best[1], len(old), scores[best], low, high), held[best]


def agreement(queries: Embeddings, bridged: Embeddings, true: Embeddings, *, block: int = 1024) -> float:
    """Mean over the (q, d) queries of the correlation of their scores with (n, d) bridged and (n, d) true rows."""
    total = 0.0
    for start in range(0, len(queries), block):
        part = queries[start : start + block]
        a, b = (part @ rows.T for rows in (bridged, true))
        a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
        spread = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        total += float(((a * b).sum(axis=1) / np.maximum(spread, 1e-12)).sum())
    return total / max(len(queries), 1)


def _candidates(old: Embeddings, new: Embeddings) -> Iterator[tuple[tuple[str, int], Matrix]]:
    """((method, rank), matrix (d_new, d_old)) of every family; the strength of a ridge is part of its name."""
    whole = min(old.shape[1], new.shape[1])
    turned = procrustes(old, new)
    yield ("rotation", whole), turned
    rest = new - old @ turned.T
    for strength in REST_STRENGTHS:
        yield (f"rotation and ridge {strength:g}", whole), turned + ridge(old, rest, strength=strength)
    for strength in STRENGTHS:
        matrix = ridge(old, new, strength=strength)
        yield (f"ridge {strength:g}", whole), matrix
        for rank in RANKS:
            if rank < whole and strength == STRENGTHS[1]:
                yield (f"low rank, ridge {strength:g}", rank), reduced(matrix, old, rank=rank)


def procrustes(old: Embeddings, new: Embeddings) -> Matrix:
    """The W with orthonormal rows or columns (whichever are fewer) that brings W x nearest to y (Schönemann, 1966)."""
    left, _, right = np.linalg.svd(new.T.astype(np.float64) @ old.astype(np.float64), full_matrices=False)
    matrix: Matrix = (left @ right).astype(np.float32)
    return matrix


def ridge(old: Embeddings, new: Embeddings, *, strength: float) -> Matrix:
    """The W that minimises the sum of |W x - y|² + λ |W|², λ = strength · trace(Σ x xᵀ) / d_old (Hoerl, Kennard)."""
    x, y = old.astype(np.float64), new.astype(np.float64)
    gram = x.T @ x
    gram += strength * np.trace(gram) / len(gram) * np.eye(len(gram))
    matrix: Matrix = np.linalg.solve(gram, x.T @ y).T.astype(np.float32)
    return matrix


def reduced(matrix: Matrix, old: Embeddings, *, rank: int) -> Matrix:
    """The matrix of that rank whose W x are nearest to those of `matrix`, over (n, d_old) rows.

    Reduced-rank regression, not the truncated matrix: what counts is where the rows lie.
    """
    axes = np.linalg.eigh((matrix @ (old.T @ old) @ matrix.T).astype(np.float64))[1][:, -rank:].astype(np.float32)
    kept: Matrix = axes @ (axes.T @ matrix)
    return kept


def _unit(rows: Matrix) -> Embeddings:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(lengths, 1e-12), np.float32)
