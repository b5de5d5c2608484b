"""Searching the rows of one model with the queries of another, over a bridge (`bridge`).

Decisions:
- The old neighbour index is searched with the query carried back, Wᵀ q; its candidates are scored anew, exactly, as
  q · W x / |W x|. Candidates are widened until no row of usual |W x| that was not looked at could be among the k best.
- Everything above a search sees rows of the new model: scores, the snapshot's vectors, the model's name. So filters,
  thresholds, merging and re-ranking are what they always are. Stored patch tokens belong to the old model: none.
- A reindexing that ends in between is followed: the next generation is simply the new model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from mmsearch.bridge import Bridge, Map
from mmsearch.errors import UsageError
from mmsearch.index.base import NeighbourIndex, best_first, check_k, padded
from mmsearch.index.derived import neighbours
from mmsearch.opened import check_same_space
from mmsearch.similarity import check_embeddings
from mmsearch.store.base import Snapshot
from mmsearch.store.directory import IndexStore
from mmsearch.types import Embeddings, Modality, ModelIdentity, Preprocessing, Rows, Scores
from mmsearch.view import View

if TYPE_CHECKING:
    from mmsearch.encoder import Encodes

_FIRST, _MORE, _MOST = 64, 4, 8192
"""Candidates beyond k looked at first, how many times more then, and where widening ends."""


class BridgedRows:
    """A snapshot whose vectors are those of the new model, as far as the bridge can tell; the rest is as it was."""

    def __init__(self, snapshot: Snapshot, bridge: Bridge) -> None:
        self.stored, self._bridge = snapshot, bridge
        self.dim = bridge.new.dim

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the snapshot has
        return getattr(self.stored, name)

    def vectors(self, rows: Rows) -> Embeddings:
        """(n,) -> (n, d_new) float32 unit rows by the map of their modality; `UsageError` where there is none."""
        wanted = np.asarray(rows, np.int64)
        old, found = self.stored.vectors(wanted), np.empty((len(wanted), self.dim), np.float32)
        for modality in Modality:
            mine = _within(wanted, self.stored.ranges(modality))
            if mine.any() and modality not in self._bridge.maps:
                raise UsageError("bridge", expected="one for these rows", got=f"none for {modality.value} rows")
            if mine.any():
                found[mine] = self._bridge.maps[modality].carry(old[mine])
        return found


def _within(rows: Rows, ranges: list[tuple[int, int]]) -> NDArray[np.bool_]:
    inside = np.zeros(len(rows), np.bool_)
    for start, stop in ranges:
        inside |= (rows >= start) & (rows < stop)
    return inside


class BridgedIndex:
    """Neighbours among old rows for queries of the new model. See `base.NeighbourIndex`."""

    def __init__(self, inner: NeighbourIndex, rows: Snapshot, one: Map) -> None:
        """`rows`: where the old vectors of candidates are read."""
        self._inner, self._rows, self._map = inner, rows, one
        self.kind, self.dim, self.size = inner.kind, len(one.matrix), inner.size

    def search(
        self, queries: Embeddings, k: int, *, allowed: Rows | None = None, excluded: Rows | None = None
    ) -> tuple[Scores, Rows]:
        """The k best rows by q · W x / |W x|, best first: (q, d_new) unit rows -> (q, k), (q, k) int64."""
        queries = check_embeddings(queries, dim=self.dim, where="query")
        check_k(k, len(queries))
        given = {"allowed": allowed, "excluded": excluded}
        filters = {name: rows for name, rows in given.items() if rows is not None}
        found = [self._search_one(query[None], k, filters) for query in queries]
        if not found:
            return padded(np.empty((0, 0), np.float32), np.empty((0, 0), np.int64), k)
        scores, rows = (np.concatenate(part) for part in zip(*found, strict=True))
        return scores, rows

    def _search_one(self, query: Embeddings, k: int, filters: dict[str, Rows]) -> tuple[Scores, Rows]:
        back, (length,) = self._map.back(query)
        width = k + _FIRST
        while True:
            width = min(width, max(self.size, 1))
            close, rows = self._inner.search(back, width, **filters)
            rows = rows[0][rows[0] >= 0]
            scores = self._scores(query, rows)
            order = best_first(scores[None], rows[None])[0][:k]
            if len(rows) < width or width >= self.size or width >= max(_MOST, k + _FIRST):
                break
            last = float(close[0, len(rows) - 1]) * float(length)  # q · W x of what was not looked at is no more
            if len(order) == k and scores[order[-1]] >= last / (self._map.low if last > 0 else self._map.high):
                break
            width *= _MORE
        return padded(scores[order][None], rows[order][None], k)

    def _scores(self, query: Embeddings, rows: Rows) -> Scores:
        """(m,) candidate rows -> (m,) exact scores."""
        carried = self._map.carry(self._rows.vectors(rows)) if len(rows) else np.empty((0, self.dim), np.float32)
        scores: Scores = np.clip(carried @ query[0], -1.0, 1.0).astype(np.float32)
        return scores


class Nothing:
    """No neighbours: rows that the bridge does not lead to. See `base.NeighbourIndex`."""

    kind, size = "none", 0

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def search(
        self, queries: Embeddings, k: int, *, allowed: Rows | None = None, excluded: Rows | None = None
    ) -> tuple[Scores, Rows]:
        """(q, d) -> (q, k) of nothing."""
        check_k(k, len(queries))
        return padded(np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64), k)


class BridgedView(View):
    """One generation of the old model, as queries of the new one see it."""

    def __init__(self, snapshot: Snapshot, bridge: Bridge) -> None:
        notes = [f"scores are bridged: queries of {bridge.new.name} over rows of {bridge.old.name}"]
        notes += [
            f"{modality.value} rows are left out: the index has too few for the bridge to lead there"
            for modality in Modality
            if modality not in bridge.maps and snapshot.count(modality)
        ]
        super().__init__(cast(Snapshot, BridgedRows(snapshot, bridge)), notes=notes)
        self._stored, self._bridge = snapshot, bridge

    def _index(self, modality: Modality) -> NeighbourIndex:
        with self._lock:
            if modality not in self._indexes:
                one, stored = self._bridge.maps.get(modality), self._stored
                self._indexes[modality] = (
                    Nothing(self._bridge.new.dim)
                    if one is None
                    else BridgedIndex(neighbours(stored, modality), stored, one)
                )
            return self._indexes[modality]


class BridgedOver:
    """An index opened for another model than its own. See `opened.Opened`."""

    def __init__(self, path: str, encoder: Encodes, bridge: Bridge) -> None:
        self.path, self.model, self._bridge = path, encoder.identity, bridge
        self.preprocessing: Preprocessing = encoder.preprocessing
        self.settings: Mapping[str, Any] = {"model": encoder.source}
        self._store = IndexStore.open(path)

    def view(self, old: View | None = None) -> View:
        """See `opened.Opened.view`: bridged while the index has the old model, its own once it has the new one."""
        fresh = self._store.snapshot()
        try:
            if old is not None and fresh.generation == old.snapshot.generation:
                fresh.close()
                return old
            if fresh.model.same_space(self.model):
                return View(fresh, path=self.path)
            check_same_space(self._bridge.old, fresh.model, where=self.path)
            return BridgedView(fresh, self._bridge)
        except BaseException:
            fresh.close()
            raise

    def info(self) -> dict[str, Any]:
        """See `opened.Opened.info`."""
        return self._store.info()

    def close(self) -> None:
        """See `opened.Opened.close`."""
        self._store.close()


def bridged(path: str, of_index: ModelIdentity, encoder: Encodes) -> BridgedOver | None:
    """The index at `path` opened for that encoder, when it has a bridge to it; else None.

    Raises `IndexDamagedError` for a bridge that is damaged.
    """
    bridge = Bridge.load(path)
    if bridge is None or not (bridge.old.same_space(of_index) and bridge.new.same_space(encoder.identity)):
        return None
    return BridgedOver(path, encoder, bridge)
