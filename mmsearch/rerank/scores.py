"""What is known of a text and an item -> one final score and an honest probability.

Decisions:
- An item is scored by what it has. Each case (which parts are there) has a linear model of its own, with its own
  calibration; a row is scored by the first case of `CASES` whose parts are all there and that was fitted.
- The final score is calibrated log-odds: within a case it rises strictly with the linear model (no plateaus, so no
  ties that the model did not make), and between cases it is comparable, because even odds are even odds.
- Parts are standardised by stored means and spreads, so that weights can be compared and a contribution of 0 is
  what a usual candidate has.
- What every part contributed adds up to the final score; the bend of the calibration is a part of its own.
- No torch: the cold query path reads these values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmsearch.errors import InputError, ModelError
from mmsearch.rerank.calibration import Calibration, calibration_from_json, probability_of
from mmsearch.rerank.checked import fields, number, numbers
from mmsearch.rerank.cutoff import Cutoff

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

PARTS = ("cosine", "logit", "text_cosine", "rarity")

CASES: Mapping[str, tuple[str, ...]] = {
    "both": ("cosine", "logit", "text_cosine", "rarity"),
    "picture": ("cosine", "logit", "rarity"),
    "text": ("text_cosine",),
    "cosine": ("cosine", "rarity"),
}
"""Which parts each case reads. "cosine": a picture that the second stage has not read (too deep, or not readable)."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of m candidates, all (m,) float64, NaN where a part is missing.

    `cosine`: of the text's row and the picture's, in [-1, 1]. `logit`: the second stage's "they match". `text_cosine`:
    of the query text and the item's best text, in [-1, 1]. `rarity`: how little the candidate has in common with
    queries in general (`commonness.rarity`), in [-1, 1]; 0 for all where there is no bank to say so.
    """

    cosine: Floats
    logit: Floats
    text_cosine: Floats
    rarity: Floats

    def __post_init__(self) -> None:
        shapes = {getattr(self, part).shape for part in PARTS}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise InputError("evidence", expected="parts of one length", got=str(sorted(shapes)))
        for part in PARTS:
            if np.isinf(getattr(self, part)).any():
                raise InputError(f"evidence, {part}", expected="finite numbers, or NaN where it is missing", got="inf")

    @classmethod
    def of(
        cls,
        *,
        cosine: ArrayLike | None = None,
        logit: ArrayLike | None = None,
        text_cosine: ArrayLike | None = None,
        rarity: ArrayLike | None = None,
    ) -> Self:
        """From any (m,) numbers; a part that is left out is missing for all, a rarity that is left out is 0."""
        parts = (cosine, logit, text_cosine, rarity)
        given = [None if part is None else np.asarray(part, np.float64) for part in parts]
        shape = next((part.shape for part in given if part is not None), (0,))
        absent = (np.nan, np.nan, np.nan, 0.0)
        return cls(*(np.full(shape, a) if part is None else part for a, part in zip(absent, given, strict=True)))

    def __len__(self) -> int:
        return len(self.cosine)

    def take(self, rows: ArrayLike) -> Evidence:
        """Those at `rows`: positions (k,) or a mask (m,)."""
        return Evidence(*(getattr(self, part)[rows] for part in PARTS))

    def columns(self, parts: tuple[str, ...]) -> Floats:
        """(m, len(parts)) float64."""
        return np.stack([getattr(self, part) for part in parts], axis=1)

    def have(self, parts: tuple[str, ...]) -> NDArray[np.bool_]:
        """(m,) True where all of `parts` are there."""
        there: NDArray[np.bool_] = np.all(~np.isnan(self.columns(parts)), axis=1)
        return there


@dataclass(frozen=True, slots=True)
class Case:
    """A linear model z = bias + Σ weight · (part - centre) / scale, and its calibration.

    One number a part in `centre`, `scale` (> 0) and `weights` (>= 0). z = 0 where a balanced pair is even.
    `ece`: cross-validated expected calibration error, in [0, 1]; None when the pairs were too few to measure it.
    """

    centre: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float
    calibration: Calibration
    ece: float | None

    def contributions(self, values: Floats) -> Floats:
        """(m, parts) what each part adds to z."""
        each: Floats = np.asarray(self.weights) * (values - np.asarray(self.centre)) / np.asarray(self.scale)
        return each

    def z(self, values: Floats) -> Floats:
        """(m, parts) -> (m,) values of the linear model."""
        total: Floats = self.bias + self.contributions(values).sum(axis=1)
        return total

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain = {name: list(getattr(self, name)) for name in ("centre", "scale", "weights")}
        return {**plain, "bias": self.bias, "calibration": self.calibration.to_json(), "ece": self.ece}

    @classmethod
    def from_json(cls, values: object, *, name: str) -> Self:
        """Checked values of the case `name`; `ModelError` names the first that cannot be."""
        where = f"scoring, {name}"
        found = fields(values, ("centre", "scale", "weights", "bias", "calibration", "ece"), where=where)
        length = len(CASES[name])
        return cls(
            numbers(found["centre"], where=f"{where}, centre", length=length),
            numbers(found["scale"], where=f"{where}, scale", length=length, low=0.0, above=True),
            numbers(found["weights"], where=f"{where}, weights", length=length, low=0.0),
            number(found["bias"], where=f"{where}, bias"),
            calibration_from_json(found["calibration"]),
            None if found["ece"] is None else number(found["ece"], where=f"{where}, ece", low=0.0, high=1.0),
        )


@dataclass(frozen=True, slots=True)
class Scoring:
    """How evidence becomes a final score. `cases`: name -> model, "picture" always; `cutoff`: None when not fitted."""

    cases: Mapping[str, Case]
    cutoff: Cutoff | None = None

    def __post_init__(self) -> None:
        if "picture" not in self.cases or not set(self.cases) <= set(CASES):
            known = ", ".join(CASES)
            raise ModelError("scoring", expected=f"picture and others of {known}", got=", ".join(self.cases) or "none")

    def covers(self, evidence: Evidence) -> NDArray[np.bool_]:
        """(m,) True where a fitted case has all that it reads."""
        return self._case_of(evidence) >= 0

    def final(self, evidence: Evidence) -> Floats:
        """(m,) calibrated log-odds; higher is better, 0 is even, comparable between cases.

        Raises `InputError` for a candidate that no fitted case covers.
        """
        found = np.empty(len(evidence))
        for _, case, rows, values in self._by_case(evidence):
            found[rows] = case.calibration.log_odds(case.z(values))
        return found

    def probability(self, evidence: Evidence) -> Floats:
        """(m,) probabilities in (0, 1) that text and item match: `probability_of(final)`. Raises as `final` does."""
        return probability_of(self.final(evidence))

    def parts(self, evidence: Evidence) -> dict[str, Floats]:
        """What the final score is made of, each (m,): `bias`, every part (NaN where it was not read), `calibration`.

        Those that are not NaN add up to `final`. Raises as `final` does.
        """
        found = {name: np.full(len(evidence), np.nan) for name in ("bias", *PARTS, "calibration")}
        for name, case, rows, values in self._by_case(evidence):
            z = case.z(values)
            found["bias"][rows] = case.bias
            for part, column in zip(CASES[name], case.contributions(values).T, strict=True):
                found[part][rows] = column
            found["calibration"][rows] = case.calibration.log_odds(z) - z
        return found

    def _case_of(self, evidence: Evidence) -> Ints:
        """(m,) position in `CASES` of the case that scores a row, -1 where there is none."""
        which = np.full(len(evidence), -1, dtype=np.int64)
        for place, (name, parts) in enumerate(CASES.items()):
            if name in self.cases:
                which[(which < 0) & evidence.have(parts)] = place
        return which

    def _by_case(self, evidence: Evidence) -> list[tuple[str, Case, Ints, Floats]]:
        """Per case that is there: name, model, rows (k,), values (k, parts)."""
        which = self._case_of(evidence)
        if (which < 0).any():
            row = int(np.flatnonzero(which < 0)[0])
            there = [part for part in PARTS if not np.isnan(getattr(evidence, part)[row])]
            raise InputError(
                f"candidate {row}",
                expected=" or ".join(" + ".join(CASES[name]) for name in CASES if name in self.cases),
                got=" + ".join(there) or "nothing",
                do="This re-ranker was not fitted for such items.",
            )
        found = []
        for place, (name, parts) in enumerate(CASES.items()):
            rows = np.flatnonzero(which == place)
            if len(rows):
                found.append((name, self.cases[name], rows, evidence.columns(parts)[rows]))
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` reads them back to an equal scoring."""
        return {
            "cases": {name: self.cases[name].to_json() for name in CASES if name in self.cases},
            "cutoff": None if self.cutoff is None else self.cutoff.to_json(),
        }

    @classmethod
    def from_json(cls, values: object) -> Self:
        """Checked values; `ModelError` names the first that cannot be."""
        found = fields(values, ("cases", "cutoff"), where="scoring")
        cases = found["cases"]
        if not isinstance(cases, Mapping) or not set(cases) <= set(CASES):
            raise ModelError("scoring, cases", expected=f"an object of {', '.join(CASES)}", got=repr(cases)[:60])
        cutoff = None if found["cutoff"] is None else Cutoff.from_json(found["cutoff"])
        return cls({name: Case.from_json(cases[name], name=name) for name in cases}, cutoff)
