"""The rows that conditions on metadata leave, remembered for one generation."""

from __future__ import annotations

import threading

from mmsearch.store.base import Snapshot
from mmsearch.types import Modality, Rows
from mmsearch.where import Where

_CONDITIONS, _ROWS = 16, 4_000_000
"""How many are remembered, and how many rows of theirs in all: 32 MB."""


class FilteredRows:
    """Of one snapshot. Thread-safe as far as the snapshot is."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._lock = threading.Lock()
        self._known: dict[tuple[Modality, str], Rows] = {}

    def rows(self, modality: Modality, where: Where) -> Rows:
        """Sorted rows of items that fulfil all conditions. (n,) int64."""
        key = modality, repr(where)  # not the conditions themselves: in Python 1 equals True
        with self._lock:
            found = self._known.get(key)
        if found is None:
            found = self._snapshot.rows_where(modality, where)
            with self._lock:
                self._known[key] = found
                while len(self._known) > _CONDITIONS or sum(map(len, self._known.values())) > _ROWS:
                    del self._known[next(iter(self._known))]  # the oldest; one that is too large is not kept
        return found
