"""One generation of an index as searches see it: its neighbour indexes and stored tokens, and hits by cosine.

Decisions:
- Items whose file is not there any more are never shown: the search widens until k hits are there or the index is
  exhausted.
- Conditions on metadata are the rows that may be returned: they are inside the search, however few they leave.
- What is opened for a generation is opened by the first search that needs it, and closed with the generation.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from mmsearch.data.remote import may_be_shown
from mmsearch.errors import UsageError
from mmsearch.index.base import NeighbourIndex
from mmsearch.index.derived import neighbours
from mmsearch.store.base import Located, Snapshot
from mmsearch.store.filtered import FilteredRows
from mmsearch.store.tokens import TOKENS_NAME, TokenStore
from mmsearch.types import Embeddings, Hit, Modality
from mmsearch.where import Where

if TYPE_CHECKING:
    from mmsearch.evidence import HoldsTokens

Found: TypeAlias = tuple[Located, float]
"""What a row stands for, and its cosine with the query."""


class View:
    """One generation with its neighbour indexes; closed when it is retired and the last search in it has ended.

    `path`: the index directory, None: it has no stored tokens. `notes`: what every answer from it should say;
    `partial`: something that belongs to it is missing.
    """

    partial = False

    def __init__(self, snapshot: Snapshot, *, path: str | None = None, notes: Sequence[str] = ()) -> None:
        self.snapshot, self.notes = snapshot, tuple(notes)
        self._path = path
        self._lock = threading.Lock()
        self._indexes: dict[Modality, NeighbourIndex] = {}
        self._tokens: dict[str, TokenStore] = {}
        self._filtered = FilteredRows(snapshot)
        self._inside, self._retired = 0, False

    def enter(self) -> None:
        """A search begins."""
        with self._lock:
            if self._retired:
                raise UsageError("Searcher", expected="an open one", got="a closed one")
            self._inside += 1

    def leave(self) -> None:
        """A search has ended."""
        with self._lock:
            self._inside -= 1
            self._close_when_empty()

    def retire(self) -> None:
        """No search will begin here any more."""
        with self._lock:
            self._retired = True
            self._close_when_empty()

    def _close_when_empty(self) -> None:
        if self._retired and not self._inside:
            self._close()

    def _close(self) -> None:
        """Let go of everything that was opened."""
        self._indexes.clear()
        for tokens in self._tokens.values():
            tokens.close()
        self._tokens.clear()
        self.snapshot.close()

    def _index(self, modality: Modality) -> NeighbourIndex:
        with self._lock:
            if modality not in self._indexes:
                self._indexes[modality] = neighbours(self.snapshot, modality)
            return self._indexes[modality]

    def has_tokens(self) -> bool:
        """Whether there are stored patch tokens of any kind; opens nothing."""
        return bool(self._tokens) or (self._path is not None and os.path.exists(os.path.join(self._path, TOKENS_NAME)))

    def tokens(self, identity: str) -> HoldsTokens | None:
        """The patch tokens that `identity` made, open as long as this view is."""
        if self._path is None:
            return None
        with self._lock:
            if identity not in self._tokens:
                self._tokens[identity] = TokenStore.open(self._path, identity=identity)
            return self._tokens[identity]

    def apart(self, found: list[Found]) -> list[Found]:
        """Those that may be shown beside each other: here, all."""
        return found

    def ranked(
        self, query: Embeddings, modality: Modality, k: int, *, threshold: float | None, where: Where = ()
    ) -> tuple[list[Hit], int]:
        """Hits of one modality whose files are there, and how many were left out because theirs are not.

        `where`: only items that fulfil all conditions.
        """
        index, allowed = self._index(modality), self._filtered.rows(modality, where) if where else None
        available = self.snapshot.count(modality) if allowed is None else len(allowed)
        width = min(k, available)
        while width:
            scores, rows = index.search(query, width, allowed=allowed)
            kept = [(float(s), int(r)) for s, r in zip(scores[0], rows[0], strict=True) if r >= 0]
            if threshold is not None:
                kept = [(score, row) for score, row in kept if score >= threshold]
            located = self.snapshot.locate([row for _, row in kept])
            found = self.apart(list(zip(located, [score for score, _ in kept], strict=True)))
            hits, hidden = _present(found, k, may_be_shown)
            if len(hits) >= k or width >= available or len(kept) < width:
                return hits, hidden
            width = min(width * 4, available)
        return [], 0


def _present(found: list[Found], k: int, exists: Callable[[str], bool]) -> tuple[list[Hit], int]:
    hits: list[Hit] = []
    hidden = 0
    for one, score in found:
        if len(hits) == k:
            break
        if one.item.path is not None and not exists(one.item.path):
            hidden += 1
            continue
        hits.append(Hit(len(hits) + 1, score, one.item, one.modality, one.caption))
    return hits, hidden
