"""Search parameters for a stated overlap with exact search, found and judged with real queries.

Decisions:
- What is tuned on is what will be asked: text vectors for text queries. Stored rows as queries (what peers do) are
  found far more easily than texts, so parameters tuned on them miss a large part of what texts ask for.
- Half of the queries choose the parameters, the other half is what the reported overlap is measured on.
- For each number of candidates the smallest number of probes (or effort) that reaches the target is found by bisection,
  and of these the fastest is taken. The target is for the hardest kind of query there is.
- Times are the smallest of a few rounds, on one thread, one query at a time, as a searcher asks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmsearch.index.approximate import TUNED_FOR, ApproximateIndex, Parameters, has_graph, lists_of
from mmsearch.index.exact_answers import overlap
from mmsearch.types import Embeddings, Rows

FACTORS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Candidates an answer that are tried, where candidates are scored again."""
_ROUNDS = 3
_TIMED = 64
_MOST_PROBES = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Questions:
    """Queries of one sort. `vectors` (q, d) unit rows; `own` (q,): the stored row that a query is, or -1.

    `source`: where they come from, for people ("captions of the collection").
    """

    vectors: Embeddings
    own: Rows
    source: str


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """Questions with their right answers: (q, k) rows, best first, a query's own row left out."""

    questions: Questions
    right: Rows


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was chosen, and how good it is on queries that took no part in choosing.

    `overlap`: by the sort of query, share of the exact top 10 found. `microseconds`: one query on one thread.
    """

    parameters: Parameters
    overlap: Mapping[str, float]
    microseconds: float
    reached: bool

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        shown = {name: round(value, 4) for name, value in self.overlap.items()}
        return {
            "parameters": asdict(self.parameters),
            "overlap": shown,
            "microseconds": None if math.isnan(self.microseconds) else round(self.microseconds, 1),
            "reached": self.reached,
        }


def without_own(found: Rows, own: Rows, k: int) -> Rows:
    """(q, k + 1) rows -> (q, k): the query's own row left out, else the last one."""
    kept = np.full((len(found), k), -1, np.int64)
    for line, (rows, mine) in enumerate(zip(found, own, strict=True)):
        rest = rows[rows != mine][:k]
        kept[line, : len(rest)] = rest
    return kept


def tune(
    index: ApproximateIndex, asked: Mapping[str, Judged], *, target: float, excluded: Rows, rescore: bool
) -> Tuned:
    """Set `index.parameters` to the fastest that reach `target` (0..1), and say what they reach.

    `rescore`: whether more candidates than answers make sense. Without any question the widest parameters stand.
    """
    knob = _Knob(index)
    if not asked:
        index.parameters = knob.at(knob.most, FACTORS[-1] if rescore else 1)
        return Tuned(index.parameters, {}, math.nan, reached=True)
    choosing = {name: _half(judged, 0) for name, judged in asked.items()}
    judging = {name: _half(judged, 1) for name, judged in asked.items()}
    best: tuple[float, Parameters] | None = None
    fallback: tuple[float, Parameters] = (-1.0, knob.at(knob.most, FACTORS[-1] if rescore else 1))
    for factor in FACTORS if rescore else (1,):
        if factor * TUNED_FOR > index.size and factor > 1:
            break
        found, reached = _smallest(index, knob, factor, choosing, target=target, excluded=excluded)
        if not reached:
            reach = _lowest(index, choosing, excluded)
            fallback = max(fallback, (reach, found), key=lambda one: one[0])
            continue
        index.parameters = found
        seconds = _seconds(index, choosing, excluded)
        if best is not None and seconds > 1.3 * best[0]:
            break  # ever more candidates for ever fewer lists: past the best
        if best is None or seconds < best[0]:
            best = (seconds, found)
        if found == knob.at(knob.least, factor):
            break
    index.parameters = fallback[1] if best is None else best[1]
    seconds = _seconds(index, judging, excluded)
    reached_by = {name: _overlap(index, judged, excluded) for name, judged in judging.items()}
    return Tuned(index.parameters, reached_by, seconds * 1e6, best is not None)


class _Knob:
    """The one number that says how hard to look: probes of an inverted file, effort of a graph, or nothing."""

    def __init__(self, index: ApproximateIndex) -> None:
        self._lists, self._graph = lists_of(index.faiss), has_graph(index.faiss)
        self.least = 1 if self._lists else TUNED_FOR if self._graph else 0
        self.most = min(self._lists, _MOST_PROBES) if self._lists else min(index.size, 4096) if self._graph else 0

    def at(self, value: int, factor: int) -> Parameters:
        return Parameters(probes=value if self._lists else 0, effort=value if self._graph else 0, factor=factor)


def _smallest(
    index: ApproximateIndex,
    knob: _Knob,
    factor: int,
    asked: Mapping[str, Judged],
    *,
    target: float,
    excluded: Rows,
) -> tuple[Parameters, bool]:
    """The smallest setting that reaches the target, to within a tenth; (the last one tried, False) if none does."""

    def reach(value: int) -> float:
        index.parameters = knob.at(value, factor)
        return _lowest(index, asked, excluded)

    value, failed = max(knob.least, min(8, knob.most)), max(knob.least - 1, 0)
    reached = reach(value)
    while reached < target:
        if value >= knob.most:
            return knob.at(value, factor), False
        before, failed, value = reached, value, min(value * 2, knob.most)
        reached = reach(value)
        if failed >= 64 and reached <= before + 0.002:  # more lists find no more: too few candidates for such codes
            return knob.at(failed, factor), False
    while value - failed > max(1, value // 10):
        middle = (value + failed) // 2
        if reach(middle) >= target:
            value = middle
        else:
            failed = middle
    return knob.at(value, factor), True


def _lowest(index: ApproximateIndex, asked: Mapping[str, Judged], excluded: Rows) -> float:
    """The overlap for the hardest sort of query, less half a standard error: no setting may win by luck alone."""
    shares = [_shares(index, judged, excluded) for judged in asked.values()]
    return min(float(one.mean() - 0.5 * one.std() / math.sqrt(len(one))) for one in shares)


def _overlap(index: ApproximateIndex, judged: Judged, excluded: Rows) -> float:
    return float(_shares(index, judged, excluded).mean())


def _shares(index: ApproximateIndex, judged: Judged, excluded: Rows) -> NDArray[np.float64]:
    """The overlap of each query, (q,)."""
    k = judged.right.shape[1]
    wide = k + bool((judged.questions.own >= 0).any())  # one more only where one is dropped: more is looked at for more
    _, ids = index.search(judged.questions.vectors, wide, excluded=excluded)
    found = without_own(index.rows_of(ids), judged.questions.own, k)
    return np.array([overlap(found[i : i + 1], judged.right[i : i + 1]) for i in range(len(found))])


def _seconds(index: ApproximateIndex, asked: Mapping[str, Judged], excluded: Rows) -> float:
    """Seconds a query: the mean over some, one at a time, in the best of a few rounds."""
    queries = [row for judged in asked.values() for row in judged.questions.vectors[: _TIMED // max(len(asked), 1)]]
    rounds: list[float] = []
    for _ in range(_ROUNDS if queries else 0):
        began = time.perf_counter()
        for row in queries:
            index.search(row[None], TUNED_FOR, excluded=excluded)
        rounds.append((time.perf_counter() - began) / len(queries))
    return min(rounds, default=math.nan)


def _half(judged: Judged, which: int) -> Judged:
    """Half of the questions, at random but always the same; of a single one, that one."""
    if len(judged.right) < 2:
        return judged
    asked, drawn = judged.questions, np.random.default_rng(0).permutation(len(judged.right))[which::2]
    return Judged(replace(asked, vectors=asked.vectors[drawn], own=asked.own[drawn]), judged.right[drawn])
