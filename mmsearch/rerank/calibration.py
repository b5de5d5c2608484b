"""From a score to an honest probability: three calibrations behind one face, and the choice among them.

Decisions:
- A calibration is a strictly rising function from scores to log-odds; the probability is their sigmoid. So calibrated
  log-odds of different models can be compared, and calibrating never makes two hits tie or change places.
- Slopes are kept above 0 (`LEAST_SLOPE`): where labels fall with the score, the honest answer is "no information",
  nearly flat, and never a reversed order.
- Temperature and Platt both aim at Platt's smoothed targets, so that data that can be told apart completely has a
  finite answer (Platt 1999, section 2.2).
- Isotonic joins the middles of its blocks by straight lines in log-odds (the interpolation of Zadrozny and Elkan 2002
  makes it continuous) and goes on outside with Platt's slope: no plateaus.
- What was fitted on balanced pairs says the probability of a pair that is as likely true as false beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmsearch.errors import InputError, ModelError
from mmsearch.evaluate.calibration_error import expected_calibration_error
from mmsearch.rerank.checked import fields, number, numbers
from mmsearch.rerank.fitting import Floats, logistic, minimise, sigmoid

LEAST_SLOPE = 1e-3
"""Log-odds a standard deviation of the scores, at least."""
EDGE = 1e-9
"""Probabilities stay this far from 0 and 1."""


def probability_of(log_odds: ArrayLike) -> Floats:
    """(n,) calibrated log-odds -> probabilities in (0, 1). Known value: 0 -> 0.5."""
    return np.clip(sigmoid(np.asarray(log_odds, np.float64)), EDGE, 1 - EDGE)


class Calibration:
    """Base of all: called with (n,) scores it gives (n,) probabilities in (0, 1), rising with the score."""

    __slots__ = ()
    kind: ClassVar[str]

    def __call__(self, z: ArrayLike) -> Floats:
        """(n,) scores -> (n,) probabilities in (0, 1)."""
        return probability_of(self.log_odds(z))

    def log_odds(self, z: ArrayLike) -> Floats:
        """(n,) scores -> (n,) log-odds, strictly rising; 0 is even."""
        raise NotImplementedError(type(self).__name__)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, `kind` among them."""
        raise NotImplementedError(type(self).__name__)

    @classmethod
    def from_json(cls, values: object) -> Self:
        """Checked values; `ModelError` names the first that cannot be."""
        raise NotImplementedError(cls.__name__)

    @classmethod
    def fit(cls, z: ArrayLike, y: ArrayLike) -> Self:
        """From (n,) scores and (n,) labels of 0 and 1; `InputError` when there is nothing to learn from."""
        raise NotImplementedError(cls.__name__)


@dataclass(frozen=True, slots=True)
class Temperature(Calibration):
    """log-odds = z / temperature (Guo et al. 2017, section 4.2): 0 stays even. Known value: 1 changes nothing."""

    temperature: float
    kind: ClassVar[str] = "temperature"

    def log_odds(self, z: ArrayLike) -> Floats:
        """(n,) scores -> (n,) log-odds."""
        return np.asarray(z, np.float64) / self.temperature

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"kind": self.kind, "temperature": self.temperature}

    @classmethod
    def from_json(cls, values: object) -> Self:
        """Checked values; `ModelError` for a temperature that is not above 0."""
        found = fields(values, ("kind", "temperature"), where=cls.kind)
        return cls(number(found["temperature"], where="temperature", low=0.0, above=True))

    @classmethod
    def fit(cls, z: ArrayLike, y: ArrayLike) -> Self:
        """The temperature of least cross-entropy. Raises `InputError`: see `Platt.fit`."""
        scores, labels = _checked(z, y)
        scale = float(scores.std())
        objective = logistic((scores / scale)[:, None], _smoothed(labels), np.full(len(labels), 1 / len(labels)))
        slope = minimise(objective, np.ones(1), lowest=np.full(1, LEAST_SLOPE))
        return cls(scale / float(slope[0]))


@dataclass(frozen=True, slots=True)
class Platt(Calibration):
    """log-odds = slope · z + offset, slope > 0 (Platt 1999)."""

    slope: float
    offset: float
    kind: ClassVar[str] = "platt"

    def log_odds(self, z: ArrayLike) -> Floats:
        """(n,) scores -> (n,) log-odds."""
        return self.slope * np.asarray(z, np.float64) + self.offset

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"kind": self.kind, "slope": self.slope, "offset": self.offset}

    @classmethod
    def from_json(cls, values: object) -> Self:
        """Checked values; `ModelError` for a slope that is not above 0."""
        found = fields(values, ("kind", "slope", "offset"), where=cls.kind)
        slope = number(found["slope"], where="platt slope", low=0.0, above=True)
        return cls(slope, number(found["offset"], where="platt offset"))

    @classmethod
    def fit(cls, z: ArrayLike, y: ArrayLike) -> Self:
        """Slope and offset of least cross-entropy, by Newton's method (as Lin, Lin and Weng 2007 advise).

        Raises `InputError` for scores that are not finite or all equal, and for labels of one kind only.
        """
        scores, labels = _checked(z, y)
        middle, scale = float(scores.mean()), float(scores.std())
        features = np.stack([(scores - middle) / scale, np.ones_like(scores)], axis=1)
        objective = logistic(features, _smoothed(labels), np.full(len(labels), 1 / len(labels)))
        slope, offset = minimise(objective, np.zeros(2), lowest=np.array([LEAST_SLOPE, -np.inf])).tolist()
        return cls(slope / scale, offset - slope * middle / scale)


@dataclass(frozen=True, slots=True)
class Isotonic(Calibration):
    """Straight lines through (`z`, `odds`), both (b,) and strictly rising, in log-odds; `slope` > 0 outside of them."""

    z: tuple[float, ...]
    odds: tuple[float, ...]
    slope: float
    kind: ClassVar[str] = "isotonic"

    def log_odds(self, z: ArrayLike) -> Floats:
        """(n,) scores -> (n,) log-odds."""
        scores = np.asarray(z, np.float64)
        outside = scores - np.clip(scores, self.z[0], self.z[-1])
        return np.interp(scores, self.z, self.odds) + self.slope * outside

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"kind": self.kind, "z": list(self.z), "odds": list(self.odds), "slope": self.slope}

    @classmethod
    def from_json(cls, values: object) -> Self:
        """Checked values; `ModelError` for points that do not rise."""
        found = fields(values, ("kind", "z", "odds", "slope"), where=cls.kind)
        z = numbers(found["z"], where="isotonic z")
        odds = numbers(found["odds"], where="isotonic odds", length=len(z))
        for name, points in (("z", z), ("odds", odds)):
            if any(b <= a for a, b in pairwise(points)):
                raise ModelError(f"isotonic {name}", expected="rising numbers", got="some that do not rise")
        return cls(z, odds, number(found["slope"], where="isotonic slope", low=0.0, above=True))

    @classmethod
    def fit(cls, z: ArrayLike, y: ArrayLike) -> Self:
        """Blocks by pooling adjacent violators (Ayer et al. 1955; Zadrozny and Elkan 2002).

        A block of only false or only true pairs gets 1 / (n + 2) or (n + 1) / (n + 2), not 0 or 1.
        Raises `InputError`: see `Platt.fit`.
        """
        scores, labels = _checked(z, y)
        middles, shares = _blocks(scores, labels)
        shares = np.clip(shares, 1 / (len(labels) + 2), (len(labels) + 1) / (len(labels) + 2))
        odds = np.log(shares) - np.log1p(-shares)
        return cls(tuple(middles.tolist()), tuple(odds.tolist()), Platt.fit(scores, labels).slope)


_CALIBRATIONS: dict[str, type[Calibration]] = {one.kind: one for one in (Temperature, Platt, Isotonic)}
"""By their names in JSON, the simplest first."""


def calibration_from_json(values: object) -> Calibration:
    """Any of the calibrations; `ModelError` for an unknown kind or values that cannot be."""
    kind = values.get("kind") if isinstance(values, Mapping) else None
    if not isinstance(kind, str) or kind not in _CALIBRATIONS:
        raise ModelError("calibration kind", expected=f"one of {', '.join(_CALIBRATIONS)}", got=repr(kind)[:60])
    return _CALIBRATIONS[kind].from_json(values)


def choose_calibration(
    z: ArrayLike, y: ArrayLike, groups: ArrayLike, *, seed: int = 0
) -> tuple[Calibration, float | None]:
    """The calibration of least cross-validated log loss, fitted on all, and its cross-validated calibration error.

    Two folds by group: `groups` (n,) integers, pairs of one picture share one. Equal losses: the simpler one. Pairs
    too few for two folds: Platt's, and None for the error, which nobody measured. Raises `InputError`: see `Platt.fit`.
    """
    scores, labels = _checked(z, y)
    fold = _first_fold(np.asarray(groups), labels, seed=seed)
    if any(len(set(labels[part])) < 2 or not scores[part].std() > 0 for part in (fold, ~fold)):
        return Platt.fit(scores, labels), None
    best, least, error = Temperature.kind, np.inf, np.nan
    for kind, made in _CALIBRATIONS.items():
        p = np.empty(len(scores))
        for own in (fold, ~fold):
            p[own] = made.fit(scores[~own], labels[~own])(scores[own])
        loss = float(-np.mean(np.log(np.where(labels == 1, p, 1 - p))))
        if loss < least:
            best, least, error = kind, loss, expected_calibration_error(p, labels)
    return _CALIBRATIONS[best].fit(scores, labels), error


def _first_fold(groups: NDArray[Any], labels: Floats, *, seed: int) -> NDArray[np.bool_]:
    """(n,) True for one half of the groups."""
    if groups.shape != labels.shape:
        raise InputError("groups", expected=f"one for each of {len(labels)} pairs", got=f"shape {groups.shape}")
    _, which = np.unique(groups, return_inverse=True)
    half: NDArray[np.bool_] = np.random.default_rng(seed).permutation(int(which.max()) + 1) % 2 == 0
    first: NDArray[np.bool_] = half[which]
    return first


def _checked(z: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats]:
    scores, labels = np.asarray(z, np.float64), np.asarray(y, np.float64)
    if scores.ndim != 1 or scores.shape != labels.shape or not len(scores):
        raise InputError("calibration", expected="a label for each score", got=f"{scores.shape} and {labels.shape}")
    if not np.isfinite(scores).all():
        raise InputError("calibration scores", expected="finite numbers", got=str(scores[~np.isfinite(scores)][0]))
    if set(labels.tolist()) != {0.0, 1.0}:
        kinds = ", ".join(f"{label:g}" for label in np.unique(labels)[:4].tolist())
        raise InputError(
            "calibration labels",
            expected="some 0 and some 1",
            got=kinds,
            do="Give pairs that match and pairs that do not.",
        )
    if not scores.std() > 1e-12 * np.abs(scores).max():
        raise InputError("calibration scores", expected="scores that differ", got=f"{scores[0]:g} for all pairs")
    return scores, labels


def _smoothed(labels: Floats) -> Floats:
    """Platt's targets: (N+ + 1) / (N+ + 2) for true pairs and 1 / (N- + 2) for false ones."""
    true = float(labels.sum())
    false = len(labels) - true
    return np.where(labels == 1, (true + 1) / (true + 2), 1 / (false + 2))


def _blocks(scores: Floats, labels: Floats) -> tuple[Floats, Floats]:
    """(b,) middles and (b,) shares of true pairs of the pooled blocks; both rise strictly. Equal scores are one."""
    different, which = np.unique(scores, return_inverse=True)
    sizes = np.bincount(which).astype(np.float64)
    blocks: list[tuple[float, float, float]] = []  # pairs, sum of labels, sum of scores
    for size, true, z in zip(
        sizes.tolist(), np.bincount(which, weights=labels).tolist(), (sizes * different).tolist(), strict=True
    ):
        block = (size, true, z)
        while blocks and blocks[-1][1] * block[0] >= block[1] * blocks[-1][0]:
            last = blocks.pop()
            block = (last[0] + block[0], last[1] + block[1], last[2] + block[2])
        blocks.append(block)
    count, true_pairs, total = np.array(blocks).T
    return total / count, true_pairs / count
