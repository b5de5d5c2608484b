"""What runs inside Ray: an actor that holds one shard, and one that knows which shards belong together.

Decisions:
- An actor opens its index with the first question. So it starts anywhere, restarts by itself, and says what is wrong in
  an answer instead of dying of it.
- Errors and items travel as plain values: exceptions of ours do not survive Ray's serialisation.
- Each question names the model that it is about. A shard that was rebuilt for another one refuses it.
- The lock of a writer is given back after each change: whoever sent it may be killed, and the actor lives on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmsearch.errors import MmsearchError
from mmsearch.scale.engine import Answer, Entry, item_from, item_json, refuse_other_model
from mmsearch.scale.local_engine import LocalEngine
from mmsearch.types import Modality, ModelIdentity

SentEntry = tuple[str, np.ndarray | None, np.ndarray, tuple[int, ...]]
"""An `Entry` on its way: item as JSON, image, texts, parts."""
Reply = tuple[bool, Any]
"""(True, value) or (False, [error class, where, expected, got, do])."""


class Shard:
    """One index directory, searched where it lies. `ask` is all that it is asked."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._engine: LocalEngine | None = None

    def ask(self, model: str, method: str, *values: Any) -> Reply:  # noqa: ANN401 - as the methods have them
        """Run one of the methods below on the open index. `model`: JSON of the `ModelIdentity` asked about, or ""."""
        try:
            engine = self._open()
            if model:
                refuse_other_model(ModelIdentity(**json.loads(model)), engine.collection.model, where=self._path)
            return True, getattr(self, f"do_{method}")(engine, *values)
        except MmsearchError as error:
            return False, [type(error).__name__, error.where, error.expected, error.got, error.do]
        finally:
            if self._engine is not None:
                self._engine.release()

    def _open(self) -> LocalEngine:
        if self._engine is None:
            self._engine = LocalEngine(self._path)
        return self._engine

    def do_about(self, engine: LocalEngine) -> str:
        """The collection as JSON."""
        return engine.collection.to_json()

    def do_search(self, engine: LocalEngine, queries: np.ndarray, k: int, modality: str, where: Any) -> Answer:  # noqa: ANN401 - a Where
        """As `Engine.search`."""
        return engine.search(queries, k, modality=Modality(modality), where=where)

    def do_fetch(self, engine: LocalEngine, ids: Sequence[str]) -> dict[str, str]:
        """Items as JSON, by id."""
        return {name: item_json(item) for name, item in engine.fetch(ids).items()}

    def do_known(self, engine: LocalEngine, ids: Sequence[str]) -> list[str]:
        """Which of these items are there."""
        return engine.known(ids)

    def do_digests(self, engine: LocalEngine, ids: Sequence[str]) -> dict[str, str]:
        """As `Engine.digests`."""
        return engine.digests(ids)

    def do_ids(self, engine: LocalEngine, after: int) -> list[tuple[int, str]]:
        """A page of (number, id) of items."""
        return engine.page_of_ids(after)

    def do_count(self, engine: LocalEngine, modality: str) -> int:
        """As `Engine.count`."""
        return engine.count(Modality(modality))

    def do_upsert(self, engine: LocalEngine, entries: Sequence[SentEntry]) -> None:
        """As `Engine.upsert`."""
        engine.upsert([received(one, self._path) for one in entries])

    def do_delete(self, engine: LocalEngine, ids: Sequence[str]) -> None:
        """As `Engine.delete`."""
        engine.delete(ids)

    def do_mark(self, engine: LocalEngine) -> str:
        """As `Engine.mark`."""
        return engine.mark()

    def do_set_mark(self, engine: LocalEngine, mark: str) -> None:
        """As `Engine.set_mark`."""
        engine.set_mark(mark)

    def do_finish(self, engine: LocalEngine) -> None:
        """As `Engine.finish`; the index is then free for other writers again."""
        engine.finish()
        engine.close()
        self._engine = None

    def do_wait(self, engine: LocalEngine, seconds: float) -> None:
        """Be busy for so long: what a slow shard is, for tests of deadlines."""
        import time

        time.sleep(seconds)


class Registry:
    """Which shards belong to a name. `shards`: (label, actor's name) of each."""

    def __init__(self, collection: str, shards: Sequence[tuple[str, str]]) -> None:
        self._collection, self._shards = collection, list(shards)

    def about(self) -> tuple[str, list[tuple[str, str]]]:
        """The collection as JSON, and the shards."""
        return self._collection, self._shards


def sent(entry: Entry) -> SentEntry:
    """An entry as plain values."""
    return item_json(entry.item), entry.image, np.asarray(entry.texts), entry.parts


def received(one: SentEntry, where: str) -> Entry:
    """What `sent` made, as an entry again."""
    text, image, texts, parts = one
    return Entry(item_from(text, where=where), image, texts, tuple(parts))
