"""Index directory + query -> hits.

Decisions:
- What a query is, is said by the method: `search_text`, `search_image`, `search_vector`. A string is never
  guessed to be a path.
- The model is loaded with the first query that needs it; opening an index and asking for `info` loads none.
- Items whose file is not there any more are never shown: the search widens until k hits are there or
  the index is exhausted, and `notes` of the result say how many were left out.
- One generation is searched until `refresh` is called, so that pages of one result list fit together.
- `to="any"` merges the picture list and the caption list by reciprocal rank (Cormack, Clarke, Büttcher 2009,
  constant 60): cosines of texts with texts and of texts with pictures are not comparable.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

from mmsearch.errors import IndexMismatchError, IndexNotFoundError, UsageError
from mmsearch.index.base import NeighbourIndex
from mmsearch.index.derived import neighbours
from mmsearch.similarity import check_embeddings
from mmsearch.store.base import Located, Snapshot
from mmsearch.store.directory import IndexStore
from mmsearch.types import Embeddings, Hit, Modality, ModelIdentity, Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmsearch.encoder import Encodes
    from mmsearch.types import Pixels

TO = ("image", "text", "any")
MAX_K = 10_000
RRF_CONSTANT = 60


class Hits(Sequence[Hit]):
    """Hits, best first; `notes` says what the user should know about how they came about."""

    __slots__ = ("_hits", "notes")

    def __init__(self, hits: Iterable[Hit], *, notes: Iterable[str] = ()) -> None:
        self._hits, self.notes = tuple(hits), tuple(notes)

    @overload
    def __getitem__(self, index: int) -> Hit: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Hit, ...]: ...

    def __getitem__(self, index: int | slice) -> Hit | tuple[Hit, ...]:
        return self._hits[index]

    def __len__(self) -> int:
        return len(self._hits)

    def __repr__(self) -> str:
        return f"Hits({list(self._hits)!r}, notes={self.notes!r})"


class Searcher:
    """Answers queries over one index. Thread-safe; a context manager."""

    def __init__(self, store: IndexStore, *, encoder: Encodes | None = None, device: str = "auto") -> None:
        self._store, self._encoder, self._device = store, encoder, device
        self._lock = threading.Lock()
        self._view = View(store.snapshot())

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, encoder: Encodes | None = None, device: str = "auto") -> Self:
        """Open the index directory at `path`.

        `encoder`: used instead of the model that the index names. Raises `IndexNotFoundError`,
        `IndexMismatchError` (the encoder's rows cannot be compared with the index's), `IndexDamagedError`.
        """
        store = IndexStore.open(os.fspath(path))
        try:
            if encoder is not None:
                _check_same_space(store.model, encoder.identity, where=os.fspath(path))
            return cls(store, encoder=encoder, device=device)
        except BaseException:
            store.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the index's files."""
        with self._lock:
            self._view.retire()
            self._store.close()

    def refresh(self) -> int:
        """Look at the newest generation from now on; returns its number.

        Raises `IndexMismatchError` when the index was rebuilt for another model meanwhile: open it again.
        """
        with self._lock:
            fresh = self._store.snapshot()
            if not fresh.model.same_space(self._store.model):
                fresh.close()
                _check_same_space(fresh.model, self._store.model, where=self._store.path)
            if fresh.generation == self._view.snapshot.generation:
                fresh.close()
            else:
                old, self._view = self._view, View(fresh)
                old.retire()
            return self._view.snapshot.generation

    @property
    def model(self) -> ModelIdentity:
        """Whose vectors these are."""
        return self._store.model

    @property
    def preprocessing(self) -> Preprocessing:
        """How pictures of this index were prepared."""
        return self._store.preprocessing

    @property
    def encoder(self) -> Encodes:
        """The encoder of this index, loaded on first use. Raises `ModelError` or `IndexMismatchError`."""
        with self._lock:
            if self._encoder is None:
                from mmsearch.encoder import Encoder

                loaded = Encoder.load(self._store.settings.get("model"), device=self._device)
                _check_same_space(self._store.model, loaded.identity, where=self._store.path)
                self._encoder = loaded
            return self._encoder

    def info(self) -> dict[str, Any]:
        """What is in this index: counts, sizes in bytes, model. JSON values."""
        return self._store.info()

    def search_text(self, text: str, *, k: int = 10, to: str = "image", threshold: float | None = None) -> Hits:
        """The k best hits for a text. `to`: "image", "text" (captions) or "any". `threshold`: lowest cosine kept.

        Raises `UsageError` for an empty text, k outside 1..10000 or an unknown `to`.
        """
        if not text.strip():
            raise UsageError("query", expected="some words", got="an empty text")
        vectors = self.encoder.encode_texts([text])
        found = self.search_vector(vectors, k=k, to=to, threshold=threshold)
        if self.encoder.truncated([text])[0]:
            note = f"the text is longer than {self.encoder.max_tokens} tokens; only its beginning was used"
            return Hits(found, notes=(note, *found.notes))
        return found

    def search_image(
        self,
        image: Image | Pixels | os.PathLike[str],
        *,
        k: int = 10,
        to: str = "image",
        threshold: float | None = None,
    ) -> Hits:
        """The k best hits for a picture: a PIL image, (h, w, 3) uint8 pixels, or a `Path`.

        Raises `ImageError` when a file cannot be read, `UsageError` for k or `to`.
        """
        return self.search_vector(self.encoder.encode_images([image]), k=k, to=to, threshold=threshold)

    def search_vector(
        self, vector: Embeddings, *, k: int = 10, to: str = "image", threshold: float | None = None
    ) -> Hits:
        """The k best hits for one unit row, (1, d) or (d,), of this index's model."""
        if not 1 <= k <= MAX_K:
            raise UsageError("k", expected=f"1 to {MAX_K}", got=str(k))
        if to not in TO:
            raise UsageError("to", expected=" or ".join(TO), got=to)
        if threshold is not None and not -1.0 <= threshold <= 1.0:
            raise UsageError("threshold", expected="a cosine from -1 to 1", got=str(threshold))
        query = check_embeddings(vector.reshape(1, -1), dim=self._store.dim, where="query vector")
        with self._lock:
            view = self._view
            view.enter()
        try:
            if to == "any":
                lists = [view.ranked(query, modality, k, threshold=threshold) for modality in Modality]
                hits, hidden = _merge_by_rank([found for found, _ in lists], k), sum(h for _, h in lists)
            else:
                hits, hidden = view.ranked(query, Modality(to), k, threshold=threshold)
            notes = [] if not hidden else [f"{hidden} better or equal hits are not shown: their files are gone"]
            if to == "text" and not view.snapshot.count(Modality.TEXT):
                notes.append("this index holds no captions")
        finally:
            view.leave()
        return Hits(hits, notes=notes)


class View:
    """One generation with its neighbour indexes; closed when it is retired and the last search in it has ended."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self._lock = threading.Lock()
        self._indexes: dict[Modality, NeighbourIndex] = {}
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
            self.snapshot.close()

    def _index(self, modality: Modality) -> NeighbourIndex:
        with self._lock:
            if modality not in self._indexes:
                self._indexes[modality] = neighbours(self.snapshot, modality)
            return self._indexes[modality]

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


def _merge_by_rank(lists: list[list[Hit]], k: int) -> list[Hit]:
    """Reciprocal rank fusion by item: each list adds 1 / (60 + rank of the item's best hit)."""
    total: dict[str, float] = {}
    best: dict[str, Hit] = {}
    for hits in lists:
        seen: set[str] = set()
        for hit in hits:
            if hit.item.id in seen:
                continue
            seen.add(hit.item.id)
            total[hit.item.id] = total.get(hit.item.id, 0.0) + 1.0 / (RRF_CONSTANT + len(seen))
            if hit.item.id not in best or hit.rank < best[hit.item.id].rank:
                best[hit.item.id] = hit
    order = sorted(total, key=lambda item: (-total[item], item))[:k]
    return [replace(best[item], rank=rank) for rank, item in enumerate(order, 1)]


def _check_same_space(of_index: ModelIdentity, of_encoder: ModelIdentity, *, where: str) -> None:
    if not of_index.same_space(of_encoder):
        raise IndexMismatchError(
            where,
            expected=f"model {of_index.name} (weights {of_index.weights[:12]}, d = {of_index.dim})",
            got=f"{of_encoder.name} (weights {of_encoder.weights[:12]}, d = {of_encoder.dim})",
            do="Query it with its own model, or encode it anew: mmsearch index ... --model M --force.",
        )


def find_index(home: str | os.PathLike[str]) -> Path:
    """The most recently updated index directory right below `home`. Raises `IndexNotFoundError` when there is none."""
    folder = Path(home)
    try:
        found = [d for d in folder.iterdir() if os.path.isfile(d / "manifest.json")]
    except OSError:
        found = []  # not there, or not ours to look into: either way there is none to be had
    if not found:
        raise IndexNotFoundError(
            f"{folder}", expected="an index directory in it", got="none", do="Build one: mmsearch index ./photos"
        )
    return max(found, key=_updated)


def _updated(directory: Path) -> float:
    times = [0.0]
    for name in ("manifest.json", "items.sqlite"):
        with contextlib.suppress(OSError):  # it may go while we look
            times.append((directory / name).stat().st_mtime)
    return max(times)
