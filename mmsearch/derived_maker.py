"""The searchable file of one modality's rows: made, grown, retrained or left, and tuned. What a store is handed.

Decisions:
- A file that lacks few rows is left: searches look through those exactly. One that lacks more is grown. It is made anew
  when there are four times the rows it learned from, or when its lists have become much more uneven than they were.
- Parameters are searched for when the file is new, when the rows have grown by half since, and when the wished overlap
  or the queries are others.
- What a long build will take is said before it begins, from a measured speed of this machine.
- Readers are never kept waiting: they search the generation they have until they ask for a newer one.
- Its facts are JSON values in the manifest: see `indexes/README.md`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import IndexDamagedError, UsageError
from mmsearch.index.approximate import ApproximateIndex, imbalance_of, read_file
from mmsearch.index.building import add, build, out_of_memory, pieces_of
from mmsearch.index.estimate import estimate
from mmsearch.index.exact_answers import exact_answers
from mmsearch.index.faiss import FaissFlat
from mmsearch.index.layouts import AUTO, EXACT, FLAT, SMALL, Layout, layout_of
from mmsearch.index.opening import open_index
from mmsearch.index.tuning import Judged, Questions, tune, without_own
from mmsearch.progress import Progress, SilentProgress
from mmsearch.store.derived import Derived, DerivedRows, NewFile
from mmsearch.types import Modality

TARGET = 0.95
TAIL_SHARE, TAIL_ROWS = 0.02, 20_000
"""A file may lack this share of the rows, and at most so many, before it is grown."""
RETRAIN_GROWTH = 4.0
RETRAIN_IMBALANCE = 1.5
RETUNE_GROWTH = 1.5
FEW_TO_LEARN = 10_000
"""Fewer rows than this that a kind cannot learn from are searched exactly instead."""
FAST = "ivf-pq-fs"
ANSWERS = 10
TOLD_FROM_S = 20.0
"""What a build needs is said beforehand when it is expected to take so long."""

Asks = Callable[[Modality], Mapping[str, Questions]]
"""Modality of the rows -> queries by their sort ("text", "image"); called when something is to be tuned."""


class IndexMaker:
    """See `store.derived.DerivedWriter`.

    `kind`: a name of `index.layouts`, "auto" or a FAISS factory string. `memory`: bytes, or no limit. `target`: overlap
    with exact search to tune for, 0..1. `anew`: whatever is there is not started from. `retune`: parameters are
    searched for although nothing asks for it.
    """

    def __init__(
        self,
        kind: str = AUTO,
        *,
        memory: int | None = None,
        target: float = TARGET,
        asks: Asks | None = None,
        anew: bool = False,
        retune: bool = False,
        told: Progress | None = None,
        told_from_s: float = TOLD_FROM_S,
    ) -> None:
        self._told_from_s = told_from_s
        self._kind, self._memory, self._target = kind, memory, target
        self._anew, self._retune = anew, anew or retune
        self._asks: Asks = asks or (lambda modality: {})
        self._told = told or SilentProgress()

    def make(self, rows: DerivedRows, *, there: Derived | None, path: str | None) -> NewFile | Derived | None:
        """See `store.derived.DerivedWriter.make`. Raises `UsageError` for a kind or a budget that cannot be."""
        layout = self._layout(rows, there)
        if layout.kind == EXACT:
            return None
        if layout.kind == FLAT:
            return _flat(rows, there if path is not None and not self._anew else None)
        if there is not None and path is not None and not self._anew and there.kind == layout.kind:
            kept = self._kept(layout, rows, there, path)
            if kept is not None:
                return kept
        return self._made(layout, rows)

    def _layout(self, rows: DerivedRows, there: Derived | None) -> Layout:
        alive = rows.count - len(rows.dead)
        layout = layout_of(self._kind, n=alive, d=rows.dim, memory=self._memory)
        near = there is not None and there.kind == FAST and alive >= 0.8 * SMALL
        if self._kind == AUTO and layout.kind == FLAT and near:  # around the border one does not switch to and fro
            return layout_of(FAST, n=alive, d=rows.dim, memory=self._memory)
        return layout

    def _kept(self, layout: Layout, rows: DerivedRows, there: Derived, path: str) -> NewFile | Derived | None:
        """What is there, grown if need be and tuned again if need be; None when it is to be made anew."""
        facts, missing = there.facts, rows.count - there.count
        if rows.count > RETRAIN_GROWTH * max(int(facts.get("trained_for", 0)), 1):
            return None
        if self._memory is not None and there.size / there.count * rows.count > self._memory:
            return None
        if facts["factory"] != layout.factory and facts.get("memory") != self._memory:
            return None
        untuned = self._is_untuned(facts, rows)
        if missing <= min(TAIL_SHARE * rows.count, TAIL_ROWS) and not untuned:
            return there
        try:
            index = read_file(path, mapped=missing == 0)
        except IndexDamagedError:
            return None
        if missing == 0:
            return replace(there, facts=self._tuned(facts, rows, index, layout))
        self._told.start(missing, what=f"adding rows to the index ({layout.kind})", unit="rows")
        with out_of_memory(layout):
            add(index, rows, start=there.rows, told=self._told)
        if imbalance_of(index) > RETRAIN_IMBALANCE * max(float(facts.get("imbalance", 0.0)), 1.0):
            self._told.note(f"the lists of the {rows.modality.value} index have become uneven: training it anew")
            return None
        return self._put(index, layout, rows, facts, tune=untuned)

    def _is_untuned(self, facts: Mapping[str, Any], rows: DerivedRows) -> bool:
        before = facts.get("tuned")
        if before is None or self._retune:
            return True
        return bool(rows.count > RETUNE_GROWTH * before["rows"] or before["target"] != self._target)

    def _made(self, layout: Layout, rows: DerivedRows) -> NewFile | Derived:
        needs = estimate(layout, n=rows.count, d=rows.dim)
        if needs.seconds >= self._told_from_s:
            self._told.note(f"{rows.count:,} {rows.modality.value} rows as {layout.kind} ({layout.factory}): {needs}")
        try:
            built = build(layout, rows, told=self._told)
        except UsageError:
            if rows.count >= FEW_TO_LEARN:
                raise
            self._told.note(
                f"{rows.count:,} {rows.modality.value} rows are too few for {layout.kind}: searched exactly"
            )
            return _flat(rows, None)
        if built.resumed:
            self._told.note(f"went on with {built.resumed:,} rows that an interrupted run had added")
        facts = {
            "factory": layout.factory,
            "rescore": layout.rescore,
            "memory": self._memory,
            "trained_for": rows.count,
            "imbalance": round(imbalance_of(built.index), 3),
            "seconds": {"train": round(built.trained_seconds, 1), "add": round(built.added_seconds, 1)},
        }
        return self._put(built.index, layout, rows, facts, tune=True)

    def _put(
        self,
        index: Any,  # noqa: ANN401 - faiss has no types
        layout: Layout,
        rows: DerivedRows,
        facts: Mapping[str, Any],
        *,
        tune: bool,
    ) -> NewFile:
        facts = self._tuned(facts, rows, index, layout) if tune else facts
        size, pieces = pieces_of(index, os.path.join(rows.work, "whole.faiss"))
        return NewFile(layout.kind, pieces, size, {**facts, "row_bytes": round(size / max(rows.count, 1), 1)})

    def _tuned(self, facts: Mapping[str, Any], rows: DerivedRows, index: Any, layout: Layout) -> Mapping[str, Any]:  # noqa: ANN401
        """`facts` with parameters that reach the target on today's rows."""
        asked = self._asks(rows.modality)
        self._told.start(None, what=f"tuning the {rows.modality.value} index on {_sorts(asked)}", unit="")
        began = time.perf_counter()
        opened = open_index(index, facts, kind=layout.kind, stored=_stored(rows), row_of=lambda: _rows_in_order(rows))
        judged = {name: _judged(questions, rows) for name, questions in asked.items()}
        found = tune(opened, judged, target=self._target, excluded=_ids(opened, rows), rescore=layout.rescore)
        if not found.reached:
            self._told.note(
                f"{rows.modality.value} index: an overlap of {self._target} with exact search is not reached with"
                f" {layout.kind}; the best is {min(found.overlap.values(), default=0.0):.3f}"
            )
        queries = {name: {"count": len(q.right), "source": q.questions.source} for name, q in judged.items()}
        seconds = round(time.perf_counter() - began, 1)
        tuned = {**found.to_json(), "target": self._target, "rows": rows.count, "queries": queries, "seconds": seconds}
        return {**facts, "tuned": tuned}


def _flat(rows: DerivedRows, there: Derived | None) -> NewFile | Derived:
    if there is not None and there.kind == FLAT and rows.count - there.count <= TAIL_SHARE * rows.count:
        return there
    blocks: Iterator[NDArray[np.float16]] = (block for _, block in rows.blocks())
    return NewFile(
        FLAT, FaissFlat.chunks(blocks, dim=rows.dim, count=rows.count), rows.count * rows.dim * 2, {"rows": rows.count}
    )


def _judged(questions: Questions, rows: DerivedRows) -> Judged:
    _, found = exact_answers(questions.vectors, rows.blocks(), ANSWERS + 1, dead=rows.dead)
    return Judged(questions, without_own(found, questions.own, ANSWERS))


def _stored(rows: DerivedRows) -> NDArray[np.float16]:
    """Every row of the vector file, (rows, d), mapped."""
    return np.memmap(rows.vectors_path, dtype="<f2", mode="r", shape=(rows.stop, rows.dim))


def _rows_in_order(rows: DerivedRows) -> NDArray[np.int64]:
    """The store's row of each position of an index without row numbers."""
    pieces = [np.arange(first, first + len(block), dtype=np.int64) for first, block in rows.blocks()]
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


def _ids(index: ApproximateIndex, rows: DerivedRows) -> NDArray[np.int64]:
    """The dead rows as ids of the index."""
    return rows.dead if index.by_rows else np.searchsorted(_rows_in_order(rows), rows.dead).astype(np.int64)


def _sorts(asked: Mapping[str, Questions]) -> str:
    return ", ".join(f"{len(q.vectors)} {name} queries ({q.source})" for name, q in asked.items()) or "no queries"
