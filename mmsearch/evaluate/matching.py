"""Do a text and a picture match: how often that is answered rightly, and how honest the stated probability is.

Decisions:
- A pair counts as "yes" from 0.5 on. Pairs are to be balanced (as many true as false), so that 50 % is what guessing
  gets; the share of true pairs is part of the report.
- Intervals resample clusters (pictures), as everywhere in this package: the pairs of one picture are not independent.
  A resampled pair is a weight, so that the pairs are sorted once and not for each of a thousand samples.
- The interval of the calibration error is of a statistic that resampling raises (a sample of a sample is rougher):
  read its upper end as cautious.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mmsearch.errors import InputError
from mmsearch.evaluate.calibration_error import (
    BINS,
    Bin,
    Floats,
    Ints,
    bin_of,
    checked_pairs,
    reliability,
)

YES = 0.5
"""From this probability on the answer is yes."""

_TITLES = {"accuracy": "accuracy", "roc_auc": "ROC AUC", "average_precision": "average precision", "ece": "ECE"}


@dataclass(frozen=True, slots=True)
class Matching:
    """What a matcher's answers to n pairs are worth.

    `values`, all in [0, 1]: `accuracy` at 0.5, `roc_auc`, `average_precision`, `ece` (expected calibration error, 15
    bins, lower is better). `intervals`: their 95 % intervals. `table`: stated against true, bin by bin.
    """

    model: str
    pairs: int
    true_pairs: int
    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    table: tuple[Bin, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON values: counts, the four figures, their 95 % intervals under `ci95`, the reliability table."""
        return {
            "model": self.model,
            "pairs": self.pairs,
            "true_pairs": self.true_pairs,
            **self.values,
            "ci95": {name: list(ends) for name, ends in self.intervals.items()},
            "reliability": [one.to_json() for one in self.table],
        }

    def lines(self) -> Iterator[str]:
        """For people: the four figures in per cent with the ends of their 95 % intervals."""
        yield f"{self.model}: {self.pairs} pairs, {self.true_pairs} of them true"
        for name, value in self.values.items():
            low, high = self.intervals[name]
            yield f"{_TITLES[name]:<18} {100 * value:5.1f}  ({100 * low:.1f} to {100 * high:.1f})"
        yield "In per cent, with 95 % intervals (bootstrap over images)."


def evaluate_matching(
    p: ArrayLike, y: ArrayLike, *, clusters: Ints, model: str, draws: int = 1000, seed: int = 0
) -> Matching:
    """Measure the probabilities `p` (n,) in [0, 1] of pairs that match where `y` (n,) is 1.

    `clusters` (n,): what is drawn together, the picture that a pair was made of. Known values: p = y gives
    1, 1, 1 and an ECE of 0; the same p for all of balanced pairs gives a ROC AUC of 0.5.
    Raises `InputError` for other values, and unless some pairs match and some do not.
    """
    stated, true = checked_pairs(p, y)
    if not 0 < true.sum() < len(true):
        raise InputError("pairs", expected="some that match and some that do not", got=f"{len(true)} of one kind")
    if np.shape(clusters) != true.shape:
        raise InputError("clusters", expected=f"one for each of {len(true)} pairs", got=f"shape {np.shape(clusters)}")
    pairs = _Sorted.of(stated, true)
    values = {name: measure(pairs, np.ones(len(true))) for name, measure in _MEASURES.items()}
    return Matching(
        model=model,
        pairs=len(true),
        true_pairs=int(true.sum()),
        values=values,
        intervals=_intervals(pairs, np.asarray(clusters), draws=draws, seed=seed),
        table=reliability(stated, true),
    )


def roc_auc(p: ArrayLike, y: ArrayLike) -> float:
    """Probability that a true pair stands above a false one, ties counting half. Known value: 0.5 for constant p."""
    return _roc_auc(*_whole(p, y))


def average_precision(p: ArrayLike, y: ArrayLike) -> float:
    """Mean over true pairs of the precision at their place, ties taken together: Σ (recall step) · precision.

    Known values: 1.0 for a perfect order; the share of true pairs for constant p.
    """
    return _average_precision(*_whole(p, y))


@dataclass(frozen=True, slots=True)
class _Sorted:
    """n pairs from the highest probability down. `starts`: where each of the g different probabilities begins."""

    p: Floats
    y: Floats
    starts: Ints
    bins: Ints
    order: Ints

    @classmethod
    def of(cls, p: Floats, y: Floats) -> _Sorted:
        order = np.argsort(-p, kind="stable")
        falling = p[order]
        starts = np.flatnonzero(np.concatenate(([True], np.diff(falling) != 0)))
        return cls(falling, y[order], starts, bin_of(falling, BINS), order)

    def counts(self, weights: Floats) -> tuple[Floats, Floats]:
        """(g,) how many true and how many false pairs have each probability."""
        true = np.add.reduceat(weights * self.y, self.starts)
        return true, np.add.reduceat(weights, self.starts) - true


def _whole(p: ArrayLike, y: ArrayLike) -> tuple[_Sorted, Floats]:
    stated, true = checked_pairs(p, y)
    if not 0 < true.sum() < len(true):
        raise InputError("pairs", expected="some that match and some that do not", got=f"{len(true)} of one kind")
    return _Sorted.of(stated, true), np.ones(len(true))


def _accuracy(pairs: _Sorted, weights: Floats) -> float:
    return float(weights @ ((pairs.p >= YES) == (pairs.y == 1)) / weights.sum())


def _roc_auc(pairs: _Sorted, weights: Floats) -> float:
    true, false = pairs.counts(weights)
    below = false.sum() - np.cumsum(false)
    return float(true @ (below + false / 2) / (true.sum() * false.sum()))


def _average_precision(pairs: _Sorted, weights: Floats) -> float:
    true, false = pairs.counts(weights)
    found = np.cumsum(true)
    seen = found + np.cumsum(false)
    return float(true @ (found / np.maximum(seen, 1)) / true.sum())


def _ece(pairs: _Sorted, weights: Floats) -> float:
    gaps = np.bincount(pairs.bins, weights=weights * (pairs.y - pairs.p), minlength=BINS)
    return float(np.abs(gaps).sum() / weights.sum())


_MEASURES: Mapping[str, Callable[[_Sorted, Floats], float]] = {
    "accuracy": _accuracy,
    "roc_auc": _roc_auc,
    "average_precision": _average_precision,
    "ece": _ece,
}


def _intervals(pairs: _Sorted, clusters: Ints, *, draws: int, seed: int) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap over whole clusters (Efron and Tibshirani, 1993, chapter 13).

    A sample without true or without false pairs has no ROC AUC and is left out.
    """
    _, which = np.unique(clusters, return_inverse=True)
    which, count = which[pairs.order], int(which.max()) + 1
    random = np.random.default_rng(seed)
    found: list[list[float]] = []
    for _ in range(draws):
        weights = np.bincount(random.integers(0, count, count), minlength=count)[which].astype(np.float64)
        if 0 < weights @ pairs.y < weights.sum():
            found.append([measure(pairs, weights) for measure in _MEASURES.values()])
    ends = np.quantile(np.array(found).reshape(-1, len(_MEASURES)), [0.025, 0.975], axis=0)
    return {name: (float(low), float(high)) for name, low, high in zip(_MEASURES, *ends, strict=True)}
