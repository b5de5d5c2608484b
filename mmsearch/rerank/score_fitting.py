"""Validation lists and pairs -> the scoring that ranks them best and says honest probabilities.

Decisions:
- Weights minimise the listwise softmax cross-entropy (Cao et al. 2007, ListNet with top-one probabilities): what is
  learned is the order within a query's list, as it is used. Several relevant candidates: the logarithm of the sum of
  their shares, so that one of them first is enough. A grid over hit@1, 5 and 10 was not taken: on a few hundred
  queries it follows the noise of single ranks, while the cross-entropy uses every list.
- Weights are not negative: a part that speaks against the truth on a small validation split is left out, not believed
  backwards. When all are, the first part alone keeps the first stage's order.
- Both directions count alike, whatever their numbers of queries: five captions a picture make five times as many
  queries one way as the other.
- A case is fitted on every row that has its parts: pairs with all three parts teach all cases.
- Even odds (z = 0) and the calibration come from pairs, true ones and hard false ones, not from the lists: within a
  list, nothing says how probable the best is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import InputError
from mmsearch.rerank.calibration import Platt, choose_calibration
from mmsearch.rerank.fitting import RIDGE, Objective, minimise
from mmsearch.rerank.scores import CASES, Case, Evidence, Floats, Ints, Scoring

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class CandidateLists:
    """The candidates of many queries, one below the other: m rows in any order.

    `query` (m,): which query a row is a candidate of. `relevant` (m,): True for what the query is after.
    `direction` (m,): any integer, one value a query (0 text -> image, 1 image -> text).
    """

    query: Ints
    evidence: Evidence
    relevant: Bools
    direction: Ints

    def __post_init__(self) -> None:
        _same_length("candidate lists", len(self.evidence), self.query, self.relevant, self.direction)
        _, first, which = np.unique(self.query, return_index=True, return_inverse=True)
        if (self.direction != self.direction[first][which]).any():
            raise InputError("candidate lists", expected="one direction a query", got="a query with two")


@dataclass(frozen=True, slots=True)
class MatchPairs:
    """n pairs of a text and an item. `match` (n,): True for true pairs. `group` (n,): the picture it was made of."""

    evidence: Evidence
    match: Bools
    group: Ints

    def __post_init__(self) -> None:
        _same_length("match pairs", len(self.evidence), self.match, self.group)


def fit_scoring(lists: CandidateLists, pairs: MatchPairs, *, seed: int = 0, fallback: Scoring | None = None) -> Scoring:
    """Weights from `lists`, calibrations from `pairs`, without a cut-off (`cutoff.fit_cutoff`, on its final scores).

    `pairs`: about as many true as false, false ones as hard as those that a search meets. A case that lists or pairs
    have nothing of is taken from `fallback` (the bundled re-ranker's, say), and left out without one.
    Raises `InputError` when there is nothing to fit the case "picture" on.
    """
    cases: dict[str, Case] = {}
    for name, parts in CASES.items():
        rows, sure = lists.evidence.have(parts), pairs.evidence.have(parts)
        if _can_rank(lists, rows) and len(np.unique(pairs.match[sure])) == 2:
            cases[name] = _fit_case(lists, pairs, parts, seed=seed)
        elif fallback is not None and name in fallback.cases:
            cases[name] = fallback.cases[name]
    if "picture" not in cases:
        raise InputError(
            "scoring",
            expected="lists with relevant and other pictures, and true and false pairs, with cosine and logit",
            got=f"{len(lists.evidence)} candidates and {len(pairs.evidence)} pairs without them",
            do="Use a larger validation split.",
        )
    return Scoring(cases)


def _fit_case(lists: CandidateLists, pairs: MatchPairs, parts: tuple[str, ...], *, seed: int) -> Case:
    listed, sure = lists.evidence.have(parts), pairs.evidence.have(parts)
    values = lists.evidence.columns(parts)[listed]
    lists = CandidateLists(
        lists.query[listed], lists.evidence.take(listed), lists.relevant[listed], lists.direction[listed]
    )
    centre, scale = values.mean(axis=0), values.std(axis=0)
    scale = np.where(scale > 1e-9, scale, 1.0)  # a part that never varies: any scale will do
    weights = fit_weights((values - centre) / scale, lists)
    of_pairs = ((pairs.evidence.columns(parts)[sure] - centre) / scale) @ weights
    match, group = pairs.match[sure], pairs.group[sure]
    line = Platt.fit(of_pairs, match)
    bias = line.offset / line.slope
    calibration, ece = choose_calibration(of_pairs + bias, match, group, seed=seed)
    return Case(tuple(centre.tolist()), tuple(scale.tolist()), tuple(weights.tolist()), bias, calibration, ece)


def fit_weights(features: Floats, lists: CandidateLists) -> Floats:
    """(d,) weights >= 0 of (m, d) `features` that give the relevant candidates of each list the largest softmax share.

    Known value: features that say nothing about what is relevant give the first part 1, the others 0.
    """
    objective = listwise(features, lists)
    size = features.shape[1]
    weights = minimise(objective, np.zeros(size), lowest=np.zeros(size))
    return weights if weights.any() else np.eye(size)[0]


def listwise(features: Floats, lists: CandidateLists) -> Objective:
    """Softmax cross-entropy of the lists as a function of weights (d,): mean over queries, directions alike.

    Queries whose candidates are all relevant, or none, say nothing about the order and are left out. Known value:
    log(k) for weights 0, one relevant candidate and lists of k. Its curvature leaves out the relevant ones' own (it
    would make it indefinite), and so bounds the true one from above. Raises `InputError` when no query is left.
    """
    order = np.argsort(lists.query, kind="stable")
    relevant = lists.relevant[order]
    starts = _borders(lists.query[order])
    counts = np.add.reduceat(relevant.astype(np.int64), starts)
    sizes = np.diff(np.append(starts, len(order)))
    kept = np.repeat((counts > 0) & (counts < sizes), sizes)
    if not kept.any():
        raise InputError("candidate lists", expected="a query with relevant and other candidates", got="none")
    order, relevant = order[kept], relevant[kept]
    of_all = _Softmax(lists.query[order], features[order])
    of_relevant = _Softmax(lists.query[order][relevant], features[order][relevant])
    share = _shares(lists.direction[order][of_all.starts])

    def at(w: Floats) -> tuple[float, Floats, Floats]:
        total, slope, curvature = of_all.at(w, share)
        found, found_slope, _ = of_relevant.at(w, share)
        value = total - found + RIDGE / 2 * float(w @ w)
        return value, slope - found_slope + RIDGE * w, curvature + RIDGE * np.eye(len(w))

    return at


class _Softmax:
    """Σ share · log Σ exp(w · x) over rows (m, d) that belong to queries (m,), ascending; as a function of w."""

    def __init__(self, query: Ints, rows: Floats) -> None:
        self.rows, self.starts = rows, _borders(query)
        self.owner = np.repeat(np.arange(len(self.starts)), np.diff(np.append(self.starts, len(query))))

    def at(self, w: Floats, share: Floats) -> tuple[float, Floats, Floats]:
        scores = self.rows @ w
        highest = np.maximum.reduceat(scores, self.starts)
        powers = np.exp(scores - highest[self.owner])
        sums = np.add.reduceat(powers, self.starts)
        p = powers / sums[self.owner]
        means = np.add.reduceat(self.rows * p[:, None], self.starts)
        spread = (self.rows * (p * share[self.owner])[:, None]).T @ self.rows - (means * share[:, None]).T @ means
        return float(share @ (highest + np.log(sums))), share @ means, spread


def _shares(direction: Ints) -> Floats:
    """(q,) weights of queries that sum to 1, every direction to the same."""
    _, which, counts = np.unique(direction, return_inverse=True, return_counts=True)
    return 1.0 / (counts[which] * len(counts))


def _borders(ascending: Ints) -> Ints:
    """(q,) where each query's rows begin."""
    return np.flatnonzero(np.concatenate(([True], ascending[1:] != ascending[:-1]))).astype(np.int64)


def _can_rank(lists: CandidateLists, rows: Bools) -> bool:
    """Whether a query has both relevant and other candidates among `rows` (m,)."""
    relevant = np.unique(lists.query[rows & lists.relevant])
    return bool(np.isin(lists.query[rows & ~lists.relevant], relevant).any())


def _same_length(where: str, length: int, *arrays: NDArray[np.generic]) -> None:
    for array in arrays:
        if array.shape != (length,):
            raise InputError(where, expected=f"{length} values in each array", got=f"shape {array.shape}")
