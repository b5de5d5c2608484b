"""How many hits of a ranked list to show: none when nothing in the collection matches.

Decisions:
- Presence is judged from the whole list, not from the best score alone: a query of rare words has low scores
  everywhere, one of common words high ones; what stands out from its own list is there. Three numbers: the best
  score, its lead over the median of the others, the same lead in standard deviations of the others.
- None of the weights is negative: a better best hit never makes a query look more absent.
- The threshold keeps a stated share of queries that have an answer (`keep`): hiding what is there is the worse error.
- After that a hit stays while its odds are at least a stated fraction of the best hit's: in log-odds, at most
  `margin` below. Odds and not probabilities: among probabilities near 1 a fraction tells nothing apart.
- Lists are looked at down to the depth they were fitted at: the median of 200 candidates is lower than that of 64.
- The shares that a cut-off reports are those of the queries it was fitted on: four numbers from hundreds of queries.
  Measure on others before quoting them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from mmsearch.errors import InputError, ModelError, UsageError
from mmsearch.rerank.checked import fields, number, numbers
from mmsearch.rerank.fitting import RIDGE, Floats, logistic, minimise

FEW = 4
"""With fewer others in a list its median says nothing; the lead is then taken to be a usual one."""
MARGIN = math.log(10.0)
"""Without labels: a hit stays while its odds are a tenth of the best one's."""
DEPTH = 64

_FEATURES = 3


@dataclass(frozen=True, slots=True)
class Cutoff:
    """Judges ranked final scores (log-odds, best first).

    `centre`, `scale`, `weights`: three numbers each, for the best score, its lead over the median, that lead in
    standard deviations. `threshold`: of their sum, from which on a query counts as present. `margin`: how far below
    the best a hit may be, in log-odds. `depth`: how many scores are looked at. `kept`, `rejected`: shares of present
    queries kept and of absent ones rejected when it was fitted.
    """

    centre: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    threshold: float
    margin: float
    depth: int
    kept: float
    rejected: float

    def presence(self, scores: ArrayLike) -> float:
        """How far above the threshold a query is: 0 or more means present. `scores` (m,) best first, m >= 1.

        Raises `InputError` for scores that are not finite or not best first.
        """
        features = (_features(scores, depth=self.depth) - self.centre) / self.scale
        return float(np.nan_to_num(features) @ self.weights) - self.threshold

    def decide(self, scores: ArrayLike) -> int:
        """How many of (m,) `scores`, best first, to show; 0: nothing matches. Known value: 0 for an empty list."""
        ranked = np.asarray(scores, np.float64)
        if not ranked.size or self.presence(ranked) < 0:
            return 0
        return int(np.count_nonzero(ranked >= ranked[0] - self.margin))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` reads them back to an equal cut-off."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: object) -> Self:
        """Checked values; `ModelError` names the first that cannot be."""
        found = fields(values, tuple(cls.__dataclass_fields__), where="cut-off")
        depth = found["depth"]
        if type(depth) is not int or depth < 1:
            raise ModelError("cut-off depth", expected="a whole number from 1", got=repr(depth)[:60])
        return cls(
            centre=numbers(found["centre"], where="cut-off centre", length=_FEATURES),
            scale=numbers(found["scale"], where="cut-off scale", length=_FEATURES, low=0.0, above=True),
            weights=numbers(found["weights"], where="cut-off weights", length=_FEATURES, low=0.0),
            threshold=number(found["threshold"], where="cut-off threshold"),
            margin=number(found["margin"], where="cut-off margin", low=0.0),
            depth=depth,
            kept=number(found["kept"], where="cut-off kept", low=0.0, high=1.0),
            rejected=number(found["rejected"], where="cut-off rejected", low=0.0, high=1.0),
        )


def fit_cutoff(
    present: Sequence[ArrayLike],
    absent: Sequence[ArrayLike],
    *,
    relevant: Sequence[ArrayLike] | None = None,
    keep: float = 0.9,
    depth: int = DEPTH,
) -> Cutoff:
    """From final scores of queries that have an answer in the collection and of queries that have none.

    Both: one (m,) array a query, best first. `relevant`: for each present query a (m,) mask of its right hits; then
    `margin` is the smallest that shows the best right hit of the share `keep` of the queries that have one listed, and
    ln 10 without. `keep` in (0, 1]: the share of present queries that is kept, at least.
    Raises `InputError` when there are no queries of a kind, or lists that are empty, not finite or not best first.
    """
    if not 0 < keep <= 1:
        raise UsageError("keep", expected="above 0, at most 1", got=str(keep))
    if depth < 1:
        raise UsageError("depth", expected="1 or more", got=str(depth))
    if not len(present) or not len(absent):
        raise InputError(
            "cut-off",
            expected="queries with an answer and queries without",
            got=f"{len(present)} and {len(absent)}",
            do="Take queries from another collection as absent ones.",
        )
    rows = np.stack([_features(one, depth=depth) for one in (*present, *absent)])
    centre, scale = _standard(rows)
    features = np.nan_to_num((rows - centre) / scale)
    here = np.arange(len(rows)) < len(present)
    balance = np.where(here, 0.5 / len(present), 0.5 / len(absent))
    objective = logistic(np.column_stack([features, np.ones(len(rows))]), here.astype(np.float64), balance, ridge=RIDGE)
    lowest = np.array([0.0] * _FEATURES + [-np.inf])
    weights = minimise(objective, np.zeros(_FEATURES + 1), lowest=lowest)[:_FEATURES]
    if not weights.any():
        weights = np.eye(_FEATURES)[0]  # nothing tells them apart: the best score alone, then
    sums = features @ weights
    falling = np.sort(sums[here])[::-1]
    threshold = float(falling[math.ceil(keep * len(present) - 1e-9) - 1])
    return Cutoff(
        centre=tuple(centre.tolist()),
        scale=tuple(scale.tolist()),
        weights=tuple(weights.tolist()),
        threshold=threshold - 1e-9 * max(1.0, abs(threshold)),  # a rounding error must not turn the last one away
        margin=MARGIN if relevant is None else _margin(present, relevant, keep=keep),
        depth=depth,
        kept=float(np.mean(sums[here] >= threshold)),
        rejected=float(np.mean(sums[~here] < threshold)),
    )


def _features(scores: ArrayLike, *, depth: int) -> Floats:
    """(3,) best score, lead over the median of the others, lead in their standard deviations; NaN without others."""
    ranked = np.asarray(scores, np.float64)
    if ranked.ndim != 1 or not len(ranked) or not np.isfinite(ranked).all() or (np.diff(ranked) > 0).any():
        raise InputError("ranked scores", expected="one or more finite numbers, best first", got=str(ranked)[:60])
    best, others = ranked[0], ranked[1:depth]
    if len(others) < FEW:
        return np.array([best, np.nan, np.nan])
    spread = float(others.std())
    lead = float(best - np.median(others))
    return np.array([best, lead, lead / spread if spread > 1e-9 else np.nan])


def _standard(rows: Floats) -> tuple[Floats, Floats]:
    """(3,) means and (3,) spreads of what is there; 0 and 1 for what never is."""
    there = ~np.isnan(rows)
    counts = np.maximum(there.sum(axis=0), 1)
    centre = np.where(there, rows, 0.0).sum(axis=0) / counts
    spread = np.sqrt(np.where(there, (rows - centre) ** 2, 0.0).sum(axis=0) / counts)
    return centre, np.where(spread > 1e-9, spread, 1.0)


def _margin(present: Sequence[ArrayLike], relevant: Sequence[ArrayLike], *, keep: float) -> float:
    if len(relevant) != len(present):
        raise InputError("relevant", expected=f"a mask for each of {len(present)} queries", got=str(len(relevant)))
    below: list[float] = []
    for scores, mask in zip(present, relevant, strict=True):
        ranked, right = np.asarray(scores, np.float64), np.asarray(mask, bool)
        if ranked.shape != right.shape:
            raise InputError("relevant", expected=f"{len(ranked)} values", got=f"shape {right.shape}")
        if right.any():
            below.append(float(ranked[0] - ranked[right][0]))
    if not below:
        return MARGIN
    margin = sorted(below)[math.ceil(keep * len(below) - 1e-9) - 1]
    return margin + 1e-9 * max(1.0, margin)
