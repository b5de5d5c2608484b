"""Retrieval metrics as pure functions of ranks, and the ranks themselves from embeddings.

Decisions:
- Ranks are pessimistic: a candidate that scores as high as a relevant one stands before it. A model
  that gives every candidate the same score gets the worst rank, not the best.
- Scores closer than `TIE` are ties: the same dot product comes out a rounding error apart in matrix
  products of different shapes, and a result must not depend on the block size.
- hit@k asks for at least one relevant candidate among the first k (CLIP papers print it as R@k);
  recall@k is the share of the relevant ones found there. They differ for image→text, where five
  captions are relevant.
- The score matrix exists in blocks only: (block, block) floats, whatever n and m are.
- Confidence intervals resample images, not queries: the five captions of one image are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import UsageError
from mmsearch.types import Embeddings

TIE = 1e-6
"""Cosines closer than this are the same cosine."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Ranked:
    """Ranks of every relevant candidate of every query, 1 = best.

    `ranks`: (p,) int64, ascending within a query. `starts`: (q + 1,) int64, query i owns
    `ranks[starts[i]:starts[i + 1]]`. Every query has at least one relevant candidate.
    """

    ranks: Ints
    starts: Ints

    def __post_init__(self) -> None:
        """Refuse a query without relevant candidates: it has no rank to average."""
        if len(self.starts) < 2 or self.starts[0] != 0 or self.starts[-1] != len(self.ranks):
            raise UsageError("ranks", expected="at least one query", got=f"{len(self.starts)} borders")
        if (np.diff(self.starts) < 1).any():
            row = int(np.flatnonzero(np.diff(self.starts) < 1)[0])
            raise UsageError(f"query {row}", expected="at least one relevant candidate", got="none")

    @classmethod
    def of(cls, ranks: Sequence[Sequence[int]]) -> Ranked:
        """From plain lists, one a query: `Ranked.of([[1], [2, 7]])`."""
        counts = np.array([len(row) for row in ranks], dtype=np.int64)
        flat = np.array([rank for row in ranks for rank in sorted(row)], dtype=np.int64)
        return cls(flat, np.concatenate(([0], np.cumsum(counts))).astype(np.int64))

    @property
    def first(self) -> Ints:
        """(q,) rank of the best relevant candidate."""
        return self.ranks[self.starts[:-1]]

    @property
    def relevant(self) -> Ints:
        """(q,) number of relevant candidates."""
        return np.diff(self.starts)

    def summed(self, values: Floats) -> Floats:
        """Sum (p,) values over each query: -> (q,)."""
        return np.add.reduceat(values, self.starts[:-1])


def hit_at(ranked: Ranked, k: int) -> Floats:
    """(q,) 1.0 where at least one relevant candidate is among the first k."""
    return (ranked.first <= _positive(k)).astype(np.float64)


def recall_at(ranked: Ranked, k: int) -> Floats:
    """(q,) share of the relevant candidates that are among the first k."""
    found = ranked.summed((ranked.ranks <= _positive(k)).astype(np.float64))
    return found / ranked.relevant


def reciprocal_rank_at(ranked: Ranked, k: int) -> Floats:
    """(q,) 1 / rank of the best relevant candidate, 0 beyond k. Its mean is MRR@k."""
    return np.where(ranked.first <= _positive(k), 1.0 / ranked.first, 0.0)


def ndcg_at(ranked: Ranked, k: int) -> Floats:
    """(q,) normalised discounted cumulative gain with gains 0 and 1 (Järvelin and Kekäläinen, 2002).

    A gain at rank r counts 1 / log2(1 + r); 1.0 when the first ranks are all relevant.
    Known value: one relevant candidate at rank 3 -> 0.5.
    """
    gains = np.where(ranked.ranks <= _positive(k), 1.0 / np.log2(1.0 + ranked.ranks), 0.0)
    ideal = np.concatenate(([0.0], np.cumsum(1.0 / np.log2(2.0 + np.arange(k)))))
    return ranked.summed(gains) / ideal[np.minimum(ranked.relevant, k)]


def rank_groups(
    queries: Embeddings,
    candidates: Embeddings,
    *,
    query_groups: Ints,
    candidate_groups: Ints,
    block: int = 2048,
) -> Ranked:
    """Rank every candidate of a query's own group among all candidates.

    `queries` (q, d) and `candidates` (n, d): unit rows. `query_groups` (q,), `candidate_groups` (n,):
    a candidate is relevant to the queries of its group, and at least one must be. Ties: see the
    module's decisions; relevant candidates that tie with each other take successive ranks.
    Memory: two (block, block) arrays beside the input.
    """
    relevant, starts = _relevant(query_groups, candidate_groups)
    counts = np.diff(starts)
    ranks = np.empty(len(relevant), dtype=np.int64)
    for low in range(0, len(queries), block):
        high = min(low + block, len(queries))
        part, pairs = queries[low:high], slice(int(starts[low]), int(starts[high]))
        owner = np.repeat(np.arange(high - low), counts[low:high])  # which query of the block a pair is of
        scores = np.einsum("pd,pd->p", part[owner], candidates[relevant[pairs]])
        order = np.lexsort((-scores, owner))  # best first within each query; `owner` itself stays as it is
        place = np.arange(len(owner)) - (starts[low:high] - starts[low])[owner]  # 0, 1, ... of each query
        own = relevant[pairs][order]
        ahead = _ahead(part, candidates, owner=owner, scores=scores[order], own=own, block=block)
        ranks[pairs] = ahead + place + 1
    return Ranked(ranks, starts)


def interval(
    values: Floats, clusters: Ints, *, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap confidence interval of the mean of `values` (q,), resampling whole clusters (q,).

    Percentile method (Efron and Tibshirani, 1993, chapter 13): `draws` samples of as many clusters as
    there are, drawn with replacement; the mean of each; its quantiles. One cluster gives (mean, mean).
    """
    if len(values) != len(clusters) or len(values) == 0:
        raise UsageError("clusters", expected=f"one for each of {len(values)} values", got=str(len(clusters)))
    _, which = np.unique(clusters, return_inverse=True)
    sums, sizes = np.bincount(which, weights=values), np.bincount(which)
    random = np.random.default_rng(seed)
    means = np.empty(draws)
    for draw in range(draws):
        picked = random.integers(0, len(sums), len(sums))
        means[draw] = sums[picked].sum() / sizes[picked].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _positive(k: int) -> int:
    if k < 1:
        raise UsageError("k", expected="1 or more", got=str(k))
    return k


def _relevant(query_groups: Ints, candidate_groups: Ints) -> tuple[Ints, Ints]:
    """Candidates of each query's group: ((p,) candidate rows, (q + 1,) borders)."""
    by_group = np.argsort(candidate_groups, kind="stable")
    ordered = candidate_groups[by_group]
    low = np.searchsorted(ordered, query_groups, side="left")
    counts = np.searchsorted(ordered, query_groups, side="right") - low
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
    within = np.arange(starts[-1]) - np.repeat(starts[:-1], counts)
    rows: Ints = by_group[np.repeat(low, counts) + within].astype(np.int64)
    return rows, starts


def _ahead(part: Embeddings, candidates: Embeddings, *, owner: Ints, scores: Embeddings, own: Ints, block: int) -> Ints:
    """(p,) how many candidates outside a query's group score at least as high as each of its relevant ones.

    `part` (b, d) queries. The pairs: `owner` (p,) row of `part`, ascending; `own` (p,) candidate row;
    `scores` (p,) their cosine.
    """
    ahead = np.zeros(len(owner), dtype=np.int64)
    place = np.arange(len(owner)) - np.searchsorted(owner, owner)
    slots = [np.flatnonzero(place == slot) for slot in range(int(place.max()) + 1)]  # a query once in each
    for low in range(0, len(candidates), block):
        cosines = part @ candidates[low : low + block].T  # (b, block)
        mine = (own >= low) & (own < low + block)
        cosines[owner[mine], own[mine] - low] = -np.inf
        for pairs in slots:
            rivals = cosines if len(pairs) == len(part) else cosines[owner[pairs]]
            ahead[pairs] += np.count_nonzero(rivals >= (scores[pairs] - TIE)[:, None], axis=1)
    return ahead
