"""Index directory, or several as one, + query -> hits.

Decisions:
- What a query is, is said by the method: `search_text`, `search_image`, `search_vector`. A string is never
  guessed to be a path.
- The model is loaded with the first query that needs it; opening an index and asking for `info` loads none.
- Items whose file is not there any more are never shown (`view`), and `notes` of the result say how many were left out.
- One generation is searched until `refresh` is called, so that pages of one result list fit together.
- A second stage is asked for with `rerank`, 0 by default; its modules, the re-ranker and the index's tokens are
  loaded with the first query that is re-ranked. With "auto" whatever is missing or broken leaves the first stage.
- `to="any"` merges the picture list and the caption list by reciprocal rank (Cormack, Clarke, Büttcher 2009,
  constant 60): cosines of texts with texts and of texts with pictures are not comparable.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from mmsearch.errors import IndexNotFoundError, MmsearchError
from mmsearch.hits import Asked, Hits, hidden_note, text_answered
from mmsearch.opened import OneIndex, Opened, check_same_space, directories
from mmsearch.rerank.rank_fusion import merge_by_rank
from mmsearch.rerank.request import MAX_DEPTH, STORE_TOKENS, Rerank, asked_for, no_probabilities
from mmsearch.similarity import check_embeddings
from mmsearch.store.directory import IndexStore
from mmsearch.types import Embeddings, Hit, Modality, ModelIdentity, Preprocessing
from mmsearch.view import View as View
from mmsearch.where import Where, conditions

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmsearch.encoder import Encodes
    from mmsearch.evidence import Reranks
    from mmsearch.second_stage import SecondStage
    from mmsearch.types import Pixels


class Searcher:
    """Answers queries over one index. Thread-safe; a context manager."""

    def __init__(
        self,
        store: IndexStore | Opened,
        *,
        encoder: Encodes | None = None,
        device: str = "auto",
        reranker: Reranks | str | os.PathLike[str] | None = None,
    ) -> None:
        self._index: Opened = OneIndex(store) if isinstance(store, IndexStore) else store
        self._encoder, self._device = encoder, device
        self._reranker_of: str | os.PathLike[str] | None = None
        self._reranker: Reranks | None = None
        if isinstance(reranker, str | os.PathLike):
            self._reranker_of = reranker
        else:
            self._reranker = reranker
        self._lock, self._loading = threading.Lock(), threading.Lock()
        self._warm: set[bool] = set()
        self._view = self._index.view()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        encoder: Encodes | None = None,
        device: str = "auto",
        reranker: Reranks | str | os.PathLike[str] | None = None,
        partial: bool = False,
    ) -> Self:
        """Open the index directory at `path`, or several of one model as one index, see `shards`. A folder that
        `split` made stands for its shards.

        `encoder`: used instead of the model that the index names. `reranker`: one, or the model directory that has
        it; None: that of the index's model. `partial`: of several directories some may be missing or damaged; the
        others answer, and the notes of every answer say so. Raises `IndexNotFoundError`, `IndexMismatchError` (the
        encoder's rows cannot be compared with the index's, or those of two directories), `IndexDamagedError`.
        """
        index = _opened(directories([path] if isinstance(path, str | os.PathLike) else path), partial=partial)
        try:
            if encoder is not None:
                index = _for_encoder(index, encoder)
            return cls(index, encoder=encoder, device=device, reranker=reranker)
        except BaseException:
            index.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the index's files."""
        with self._lock:
            self._view.retire()
            self._index.close()

    def refresh(self) -> int:
        """Look at the newest generation from now on; returns its number (of several indexes, their sum).

        Raises `IndexMismatchError` when the index was rebuilt for another model meanwhile: open it again.
        """
        with self._lock:
            old, self._view = self._view, self._index.view(self._view)
            if self._view is not old:
                old.retire()
            return self._view.snapshot.generation

    @property
    def model(self) -> ModelIdentity:
        """Whose vectors these are."""
        return self._index.model

    @property
    def preprocessing(self) -> Preprocessing:
        """How pictures of this index were prepared."""
        return self._index.preprocessing

    @property
    def encoder(self) -> Encodes:
        """The encoder of this index, loaded on first use. Raises `ModelError` or `IndexMismatchError`."""
        with self._lock:
            if self._encoder is None:
                from mmsearch.encoder import Encoder

                loaded = Encoder.load(self._index.settings.get("model"), device=self._device)
                check_same_space(self._index.model, loaded.identity, where=self._index.path)
                self._encoder = loaded
            return self._encoder

    @property
    def reranker(self) -> Reranks:
        """The re-ranker of this index's model, loaded on first use.

        Raises `ModelError` when there is none, `IndexMismatchError` when it belongs to other towers.
        """
        with self._loading:
            if self._reranker is None:
                from mmsearch.rerank.reranker import Reranker

                self._reranker = Reranker.load(self._model_with_reranker(), device=self._device)
            check_same_space(self._index.model, self._reranker.towers, where=self._index.path)
            return self._reranker

    def info(self) -> dict[str, Any]:
        """What is in this index: counts, sizes in bytes, model. JSON values."""
        return self._index.info()

    def search_text(
        self,
        text: str,
        *,
        k: int = 10,
        to: str = "image",
        threshold: float | None = None,
        rerank: Rerank | int | str = 0,
        where: Where = (),
    ) -> Hits:
        """The k best hits for a text. `to`: "image", "text" (captions) or "any". `threshold`: lowest cosine kept.

        `rerank`: how many of the best a second stage re-orders, 0..1000, "auto", or a `Rerank` with conditions.
        `where`: only items whose metadata fulfil all of these (`mmsearch.where`).
        Raises `UsageError` for an empty text, k outside 1..10000, an unknown `to` or conditions on probabilities that
        nobody knows, `ModelError` where a depth is named and the model has no re-ranker.
        """
        asked = Asked(k, to, threshold, asked_for(rerank), conditions(where))
        return text_answered(text, lambda: self.encoder, lambda row: self._search(row, asked, text=text))

    def search_image(
        self,
        image: Image | Pixels | os.PathLike[str],
        *,
        k: int = 10,
        to: str = "image",
        threshold: float | None = None,
        rerank: Rerank | int | str = 0,
        where: Where = (),
    ) -> Hits:
        """The k best hits for a picture: a PIL image, (h, w, 3) uint8 pixels, or a `Path`.

        `rerank`, `where`: as for `search_text`; captions can be re-ranked, pictures like a picture cannot.
        Raises `ImageError` when a file cannot be read, otherwise as `search_text`.
        """
        asked = Asked(k, to, threshold, asked_for(rerank), conditions(where))
        pixels = None
        if asked.rerank.depth and to == "text":
            from mmsearch.encoder import to_pixels

            image = to_pixels(image, self.preprocessing)  # decoded once: both stages read it
            pixels = image[None]
        return self._search(self.encoder.encode_images([image]), asked, pixels=pixels)

    def search_vector(
        self, vector: Embeddings, *, k: int = 10, to: str = "image", threshold: float | None = None, where: Where = ()
    ) -> Hits:
        """The k best hits for one unit row, (1, d) or (d,), of this index's model. Never re-ranked: it has no words."""
        return self._search(vector, Asked(k, to, threshold, Rerank(0), conditions(where)))

    def _search(
        self, vector: Embeddings, asked: Asked, *, text: str | None = None, pixels: Pixels | None = None
    ) -> Hits:
        """First stage, and the second where it is asked for and there is one."""
        row = check_embeddings(vector.reshape(1, -1), dim=self._index.model.dim, where="query vector")
        wish = asked.rerank
        more: list[str] = []
        with self._viewing() as view:
            stage = self._second_stage(view, more, asked=asked, of_text=text is not None) if wish.depth else None
            if stage is not None:
                from mmsearch.evidence import Question

                question = Question(row, text, pixels)
                hits, notes = _first_stage(view, row, asked, width=wish.competing(asked.k))
                found = stage.reorder(question, hits, snapshot=view.snapshot, to=asked.to, k=asked.k, asked=wish)
                if found is not None:
                    return Hits(found.hits, notes=(*view.notes, *notes, *found.notes), partial=view.partial)
            hits, notes = _first_stage(view, row, asked, width=asked.k)
            return Hits(hits, notes=(*view.notes, *notes, *more), partial=view.partial)

    @contextlib.contextmanager
    def _viewing(self) -> Iterator[View]:
        """The current generation, held until its search is over."""
        with self._lock:
            view = self._view
            view.enter()
        try:
            yield view
        finally:
            view.leave()

    def _second_stage(self, view: View, notes: list[str], *, asked: Asked, of_text: bool) -> SecondStage | None:
        """What re-orders; None where "auto" finds nothing to do it with, and a note where that is no normal state."""
        wish = asked.rerank
        may_skip = wish.is_auto and not wish.needs_probabilities
        reads_pictures = of_text and asked.to != "text"  # of the index; captions need none of it
        if wish.is_auto and reads_pictures and not view.has_tokens() and self._reads_tokens():
            if not may_skip:
                raise no_probabilities("an index without stored tokens", do=STORE_TOKENS)
            return None
        if may_skip and (asked.k > MAX_DEPTH or of_text == (asked.to == "text") or not self.has_reranker):
            return None  # texts for a text and pictures for a picture keep their order
        try:
            reranker = self.reranker
        except MmsearchError as error:
            if not may_skip:
                raise
            notes.append(f"not re-ranked: {error}")
            return None
        from mmsearch.second_stage import SecondStage, warmed

        if wish.budget_ms is not None and of_text not in self._warm:
            warmed(reranker, of_text=of_text)
            self._warm.add(of_text)
        return SecondStage(reranker, self.encoder, view.tokens(reranker.tokens_identity))

    @property
    def has_reranker(self) -> bool:
        """Whether there is a re-ranker to load; nothing is loaded to find out."""
        if self._reranker is not None or self._reranker_of is not None:
            return True
        from mmsearch.rerank.present import has_reranker

        return self._model_says(has_reranker, otherwise=False)

    def _reads_tokens(self) -> bool:
        """Whether the re-ranker, if there is one, reads patch tokens; nothing is loaded to find out."""
        if self._reranker is not None:
            return self._reranker.reads_tokens
        from mmsearch.rerank.present import reads_tokens

        return self._model_says(reads_tokens, otherwise=True)

    def _model_says(self, question: Callable[[Path], bool], *, otherwise: bool) -> bool:
        """The answer of the directory with the re-ranker; `otherwise`: of a model handed over that lies in none."""
        from mmsearch.towers.locate import locate

        try:
            return question(locate(self._model_with_reranker())[0])
        except MmsearchError:
            return otherwise

    def _model_with_reranker(self) -> str | Path | None:
        if self._reranker_of is not None:
            return Path(self._reranker_of)
        named = self._encoder.source if self._encoder is not None else self._index.settings.get("model")
        return None if named is None else str(named)


def _first_stage(view: View, row: Embeddings, asked: Asked, *, width: int) -> tuple[list[Hit], list[str]]:
    """The `width` best hits by cosine, and notes."""
    if asked.to == "any":
        lists = [
            view.ranked(row, modality, width, threshold=asked.threshold, where=asked.where) for modality in Modality
        ]
        hits, hidden = merge_by_rank([found for found, _ in lists], width), sum(h for _, h in lists)
    else:
        hits, hidden = view.ranked(row, Modality(asked.to), width, threshold=asked.threshold, where=asked.where)
    notes = hidden_note(hidden)
    if asked.to == "text" and not view.snapshot.count(Modality.TEXT):
        notes.append("this index holds no captions")
    return hits, notes


def _opened(paths: list[str], *, partial: bool) -> Opened:
    if len(paths) == 1:
        return OneIndex(IndexStore.open(paths[0]))
    from mmsearch.shards import Shards

    return Shards(paths, partial=partial)


def _for_encoder(index: Opened, encoder: Encodes) -> Opened:
    """That index, or itself over its bridge to the encoder's model; `IndexMismatchError` without one."""
    if isinstance(index, OneIndex) and not index.model.same_space(encoder.identity):
        from mmsearch.bridged import bridged

        over = bridged(index.path, index.model, encoder)
        if over is not None:
            index.close()
            return over
    check_same_space(index.model, encoder.identity, where=index.path)
    return index


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
