"""Answers queries over a collection in an engine, with the search methods of `Searcher`.

Decisions:
- First stage only: patch tokens for a re-ranker lie in index directories. `rerank="auto"` is answered without.
- Filters (`mmsearch.where`) go to the engine. An index directory opened here is an engine too: `file:///indexes/photos`.
- Files of an engine need not be on this machine, so nothing is left out for not being here, but for index directories.
- Where a shard does not answer, the hits of the others are `partial`, and the notes name it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Self

from mmsearch.data.remote import may_be_shown
from mmsearch.errors import StoreError, UsageError
from mmsearch.hits import Asked, Hits, hidden_note, text_answered
from mmsearch.rerank.rank_fusion import merge_by_rank
from mmsearch.rerank.request import Rerank, asked_for, no_probabilities
from mmsearch.scale.engine import Answer, Engine, open_engine, refuse_other_model
from mmsearch.similarity import check_embeddings
from mmsearch.types import Embeddings, Hit, Item, Modality, ModelIdentity, Preprocessing
from mmsearch.where import Where, conditions

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmsearch.encoder import Encodes
    from mmsearch.evidence import Reranks
    from mmsearch.types import Pixels

_SPARE = 8


class EngineSearcher:
    """Answers queries over one collection. Thread-safe; a context manager."""

    def __init__(self, engine: Engine, *, encoder: Encodes | None = None, device: str = "auto") -> None:
        self._engine, self._encoder, self._device = engine, encoder, device
        self._lock = threading.Lock()

    @classmethod
    def open(cls, uri: str, *, encoder: Encodes | None = None, device: str = "auto") -> Self:
        """Open the collection at an address, see `engine.open_engine`; `encoder` instead of the model that it names.

        Raises `IndexNotFoundError`, `IndexMismatchError` (the encoder is another model), `StoreError`, `UsageError`.
        """
        engine = open_engine(uri)
        try:
            if encoder is not None:
                refuse_other_model(engine.collection.model, encoder.identity, where=engine.where)
            return cls(engine, encoder=encoder, device=device)
        except BaseException:
            engine.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the engine."""
        self._engine.close()

    @property
    def model(self) -> ModelIdentity:
        """Whose vectors these are."""
        return self._engine.collection.model

    @property
    def preprocessing(self) -> Preprocessing:
        """How its pictures were prepared."""
        return self._engine.collection.preprocessing

    @property
    def encoder(self) -> Encodes:
        """The encoder of this collection, loaded on first use. Raises `ModelError` or `IndexMismatchError`."""
        with self._lock:
            if self._encoder is None:
                from mmsearch.encoder import Encoder

                loaded = Encoder.load(self._engine.collection.settings.get("model"), device=self._device)
                refuse_other_model(self.model, loaded.identity, where=self._engine.where)
                self._encoder = loaded
            return self._encoder

    @property
    def reranker(self) -> Reranks:
        """There is none here; raises `UsageError`."""
        raise _first_stage_only(self._engine.where)

    @property
    def has_reranker(self) -> bool:
        """False: patch tokens lie in index directories."""
        return False

    def info(self) -> dict[str, Any]:
        """What is in the collection: JSON values. Rows are null where a part of the collection does not say."""
        rows = {f"{modality.value}_rows": self._count(modality) for modality in Modality}
        return {"path": self._engine.where, **rows, "model": asdict(self.model), "engine": self._engine.info()}

    def _count(self, modality: Modality) -> int | None:
        try:
            return self._engine.count(modality)
        except StoreError:
            return None  # which part that is, or that nothing answers, `Engine.info` says

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
        """As `Searcher.search_text`; `where`: only items that fulfil all conditions. A depth in `rerank` is refused."""
        asked = self._asked(k, to, threshold, asked_for(rerank), where)
        return text_answered(text, lambda: self.encoder, lambda row: self._search(row, asked))

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
        """As `Searcher.search_image`; `where` and `rerank` as for `search_text`."""
        asked = self._asked(k, to, threshold, asked_for(rerank), where)
        return self._search(self.encoder.encode_images([image]), asked)

    def search_vector(
        self, vector: Embeddings, *, k: int = 10, to: str = "image", threshold: float | None = None, where: Where = ()
    ) -> Hits:
        """The k best hits for one unit row, (1, d) or (d,), of this collection's model."""
        return self._search(vector, self._asked(k, to, threshold, Rerank(0), where))

    def _asked(self, k: int, to: str, threshold: float | None, rerank: Rerank, where: Where) -> Asked:
        """The search, checked; `UsageError` for a second stage that "auto" may not leave out."""
        if rerank.needs_probabilities:
            raise no_probabilities("an engine, which keeps no patch tokens", do="Search an index directory.")
        if rerank.depth and not rerank.is_auto:
            raise _first_stage_only(self._engine.where)
        return Asked(k, to, threshold, rerank, conditions(where))

    def _search(self, vector: Embeddings, asked: Asked) -> Hits:
        row = check_embeddings(vector.reshape(1, -1), dim=self.model.dim, where="query vector")
        kinds = list(Modality) if asked.to == "any" else [Modality(asked.to)]
        missing: dict[str, None] = {}
        lists, hidden = [], 0
        for modality in kinds:
            hits, left_out = self._ranked(row, asked, modality=modality, missing=missing)
            lists.append(hits)
            hidden += left_out
        notes = [*(f"partial: {one}" for one in missing), *hidden_note(hidden)]
        best = lists[0] if len(lists) == 1 else merge_by_rank(lists, asked.k)
        return Hits(best, notes=notes, partial=bool(missing))

    def _ranked(
        self, row: Embeddings, asked: Asked, *, modality: Modality, missing: dict[str, None]
    ) -> tuple[list[Hit], int]:
        """Hits of one modality, and how many were left out because their files are gone."""
        k = asked.k
        width = k + _SPARE if self._engine.files_are_here else k
        while True:
            answer = self._engine.search(row, width, modality=modality, where=asked.where)
            missing |= dict.fromkeys(answer.missing)
            items = self._engine.fetch(list(dict.fromkeys(answer.ids[0])))
            missing |= dict.fromkeys(items.missing)
            hits = _hits(answer, items, modality, asked.threshold)
            there = [hit for hit in hits if not self._engine.files_are_here or _is_there(hit.item)]
            if len(there) >= k or len(hits) < width:
                return [replace(hit, rank=rank) for rank, hit in enumerate(there[:k], 1)], _hidden(hits, there, k)
            width *= 4


def _hits(answer: Answer, items: dict[str, Item], modality: Modality, threshold: float | None) -> list[Hit]:
    """Rows of the first query as hits; items that went away between search and look-up are passed over."""
    hits: list[Hit] = []
    for score, name, part in zip(answer.scores[0].tolist(), answer.ids[0], answer.parts[0], strict=False):
        item = items.get(name)
        if item is None or part >= len(item.captions) or (threshold is not None and score < threshold):
            continue
        hits.append(Hit(len(hits) + 1, score, item, modality, None if part < 0 else item.captions[part]))
    return hits


def _hidden(hits: Sequence[Hit], there: Sequence[Hit], k: int) -> int:
    """How many hits as good as those shown, or better, are not shown because their files are gone."""
    shown, last = {id(hit) for hit in there}, there[k - 1].score if len(there) >= k else -1.0
    return sum(id(hit) not in shown and hit.score >= last for hit in hits)


def _is_there(item: Item) -> bool:
    return item.path is None or may_be_shown(item.path)


def _first_stage_only(where: str) -> UsageError:
    return UsageError(
        "rerank", expected="off or auto where an engine is searched", got=where,
        do="Re-ranking reads patch tokens, which lie in an index directory: search that one.",
    )  # fmt: skip
