"""Several result lists -> one, by ranks or by scores. Decision-level fusion: nothing is learned, no model is run.

Decisions:
- Pure functions on ids. An id that comes twice in a list counts once, at its best place, and takes one rank only.
- Equal totals are ordered by id, so that the same lists always give the same answer.
- An id that a list does not have gets the least that the list can give: nothing by rank, the lowest normalised score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from mmsearch.errors import UsageError
from mmsearch.types import Hit

CONSTANT = 60
"""Of reciprocal rank fusion: Cormack, Clarke and Büttcher 2009 found that it hardly matters around 60."""

Fused = list[tuple[str, float]]
"""(id, total), the best first."""


def reciprocal_rank_fusion(lists: Iterable[Iterable[str]], *, constant: float = CONSTANT) -> Fused:
    """Merge lists of ids, each best first: a list adds 1 / (constant + rank) (Cormack, Clarke and Büttcher 2009).

    Known value: an id that is first of both of two lists totals 2 / 61. Raises `UsageError` for a constant below 0.
    """
    if not constant >= 0:
        raise UsageError("constant", expected="0 or more", got=str(constant))
    total: dict[str, float] = {}
    for ids in lists:
        for rank, one in enumerate(dict.fromkeys(ids), 1):
            total[one] = total.get(one, 0.0) + 1.0 / (constant + rank)
    return _best_first(total)


def weighted_fusion(
    lists: Sequence[Mapping[str, float]], weights: Sequence[float] | None = None, *, normalise: str = "min-max"
) -> Fused:
    """Merge lists of scores (id -> score, higher is better): Σ weight · normalised score (Fox and Shaw 1994, CombSUM).

    `weights`: one a list, 0 or more; None: all alike. `normalise`: "min-max" takes a list's scores to [0, 1], a list
    of equal scores to 1; "z" to mean 0 and standard deviation 1, equal scores to 0; "none" for scores that are
    comparable as they are. Raises `UsageError` for anything else and for scores that are not finite.
    """
    if normalise not in _NORMALISERS:
        raise UsageError("normalise", expected=" or ".join(_NORMALISERS), got=normalise)
    weights = [1.0] * len(lists) if weights is None else weights
    if len(weights) != len(lists) or not all(0 <= weight < math.inf for weight in weights):
        raise UsageError("weights", expected=f"{len(lists)} numbers of 0 or more", got=str(list(weights))[:60])
    total = dict.fromkeys((one for scores in lists for one in scores), 0.0)
    for scores, weight in zip(lists, weights, strict=True):
        if not all(map(math.isfinite, scores.values())):
            raise UsageError("scores", expected="finite numbers", got="NaN or infinity")
        if scores:
            scaled, absent = _NORMALISERS[normalise](scores)
            for one in total:
                total[one] += weight * scaled.get(one, absent)
    return _best_first(total)


def _best_first(total: Mapping[str, float]) -> Fused:
    return sorted(total.items(), key=lambda pair: (-pair[1], pair[0]))


Scaled = tuple[Mapping[str, float], float]
"""Normalised scores, and what an id gets that is not among them."""


def _min_max(scores: Mapping[str, float]) -> Scaled:
    low, high = min(scores.values()), max(scores.values())
    if low == high:
        return dict.fromkeys(scores, 1.0), 0.0  # being found at all is what such a list says
    return {one: (score - low) / (high - low) for one, score in scores.items()}, 0.0


def _standard(scores: Mapping[str, float]) -> Scaled:
    mean = math.fsum(scores.values()) / len(scores)
    spread = math.sqrt(math.fsum((score - mean) ** 2 for score in scores.values()) / len(scores))
    scaled = {one: (score - mean) / spread if spread else 0.0 for one, score in scores.items()}
    return scaled, min(scaled.values())


def _as_it_is(scores: Mapping[str, float]) -> Scaled:
    return scores, min(scores.values())


_NORMALISERS: Mapping[str, Callable[[Mapping[str, float]], Scaled]] = {
    "min-max": _min_max,
    "z": _standard,
    "none": _as_it_is,
}


def merge_by_rank(lists: Sequence[Sequence[Hit]], k: int) -> list[Hit]:
    """The k best items of several lists by reciprocal rank; each is shown as its best-placed hit."""
    best: dict[str, Hit] = {}
    for hit in (hit for hits in lists for hit in hits):
        if hit.item.id not in best or hit.rank < best[hit.item.id].rank:
            best[hit.item.id] = hit
    fused = reciprocal_rank_fusion([hit.item.id for hit in hits] for hits in lists)
    return [replace(best[name], rank=rank) for rank, (name, _) in enumerate(fused[:k], 1)]
