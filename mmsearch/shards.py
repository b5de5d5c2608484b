"""Several index directories searched as one, on one machine.

    with Searcher.open(["indexes/2023", "indexes/2024"]) as searcher: ...

Decisions:
- The answer is that of one index with everything in it, in the order of the shards: hits of all shards are merged
  before anything else is made of them (ranks fused, candidates re-ranked), and equal scores keep that order. A large
  shard whose index kind overlooks some rows overlooks them here too, no others.
- Scores that are merged are cosines of the stored rows, computed here in one way for all: one shard may be searched
  exactly and another by an index kind that only estimates them.
- The same item id in two shards is one item, and the shard named first has it. (`merge` keeps the newer one.)
- A shard that cannot be opened is an error. With `partial` the others answer, every answer says what is missing, and
  `refresh` tries again. Another model, another format or other item vectors are errors in any case.
- A refresh opens only the shards anew that changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from mmsearch.errors import IndexMismatchError, StoreError, UsageError
from mmsearch.index.base import NeighbourIndex, check_k, merged, padded
from mmsearch.opened import TOGETHER, OneIndex, check_alike
from mmsearch.similarity import check_embeddings
from mmsearch.store.directory import IndexStore
from mmsearch.store.sharded import ShardedSnapshot
from mmsearch.types import Embeddings, Modality, Rows, Scores
from mmsearch.view import Found, View

if TYPE_CHECKING:
    from mmsearch.evidence import HoldsTokens

SIDE_BY_SIDE_ROWS = 100_000
"""From so many rows on, shards are searched by several threads: below, starting them costs more than it saves."""


class ShardedIndex:
    """The neighbour indexes of several shards as one, under the rows of a sharded snapshot. Thread-safe."""

    kind = "sharded"

    def __init__(
        self, indexes: Sequence[NeighbourIndex], snapshot: ShardedSnapshot, *, pool: ThreadPoolExecutor | None = None
    ) -> None:
        self._indexes, self._snapshot, self._pool = indexes, snapshot, pool
        self.dim, self.size = snapshot.dim, sum(index.size for index in indexes)

    def search(
        self, queries: Embeddings, k: int, *, allowed: Rows | None = None, excluded: Rows | None = None
    ) -> tuple[Scores, Rows]:
        """See `index.base.NeighbourIndex.search`."""
        queries = check_embeddings(queries, dim=self.dim, where="query")
        check_k(k, len(queries))

        def ask(number: int) -> tuple[Scores, Rows]:
            own = {"allowed": self._own(number, allowed), "excluded": self._own(number, excluded)}
            return self._search_one(number, queries, k, **own)

        numbers = range(len(self._indexes))
        parts = list(map(ask, numbers) if self._pool is None else self._pool.map(ask, numbers))
        return merged(parts, k)

    def _own(self, number: int, rows: Rows | None) -> Rows | None:
        """Those of sorted rows that are of one shard, numbered as it does."""
        if rows is None:
            return None
        low, high = self._snapshot.firsts[number : number + 2].tolist()
        first, last = np.searchsorted(rows, (low, high)).tolist()
        own: Rows = np.asarray(rows[first:last], np.int64) - low
        return own

    def _search_one(
        self, number: int, queries: Embeddings, k: int, *, allowed: Rows | None, excluded: Rows | None
    ) -> tuple[Scores, Rows]:
        """(q, <= k) of one shard, its rows numbered as the snapshot's, its scores cosines of the stored rows."""
        index, first = self._indexes[number], int(self._snapshot.firsts[number])
        if not index.size:
            return padded(np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64), 1)
        _, rows = index.search(queries, min(k, index.size), allowed=allowed, excluded=excluded)
        stored = self._snapshot.parts[number]
        scores = np.full(rows.shape, -np.inf, np.float32)
        for line, (query, found) in enumerate(zip(queries, rows, strict=True)):
            there = found >= 0
            # Each row by itself: equal rows score equally, whatever block or shard they are in.
            cosines = np.einsum("nd,d->n", stored.vectors(found[there]), query)
            scores[line, there] = np.clip(cosines, -1.0, 1.0)
        return scores, np.where(rows < 0, -1, rows + first)


class ShardedTokens:
    """The patch tokens of several shards: a picture's are where its content was read, whichever shard that is."""

    def __init__(self, stores: Sequence[HoldsTokens]) -> None:
        self._stores = stores

    def get(self, hashes: Iterable[bytes | None]) -> dict[bytes, bytes]:
        """Those that there are, by content hash."""
        found: dict[bytes, bytes] = {}
        wanted = {digest for digest in hashes if digest is not None}
        for store in self._stores:
            found.update(store.get(wanted - found.keys()))
        return found


class ShardedView(View):
    """One generation of every shard as searches see it. It holds their views, which others may hold too.

    `missing`: a line for what of them is not there.
    """

    def __init__(self, views: Sequence[View], *, missing: Sequence[str] = ()) -> None:
        self.shards = tuple(views)
        self._all = ShardedSnapshot([view.snapshot for view in views])
        super().__init__(self._all, notes=missing)
        self.partial = bool(missing)
        self._pool: ThreadPoolExecutor | None = None
        for view in self.shards:
            view.enter()

    def _close(self) -> None:
        self._indexes.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=False)
        for view in self.shards:
            view.leave()

    def _index(self, modality: Modality) -> NeighbourIndex:
        with self._lock:
            if modality not in self._indexes:
                indexes = [view._index(modality) for view in self.shards]
                self._indexes[modality] = ShardedIndex(indexes, self._all, pool=self._threads(indexes))
            return self._indexes[modality]

    def _threads(self, indexes: Sequence[NeighbourIndex]) -> ThreadPoolExecutor | None:
        cores = os.cpu_count() or 1
        if cores == 1 or len(indexes) == 1 or sum(index.size for index in indexes) < SIDE_BY_SIDE_ROWS:
            return None
        if self._pool is None:
            self._pool = ThreadPoolExecutor(min(cores, len(indexes)), thread_name_prefix="mmsearch-shard")
        return self._pool

    def has_tokens(self) -> bool:
        """Whether any shard has stored patch tokens."""
        return any(view.has_tokens() for view in self.shards)

    def tokens(self, identity: str) -> HoldsTokens | None:
        """The patch tokens of all shards that `identity` made."""
        found = [view.tokens(identity) for view in self.shards]
        return ShardedTokens([tokens for tokens in found if tokens is not None])

    def apart(self, found: list[Found]) -> list[Found]:
        """Without items whose id an earlier shard has."""
        hidden = self._all.is_hidden([one for one, _ in found])
        return [pair for pair, is_hidden in zip(found, hidden, strict=True) if not is_hidden]


class Shards:
    """Several index directories, open to be searched as one; see `opened.Opened`."""

    def __init__(self, paths: Sequence[str], *, partial: bool = False) -> None:
        """Opens them. Raises what opening one of them raises (`partial`: if none can be opened), `IndexMismatchError`.

        A directory that is named twice counts once.
        """
        if not paths:
            do = "Name at least one directory that 'mmsearch index' made."
            raise UsageError("index", expected="one or more index directories", got="none", do=do)
        self.paths = _each_once(paths)
        self._partial = partial
        self._open: dict[str, OneIndex] = {}
        self._alike: OneIndex | None = None
        self._views: dict[str, View] = {}
        self._missing: dict[str, StoreError] = {}
        try:
            self._open_those_that_are_not()
        except BaseException:
            self.close()
            raise
        first = next(self._open[path] for path in self.paths if path in self._open)
        self.model, self.preprocessing, self.settings = first.model, first.preprocessing, first.settings

    @property
    def path(self) -> str:
        """The shards by name, the first few of many."""
        return ", ".join(self.paths[:3]) + (f" and {len(self.paths) - 3} more" if len(self.paths) > 3 else "")

    def view(self, old: View | None = None) -> View:
        """See `opened.Opened.view`. Shards that did not change keep the views they have."""
        self._open_those_that_are_not()
        before, self._views = self._views, self._newest()
        for path, view in before.items():
            if self._views.get(path) is not view:
                view.retire()
        shards, missing = tuple(self._views.values()), self._notes()
        if isinstance(old, ShardedView) and old.shards == shards and old.notes == missing:
            return old
        return ShardedView(shards, missing=missing)

    def info(self) -> dict[str, Any]:
        """Of all shards together: counts and sizes are sums; `shards` has what each of them says of itself."""
        each = {path: self._open[path].info() for path in self.paths if path in self._open}
        return {
            "paths": self.paths,
            "missing": {path: str(error) for path, error in self._missing.items()},
            **_common(list(each.values())),
            "shards": each,
        }

    def close(self) -> None:
        """See `opened.Opened.close`."""
        for view in self._views.values():
            view.retire()
        for one in self._open.values():
            one.close()
        self._views, self._open = {}, {}

    def _open_those_that_are_not(self) -> None:
        for path in self.paths:
            if path in self._open:
                continue
            try:
                opened = OneIndex(IndexStore.open(path))
            except IndexMismatchError:
                raise
            except StoreError as error:
                self._lose(path, error)
                continue
            self._check_alike(opened)
            self._open[path] = opened
            self._missing.pop(path, None)
        if not self._open:
            raise next(iter(self._missing.values()))

    def _newest(self) -> dict[str, View]:
        """The newest view of every shard that has one, in the order they were named."""
        found: dict[str, View] = {}
        try:
            for path in [path for path in self.paths if path in self._open]:
                try:
                    found[path] = self._open[path].view(self._views.get(path))
                except IndexMismatchError:
                    raise
                except StoreError as error:
                    self._lose(path, error)
            if not found:
                raise next(iter(self._missing.values()))
        except BaseException:
            for path, view in found.items():
                if self._views.get(path) is not view:
                    view.retire()
            raise
        return found

    def _lose(self, path: str, error: StoreError) -> None:
        """Go on without a shard, or raise."""
        if not self._partial:
            raise error
        self._missing[path] = error
        if path in self._open:
            self._open.pop(path).close()

    def _check_alike(self, other: OneIndex) -> None:
        """Rows of all shards can be compared, and stand for the same kind of thing."""
        first = self._alike = self._alike or other
        try:
            apart = "Search them apart."
            check_alike(first, other, to_be="searched together with", model=f"{apart} {TOGETHER}", items=apart)
        except BaseException:
            other.close()
            raise

    def _notes(self) -> tuple[str, ...]:
        if not self._missing:
            return ()
        why = "; ".join(str(error) for error in self._missing.values())
        return (f"{len(self._missing)} of {len(self.paths)} indexes missing from this answer: {why}",)


def _each_once(paths: Sequence[str]) -> list[str]:
    """Absolute paths of different directories, in the order they were named."""
    found: dict[str, str] = {}
    for path in paths:
        found.setdefault(os.path.realpath(path), os.path.abspath(path))
    return list(found.values())


_SUMMED = ("items", "skipped", "image_rows", "text_rows", "dead_rows")


def _common(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What several indexes are together, in the words of one."""
    roots: dict[str, int] = {}
    for facts in each:
        for root, count in facts.get("roots", {}).items():
            roots[root] = roots.get(root, 0) + count
    return {
        "model": each[0]["model"],
        "preprocessing": each[0]["preprocessing"],
        **{name: sum(facts.get(name, 0) for facts in each) for name in _SUMMED},
        "roots": roots,
        "bytes": sum(sum(facts["bytes"].values()) for facts in each),
    }
