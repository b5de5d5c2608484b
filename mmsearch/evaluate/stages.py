"""What a second stage is worth on pairs: order, yes and no, and knowing that nothing matches.

Decisions:
- True pairs are each caption with its picture; the false one of each is drawn, by a fixed seed, from the first stage's
  best pictures of other groups: as many of both, and false ones as hard as a search meets.
- "Nothing matches" is asked twice of each caption: with its pictures in the gallery, where hits must stay, and without
  them, where none may. A caption whose picture is not among the candidates was not found, but it is there: it counts as
  present. In a gallery of everyday photos something else may well fit a caption whose own picture is gone, so captions
  of another collection can be asked as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmsearch.evaluate.comparison import Comparison
from mmsearch.evaluate.matching import Matching, evaluate_matching
from mmsearch.evaluate.metrics import Floats, Ints, interval
from mmsearch.evaluate.report import Evaluation
from mmsearch.evaluate.reranked import Candidates, drawn_apart
from mmsearch.rerank.cutoff import Cutoff


@dataclass(frozen=True, slots=True)
class Absence:
    """Shares in [0, 1] and their 95 % intervals: of present queries that a cut-off lets through, of absent ones that it
    turns away.

    `strangers`: captions of another collection that were asked; `strangers_rejected`: the share of them turned away.
    """

    queries: int
    kept: float
    rejected: float
    intervals: dict[str, tuple[float, float]]
    strangers: int = 0
    strangers_rejected: float | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        shares = {"queries": self.queries, "kept": self.kept, "rejected": self.rejected}
        more = {"strangers": self.strangers, "strangers_rejected": self.strangers_rejected}
        return {**shares, **more, "ci95": {name: list(ends) for name, ends in self.intervals.items()}}

    def lines(self) -> Iterator[str]:
        """For people, in per cent."""
        yield f"cut-off (--auto): {self.queries} captions, with their picture in the gallery and without it"
        titles = {"kept": "answered, there", "rejected": "turned away, absent"}
        if self.strangers_rejected is not None:
            titles["strangers_rejected"] = f"turned away of {self.strangers} strange ones"
        for name, title in titles.items():
            low, high = self.intervals[name]
            yield f"{title:<32} {100 * getattr(self, name):5.1f}  ({100 * low:.1f} to {100 * high:.1f})"


@dataclass(frozen=True, slots=True)
class Stages(Comparison[Evaluation]):
    """The first stage alone and both. `matching` is None where no caption has a rival, `absence` without a cut-off."""

    matching: Matching | None = None
    absence: Absence | None = None

    def to_json(self) -> dict[str, Any]:
        """As a comparison, with `matching` and `absence`."""
        more = {"matching": self.matching, "absence": self.absence}
        found = Comparison.to_json(self)
        return {**found, **{name: None if one is None else one.to_json() for name, one in more.items()}}

    def lines(self) -> Iterator[str]:
        """As a comparison, then what is known of yes and no."""
        yield from Comparison.lines(self)
        for one in (self.matching, self.absence):
            if one is not None:
                yield ""
                yield from one.lines()


def hard_rivals(found: Candidates, *, text_groups: Ints, image_groups: Ints, seed: int = 0) -> Ints:
    """(m,) for each caption the place in its list of `found` of a picture of another group, by `seed`; -1: none."""
    return drawn_apart(image_groups[found.rows] != text_groups[:, None], np.random.default_rng(seed))


def matched(true: Floats, false: Floats, *, owners: Ints, model: str) -> Matching | None:
    """(m,) probabilities of true pairs and of their rivals, NaN where there is none; `owners` (m,): their pictures."""
    there = ~np.isnan(false)
    if not there.any():
        return None
    stated = np.concatenate([true[there], false[there]])
    labels = np.repeat([1.0, 0.0], int(there.sum()))
    return evaluate_matching(stated, labels, clusters=np.tile(owners[there], 2), model=f"{model}, yes or no")


def cut_off(
    cutoff: Cutoff | None,
    found: Candidates,
    *,
    text_groups: Ints,
    image_groups: Ints,
    owners: Ints,
    strangers: Floats | None = None,
) -> Absence | None:
    """Every caption asked of all its candidates, and of those of other groups; None without a cut-off or a rival.

    `strangers` (s, n): final scores of the candidates of captions whose pictures are in another collection.
    """
    if cutoff is None or found.final is None:
        return None
    kept, rejected, asked = [], [], []
    for place, (rows, final) in enumerate(zip(found.rows, found.final, strict=True)):
        others = final[image_groups[rows] != text_groups[place]]
        if len(others):
            kept.append(cutoff.decide(_falling(final)) > 0)
            rejected.append(cutoff.decide(_falling(others)) == 0)
            asked.append(owners[place])
    if not asked:
        return None
    shares = {name: np.array(values, np.float64) for name, values in (("kept", kept), ("rejected", rejected))}
    ends = {name: interval(values, np.array(asked, np.int64)) for name, values in shares.items()}
    known = Absence(len(asked), float(shares["kept"].mean()), float(shares["rejected"].mean()), ends)
    if strangers is None or not len(strangers):
        return known
    gone = np.array([cutoff.decide(_falling(final)) == 0 for final in strangers], np.float64)
    ends = {**ends, "strangers_rejected": interval(gone, np.arange(len(gone)))}
    return replace(known, intervals=ends, strangers=len(gone), strangers_rejected=float(gone.mean()))


def _falling(scores: NDArray[np.float64]) -> Floats:
    return np.sort(scores)[::-1]
