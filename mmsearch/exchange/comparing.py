"""Rows of a source that has changed against what the index has of it: what is equal is left as it is.

Decisions:
- Each block is compared with the generation before its commit, so that ids which come twice in a source end as in an
  import from nothing: the last one stands.
- Which of the known items were met takes one bit each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mmsearch.store.base import Batch, Upsert
from mmsearch.store.directory import IndexStore
from mmsearch.store.records import ItemRecord, item_numbers
from mmsearch.store.snapshot import DirectorySnapshot

_REMOVALS = 10_000
_HALF = np.dtype("<f2")


class Comparison:
    """What is known below a root, and which of it a source still has."""

    def __init__(self, snapshot: DirectorySnapshot, root: str) -> None:
        self._root = root
        found = snapshot.execute("SELECT max(item) FROM items")
        self._last = int(found[0][0] or 0)
        self._met = np.zeros(self._last // 8 + 1, np.uint8)

    def drop_equal(self, batch: Batch, known: Mapping[str, ItemRecord], snapshot: DirectorySnapshot) -> int:
        """Note which of the known items were met, and take out of `batch` what would change nothing; how many."""
        self._note([record.item for record in known.values()])
        candidates = [(u, known[u.source.name]) for u in batch.upserts if u.source.name in known]
        candidates = [(u, record) for u, record in candidates if _same_facts(u, record)]
        equal = _same_vectors(candidates, snapshot)
        batch.upserts = [upsert for upsert in batch.upserts if upsert.source.name not in equal]
        batch.skips = [s for s in batch.skips if s.source.name not in known or not known[s.source.name].skipped]
        return len(equal)

    def unseen(self, store: IndexStore) -> Iterator[list[int]]:
        """Numbers of the items that were known and not met, some at a time."""
        with store.snapshot() as snapshot:
            waiting: list[int] = []
            for page in item_numbers(snapshot, self._root):
                waiting += [item for item in page if item <= self._last and not self._is_met(item)]
                while len(waiting) >= _REMOVALS:
                    yield waiting[:_REMOVALS]
                    waiting = waiting[_REMOVALS:]
        if waiting:
            yield waiting

    def _note(self, items: Sequence[int]) -> None:
        numbers = np.array([item for item in items if item <= self._last], np.int64)
        np.bitwise_or.at(self._met, numbers // 8, (1 << (numbers % 8)).astype(np.uint8))

    def _is_met(self, item: int) -> bool:
        return bool(self._met[item // 8] >> (item % 8) & 1)


def _same_facts(upsert: Upsert, record: ItemRecord) -> bool:
    """Whether all but the vectors is the same, and the same vectors are there."""
    source = upsert.source
    return (
        not record.skipped
        and (record.image is None) == (upsert.image_vector is None)
        and tuple(part for _, part in record.texts) == (upsert.text_parts or ())
        and (record.path, record.captions, dict(record.metadata))
        == (source.path, source.captions, dict(source.metadata))
        and (record.width, record.height, record.taken_at) == (upsert.width, upsert.height, upsert.taken_at)
    )


def _same_vectors(pairs: Sequence[tuple[Upsert, ItemRecord]], snapshot: DirectorySnapshot) -> set[str]:
    """Names of those whose rows are stored bit by bit as they come."""
    rows: list[int] = []
    vectors: list[np.ndarray] = []
    owners: list[str] = []
    for upsert, record in pairs:
        if upsert.image_vector is not None and record.image is not None:
            rows.append(record.image)
            vectors.append(np.asarray(upsert.image_vector)[None])
            owners.append(upsert.source.name)
        if upsert.text_vectors is not None:
            rows += [row for row, _ in record.texts]
            vectors.append(np.asarray(upsert.text_vectors))
            owners += [upsert.source.name] * len(record.texts)
    if not rows:
        return set()
    stored = snapshot.take(np.array(rows, np.int64))
    coming = np.concatenate(vectors).astype(_HALF)
    differs = (stored.view(np.uint16) != coming.view(np.uint16)).any(axis=1)
    changed = {owner for owner, one in zip(owners, differs.tolist(), strict=True) if one}
    return {upsert.source.name for upsert, _ in pairs} - changed
