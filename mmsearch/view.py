"""One generation of an index as searches see it: its neighbour indexes and stored tokens, and hits by cosine.

Decisions:
- Items whose file is not there any more are never shown: the search widens until k hits are there or the index is
  exhausted.
- What is opened for a generation is opened by the first search that needs it, and closed with the generation.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from mmsearch.errors import UsageError
from mmsearch.index.base import NeighbourIndex
from mmsearch.index.derived import neighbours
from mmsearch.store.base import Located, Snapshot
from mmsearch.store.tokens import TOKENS_NAME, TokenStore
from mmsearch.types import Embeddings, Hit, Modality


class View:
    """One generation with its neighbour indexes; closed when it is retired and the last search in it has ended."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self._lock = threading.Lock()
        self._indexes: dict[Modality, NeighbourIndex] = {}
        self._tokens: dict[str, TokenStore] = {}
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

    def has_tokens(self, path: str) -> bool:
        """Whether the index at `path` has stored patch tokens of any kind; opens nothing."""
        return bool(self._tokens) or os.path.exists(os.path.join(path, TOKENS_NAME))

    def tokens(self, path: str, identity: str) -> TokenStore:
        """The patch tokens of the index at `path` that `identity` made, open as long as this view is."""
        with self._lock:
            if identity not in self._tokens:
                self._tokens[identity] = TokenStore.open(path, identity=identity)
            return self._tokens[identity]

    def ranked(
        self, query: Embeddings, modality: Modality, k: int, *, threshold: float | None
    ) -> tuple[list[Hit], int]:
        """Hits of one modality whose files are there, and how many were left out because theirs are not."""
        index, available = self._index(modality), self.snapshot.count(modality)
        width = min(k + 8, available)
        while width:
            scores, rows = index.search(query, width)
            kept = [(float(s), int(r)) for s, r in zip(scores[0], rows[0], strict=True) if r >= 0]
            if threshold is not None:
                kept = [(score, row) for score, row in kept if score >= threshold]
            located = self.snapshot.locate([row for _, row in kept])
            hits, hidden = _present(located, [score for score, _ in kept], k, os.path.lexists)
            if len(hits) >= k or width >= available or len(kept) < width:
                return hits, hidden
            width = min(width * 4, available)
        return [], 0


def _present(
    located: list[Located], scores: list[float], k: int, exists: Callable[[str], bool]
) -> tuple[list[Hit], int]:
    hits: list[Hit] = []
    hidden = 0
    for one, score in zip(located, scores, strict=True):
        if len(hits) == k:
            break
        if one.item.path is not None and not exists(one.item.path):
            hidden += 1
            continue
        hits.append(Hit(len(hits) + 1, score, one.item, one.modality, one.caption))
    return hits, hidden
