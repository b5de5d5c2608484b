"""Several indexes seen as one: a snapshot whose rows are those of its parts, numbered on from one to the next.

Decisions:
- Row r of part p is row `first of p` + r, so whatever works with one snapshot's rows works with this one's.
- An item's public id is its identity: of two items with one id the one in the part named first is there, with all that
  it has, and the other is not. Whoever finds rows asks `is_hidden`; `rows_of` and `items` have done so.
- Nothing is copied, nothing is remembered: every question goes to the parts it concerns.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import UsageError
from mmsearch.store.base import Derived, ItemState, Known, Located, Snapshot
from mmsearch.types import Embeddings, Modality, ModelIdentity, Rows
from mmsearch.where import Where

T = TypeVar("T")


class ShardedSnapshot:
    """See `base.Snapshot`. `parts`: one or more, of one model; closed with this one."""

    def __init__(self, parts: Sequence[Snapshot]) -> None:
        self.parts = tuple(parts)
        self.firsts = np.cumsum([0, *(part.row_count for part in self.parts)])  # (parts + 1,)
        self.dim, self.row_count = self.parts[0].dim, int(self.firsts[-1])
        self.generation = sum(part.generation for part in self.parts)

    @property
    def model(self) -> ModelIdentity:
        """The model whose rows these are."""
        return self.parts[0].model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of every part."""
        for part in self.parts:
            part.close()

    def part_of(self, rows: Rows) -> NDArray[np.int64]:
        """Which part each row is of: (n,) -> (n,). Raises `UsageError` for rows that there are not."""
        if len(rows) and (rows.min() < 0 or rows.max() >= self.row_count):
            raise UsageError("rows", expected=f"0 to {self.row_count - 1}", got=f"{rows.min()} to {rows.max()}")
        return np.searchsorted(self.firsts, rows, side="right").astype(np.int64) - 1

    def ranges(self, modality: Modality) -> list[tuple[int, int]]:
        """Sorted half-open ranges of rows of that modality, dead ones included; those of two parts are never joined."""
        found = zip(self.firsts.tolist(), self.parts, strict=False)
        return [(first + start, first + stop) for first, part in found for start, stop in part.ranges(modality)]

    def dead_rows(self, modality: Modality) -> Rows:
        """Sorted rows that must not be returned. (n,) int64."""
        return self._joined(lambda part: part.dead_rows(modality))

    def alive_rows(self, modality: Modality) -> Rows:
        """Sorted rows of items that are there, those of hidden items included. (n,) int64."""
        return self._joined(lambda part: part.alive_rows(modality))

    def rows_where(self, modality: Modality, where: Where) -> Rows:
        """Sorted rows of items that fulfil all conditions. (n,) int64."""
        return self._joined(lambda part: part.rows_where(modality, where))

    def count(self, modality: Modality) -> int:
        """How many rows are alive, those of hidden items included."""
        return sum(part.count(modality) for part in self.parts)

    def _joined(self, ask: Callable[[Snapshot], Rows]) -> Rows:
        found = zip(self.firsts.tolist(), self.parts, strict=False)
        return np.concatenate([first + ask(part) for first, part in found])

    def block(self, start: int, stop: int) -> NDArray[np.float16]:
        """Rows start..stop as stored; a view where they are of one part, else a copy."""
        pieces = [
            part.block(max(start - first, 0), min(stop - first, part.row_count))
            for first, part in zip(self.firsts.tolist(), self.parts, strict=False)
            if start < first + part.row_count and stop > first
        ]
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty((0, self.dim), np.float16)

    def scattered(self) -> NDArray[np.float16]:
        """Every row as stored, (row_count, d); of several parts a copy."""
        pieces = [part.scattered() for part in self.parts] or [np.empty((0, self.dim), np.float16)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def vectors(self, rows: Rows) -> Embeddings:
        """The rows asked for: (n,) -> (n, d) float32."""
        wanted = np.asarray(rows, dtype=np.int64)
        found = np.empty((len(wanted), self.dim), np.float32)
        owners = self.part_of(wanted)
        for number in np.unique(owners).tolist():
            places = np.flatnonzero(owners == number)
            found[places] = self.parts[number].vectors(wanted[places] - self.firsts[number])
        return found

    def derived(self, modality: Modality) -> Derived | None:
        """None: each part has its own."""
        return None

    def intact(self, derived: Derived) -> str | None:
        """None: see `derived`."""
        return None

    def locate(self, rows: Rows | Sequence[int]) -> list[Located]:
        """What rows stand for, in the order asked for (one SQL query a part). Dead rows raise `UsageError`."""
        found = self._each(rows, lambda part, own: part.locate(own))
        return [replace(one, row=int(row)) for row, one in zip(rows, found, strict=True)]

    def content_hashes(self, rows: Rows | Sequence[int]) -> list[bytes | None]:
        """The content hash of each row's item; see `base.Snapshot.content_hashes`."""
        return self._each(rows, lambda part, own: part.content_hashes(own))

    def _each(self, rows: Rows | Sequence[int], ask: Callable[[Snapshot, list[int]], list[T]]) -> list[T]:
        """Ask every part about its own rows; the answers in the order of `rows`."""
        wanted = np.array([int(row) for row in rows], np.int64)
        owners = self.part_of(wanted)
        found: dict[int, T] = {}
        for number in np.unique(owners).tolist():
            places = np.flatnonzero(owners == number)
            own = (wanted[places] - self.firsts[number]).tolist()
            found.update(zip(places.tolist(), ask(self.parts[number], own), strict=True))
        return [found[place] for place in range(len(wanted))]

    def is_hidden(self, located: Sequence[Located]) -> list[bool]:
        """Whether an earlier part has an item with the id of each: then that one stands for both."""
        owners = self.part_of(np.array([one.row for one in located], np.int64)).tolist()
        hidden = [False] * len(located)
        for number, part in enumerate(self.parts[:-1]):
            later = {one.item.id for one, owner in zip(located, owners, strict=True) if owner > number}
            there = part.present(later) if later else set()
            for place, (one, owner) in enumerate(zip(located, owners, strict=True)):
                hidden[place] |= owner > number and one.item.id in there
        return hidden

    def pictures(self) -> Iterator[tuple[bytes, str]]:
        """(content hash, path) of every item with a picture file, in order of the hash."""
        return heapq.merge(*(part.pictures() for part in self.parts), key=lambda pair: pair[0])

    def rows_of(self, item_id: str, modality: Modality) -> Rows:
        """The rows of one item by its public id, in the first part that has it."""
        for first, part in zip(self.firsts.tolist(), self.parts, strict=False):
            if part.present([item_id]):
                rows: Rows = part.rows_of(item_id, modality) + first
                return rows
        return np.empty(0, np.int64)

    def items(self, *, state: ItemState | None = ItemState.OK) -> Iterator[Known]:
        """Every item in order of (root, name), without hidden ones. `Known.item` counts within its part."""
        streams = (self._items_of(number, state) for number in range(len(self.parts)))
        return heapq.merge(*streams, key=lambda known: (os.fsencode(known.root), os.fsencode(known.name)))

    def _items_of(self, number: int, state: ItemState | None) -> Iterator[Known]:
        for known in self.parts[number].items(state=state):
            if not any(part.present([known.id]) for part in self.parts[:number]):
                yield known

    def present(self, ids: Iterable[str]) -> set[str]:
        """Those of these public ids that are there."""
        wanted = set(ids)
        return {one for part in self.parts for one in part.present(wanted)}
