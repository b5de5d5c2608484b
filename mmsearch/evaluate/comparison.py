"""What changed between two models on the same captions and pictures, and whether that is more than chance.

Decisions:
- Paired: both models answer the same queries, so a difference is taken query by query and resampled by groups
  (paired bootstrap; Efron and Tibshirani, 1993, chapter 13). Its interval is much narrower than what two
  separate intervals suggest, because hard queries are hard for both models.
- "rises" and "falls" mean that the 95 % interval of the difference leaves out 0. Each line is judged alone:
  of twenty lines between two equal models one is expected to say so by chance.
- The galleries must be the same: hit@k over other or fewer pictures is another quantity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from mmsearch.errors import UsageError
from mmsearch.evaluate.metrics import Floats, Ints, hit_at, interval
from mmsearch.evaluate.report import DEPTHS, Evaluation

_TITLES = {"text_to_image": "text -> image", "image_to_text": "image -> text"}


class Measured(Protocol):
    """What is known of one model's result: `Evaluation`, or another report of shares."""

    @property
    def model(self) -> str:
        """The model's name."""
        ...

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        ...


M = TypeVar("M", bound=Measured)


class Verdict(StrEnum):
    """What a difference says at the 95 % level; the value is what the user reads."""

    RISES = "rises"
    FALLS = "falls"
    UNCLEAR = "no clear change"


@dataclass(frozen=True, slots=True)
class Difference:
    """One share before and after, in [0, 1]. `low`, `high`: the 95 % interval of after - before, in [-1, 1]."""

    before: float
    after: float
    low: float
    high: float

    @property
    def change(self) -> float:
        """after - before."""
        return self.after - self.before

    @property
    def verdict(self) -> Verdict:
        """Whether the interval of the change lies above 0, below 0, or holds it."""
        if self.low > 0:
            return Verdict.RISES
        return Verdict.FALLS if self.high < 0 else Verdict.UNCLEAR

    def to_json(self) -> dict[str, Any]:
        """JSON values: shares between 0 and 1 and the verdict."""
        return {
            "before": self.before,
            "after": self.after,
            "difference": self.change,
            "ci95": [self.low, self.high],
            "verdict": self.verdict.value,
        }


@dataclass(frozen=True, slots=True)
class Comparison(Generic[M]):
    """Two models measured on the same things. `differences`: part (a direction) -> share (hit@k) -> what changed."""

    before: M
    after: M
    differences: Mapping[str, Mapping[str, Difference]]

    def to_json(self) -> dict[str, Any]:
        """JSON values: both evaluations and their differences."""
        return {
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "differences": {
                part: {name: one.to_json() for name, one in shares.items()} for part, shares in self.differences.items()
            },
        }

    def lines(self) -> Iterator[str]:
        """The before/after table for people: per cent, ± half of the 95 % interval of the difference."""
        yield f"before: {self.before.model}, after: {self.after.model}"
        for part, shares in self.differences.items():
            yield f"{_TITLES.get(part, part):<14} {'before':>7} {'after':>7} {'difference':>14}"
            for name, one in shares.items():
                change = f"{100 * one.change:+.1f} ± {50 * (one.high - one.low):.1f}"
                yield f"{name:<14} {100 * one.before:>7.1f} {100 * one.after:>7.1f} {change:>14}  {one.verdict}"
        yield "In per cent; ± is half of the 95 % interval of the difference (paired bootstrap over images)."


def compare(before: Evaluation, after: Evaluation) -> Comparison[Evaluation]:
    """hit@1, 5 and 10 of both directions, before and after, with 95 % intervals of their differences.

    Both must come from the same captions and pictures in the same order; else `UsageError`.
    Known value: an evaluation compared with itself changes by 0 with the interval (0, 0).
    """
    differences = {}
    for name, way in before.directions.items():
        other = after.directions[name]
        if not np.array_equal(way.clusters, other.clusters):
            raise UsageError(
                f"{before.model} and {after.model}",
                expected="the same pictures and captions measured with both",
                got=f"{before.images} pictures with {before.texts} captions, skipping {len(before.skipped)}, "
                f"and {after.images} with {after.texts}, skipping {len(after.skipped)}",
                do="Leave the skipped pictures out of the pairs.",
            )
        hits = ({f"hit@{k}": hit_at(one.ranked, k) for k in DEPTHS} for one in (way, other))
        differences[name] = differences_of(*hits, clusters=way.clusters)
    return Comparison(before, after, differences)


def differences_of(
    before: Mapping[str, Floats], after: Mapping[str, Floats], *, clusters: Ints
) -> dict[str, Difference]:
    """Share -> what changed. Both have the (q,) values of the same queries; `clusters` (q,): what is drawn together."""
    return {name: _difference(values, after[name], clusters) for name, values in before.items()}


def _difference(before: Floats, after: Floats, clusters: Ints) -> Difference:
    """(q,) values of the same queries; resampling the differences resamples both models' queries alike."""
    low, high = interval(after - before, clusters)
    return Difference(float(before.mean()), float(after.mean()), low, high)
