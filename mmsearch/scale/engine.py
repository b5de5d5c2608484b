"""The seam of engines: what a place that holds a collection and searches it can do, and which there are.

Decisions:
- An engine holds items whole: `upsert` replaces everything that it had of an item, `delete` removes all of it.
- Vectors go in and come out as unit rows, scores are cosines. Rows and queries are checked at this border.
- What an engine keeps of an item has a digest. Two that are equal need not be sent again; that is how a collection is
  brought up to date, and why a push that was killed just goes on.
- The identity of the model is kept in the engine. Vectors of another model are refused before anything is compared.
- Filters (`mmsearch.where`) are evaluated inside the engine, before the k best are taken.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, Self, TypeAlias

import numpy as np
import xxhash

from mmsearch.errors import IndexDamagedError, IndexMismatchError, MissingExtraError, UsageError
from mmsearch.opened import check_same_kind
from mmsearch.scale.address import Address
from mmsearch.similarity import check_embeddings
from mmsearch.types import Embeddings, Item, Modality, ModelIdentity, Preprocessing, Scores
from mmsearch.where import Where

NO_ROWS: Embeddings = np.empty((0, 0), np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """An item with all its rows. `image` (d,); `texts` (m, d), row i made of `item.captions[parts[i]]`."""

    item: Item
    image: np.ndarray | None = None
    texts: np.ndarray = field(default_factory=lambda: NO_ROWS)
    parts: tuple[int, ...] = ()

    def rows(self) -> Iterator[tuple[Modality, int, np.ndarray]]:
        """(modality, part, (d,)) of every row; part -1 is the picture."""
        if self.image is not None:
            yield Modality.IMAGE, -1, self.image
        yield from ((Modality.TEXT, part, row) for part, row in zip(self.parts, self.texts, strict=True))

    def digest(self) -> str:
        """32 hex digits of everything that an engine keeps of the item; vectors count as half-precision numbers."""
        hashed = xxhash.xxh3_128(json.dumps([item_json(self.item), self.image is None, *self.parts]).encode())
        for _, _, row in self.rows():
            hashed.update(np.ascontiguousarray(row, np.float16).tobytes())
        return hashed.hexdigest()


@dataclass(frozen=True, slots=True)
class Collection:
    """What an engine keeps of a collection as a whole: whose vectors, how pictures were prepared, with what."""

    model: ModelIdentity
    preprocessing: Preprocessing
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """ASCII JSON."""
        return json.dumps(asdict(self), sort_keys=True, default=str)

    @classmethod
    def from_json(cls, text: str, *, where: str) -> Self:
        """Read what `to_json` wrote. Raises `IndexDamagedError`."""
        from mmsearch.store.manifest import preprocessing_from

        try:
            read = json.loads(text)
            model = ModelIdentity(**read["model"])
            return cls(model, preprocessing_from(read["preprocessing"]), dict(read["settings"]))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise IndexDamagedError(where, got=f"no readable model ({error!r})", do="Push it anew.") from error


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """The k best rows of each query, best first. `scores`: (q, k), -inf pads; `ids`, `parts`: q lists of at most k.

    `parts`: -1 for a picture, else which caption. `missing`: parts of the collection that did not answer, in words.
    """

    scores: Scores
    ids: list[list[str]]
    parts: list[list[int]]
    missing: tuple[str, ...] = ()


class Items(dict[str, Item]):
    """Items by id. `missing`: as in `Answer`; what they hold may be lacking here."""

    def __init__(self, items: Mapping[str, Item] | None = None, *, missing: Sequence[str] = ()) -> None:
        super().__init__(items or {})
        self.missing = tuple(missing)


class Engine(Protocol):
    """A collection in an engine. Thread-safe for searching; close it.

    `where`: its address as messages show it. `files_are_here`: paths of items are those of this machine.
    `most_bytes`: the longest `item_json` that it can keep, None without a limit.
    """

    where: str
    collection: Collection
    files_are_here: bool
    most_bytes: int | None

    @classmethod
    def open(cls, address: Address, *, create: Collection | None = None) -> Self:
        """Open the collection; with `create` it is made if it is not there, else its model must be the same.

        Raises `IndexNotFoundError`, `IndexMismatchError`, `StoreError` (the server), `MissingExtraError`.
        """
        ...

    def upsert(self, entries: Sequence[Entry]) -> None:
        """Put items in, or replace them whole. Raises `UsageError` for rows that are not unit rows of dimension d."""
        ...

    def delete(self, ids: Sequence[str]) -> None:
        """Remove items; ids that are not there are passed over."""
        ...

    def search(self, queries: Embeddings, k: int, *, modality: Modality, where: Where = ()) -> Answer:
        """The k best rows for each query, (q, d) unit rows; `where`: only of items that fulfil all of it."""
        ...

    def fetch(self, ids: Sequence[str]) -> Items:
        """Items by id; those that are not there are left out."""
        ...

    def digests(self, ids: Sequence[str]) -> dict[str, str]:
        """`Entry.digest` of items that are there whole, by id."""
        ...

    def ids(self) -> Iterator[list[str]]:
        """The ids of all items, in pages. Items may be deleted between pages."""
        ...

    def count(self, modality: Modality) -> int:
        """How many rows there are; `StoreError` where a part of the collection does not say."""
        ...

    def mark(self) -> str:
        """What `set_mark` left; "" at first."""
        ...

    def set_mark(self, mark: str) -> None:
        """Keep a short text with the collection: which index, and how far it was brought up to date."""
        ...

    def finish(self) -> list[str]:
        """After changes: make or renew what makes searching fast. Notes for the user."""
        ...

    def info(self) -> dict[str, Any]:
        """Facts for people: JSON values."""
        ...

    def close(self) -> None:
        """Let go of connections and files."""
        ...


Listed: TypeAlias = tuple[str, str, str | None, str | None]
"""(module, class, package it needs, extra that brings that package)."""

_ENGINES: Mapping[str, Listed] = {
    "file": ("mmsearch.scale.local_engine", "LocalEngine", None, None),
    "postgresql": ("mmsearch.scale.pgvector", "PgvectorEngine", "psycopg", "pgvector"),
    "postgres": ("mmsearch.scale.pgvector", "PgvectorEngine", "psycopg", "pgvector"),
    "milvus": ("mmsearch.scale.milvus", "MilvusEngine", "pymilvus", "milvus"),
    "milvus-lite": ("mmsearch.scale.milvus", "MilvusEngine", "milvus_lite", "milvus-lite"),
    "ray": ("mmsearch.scale.ray_serve", "RayEngine", "ray", "ray"),
}
"""By scheme of an address."""


def open_engine(uri: str, *, create: Collection | None = None, engines: Mapping[str, Listed] = _ENGINES) -> Engine:
    """The collection at an address; see `Engine.open`. Raises `UsageError` for a scheme that is not in `engines`."""
    address = Address.parse(uri)
    if address.scheme not in engines:
        schemes = " or ".join(f"{name}://" for name in sorted(engines))
        raise UsageError("address of an engine", expected=schemes, got=f"{address.scheme}://"[:60])
    module, attribute, package, extra = engines[address.scheme]
    if package is not None and importlib.util.find_spec(package) is None:
        raise MissingExtraError(f"engine {address.scheme}", package=package, extra=extra or "")
    kind: type[Engine] = getattr(importlib.import_module(module), attribute)
    return kind.open(address, create=create)


def item_json(item: Item) -> str:
    """An item as ASCII JSON, undecodable file names included."""
    return json.dumps(
        {
            "id": item.id,
            "path": item.path,
            "captions": list(item.captions),
            "metadata": dict(item.metadata),
            "width": item.width,
            "height": item.height,
            "taken_at": item.taken_at,
        },
        sort_keys=True,
        default=str,
    )


def item_from(text: str, *, where: str) -> Item:
    """Read what `item_json` wrote. Raises `IndexDamagedError`."""
    try:
        read = json.loads(text)
        return Item(**{**read, "captions": tuple(read["captions"])})
    except (ValueError, TypeError, KeyError) as error:
        raise IndexDamagedError(where, got=f"an item that cannot be read ({error!r})", do="Push it anew.") from error


def check_entries(entries: Sequence[Entry], *, dim: int, where: str) -> None:
    """Raise `UsageError` for rows that are not unit rows of dimension d, or an id that comes twice."""
    for entry in entries:
        name = f"{where}, item {entry.item.id}"
        if entry.image is not None:
            check_embeddings(np.asarray(entry.image)[None], dim=dim, where=name)
        if len(entry.parts) != len(entry.texts) or any(not 0 <= p < len(entry.item.captions) for p in entry.parts):
            raise UsageError(name, expected="one caption for each text row", got=f"captions {entry.parts}")
        if len(entry.texts):
            check_embeddings(entry.texts, dim=dim, where=name)
    if len({entry.item.id for entry in entries}) != len(entries):
        raise UsageError(where, expected="each item once", got="an id that comes twice")


def refuse_other_model(has: ModelIdentity, got: ModelIdentity, *, where: str) -> None:
    """Raise `IndexMismatchError`, naming both fingerprints, unless rows of both can be compared."""
    if not has.same_space(got):
        raise IndexMismatchError(
            where,
            expected=f"the model it was made with, {_shown(has)}",
            got=_shown(got),
            do="Use that model, or push to another collection.",
        )


def refuse_other_kind(has: Mapping[str, Any], got: Mapping[str, Any], *, where: str) -> None:
    """Raise `IndexMismatchError` unless rows of both stand for the same: picture and caption apart, or fused."""
    check_same_kind(has, got, where=where, do="Keep the two kinds apart: another collection, or shards of one kind.")


def _shown(model: ModelIdentity) -> str:
    return f"{model.name} (weights {model.weights}, preprocessing {model.preprocessing}, dim {model.dim})"


def best(found: Sequence[tuple[float, str, int]], k: int) -> list[tuple[float, str, int]]:
    """The k best of (score, id, part): highest score, then id and part, so that the place of a row never matters."""
    return sorted(found, key=lambda one: (-one[0], one[1], one[2]))[:k]


def answer_of(lists: Sequence[Sequence[tuple[float, str, int]]], k: int, *, missing: Sequence[str] = ()) -> Answer:
    """An `Answer` of q lists of (score, id, part), each best first and at most k long."""
    scores = np.full((len(lists), k), -np.inf, np.float32)
    for row, found in zip(scores, lists, strict=True):
        row[: len(found)] = np.clip([score for score, _, _ in found], -1.0, 1.0) if found else ()
    return Answer(scores, [[i for _, i, _ in f] for f in lists], [[p for _, _, p in f] for f in lists], tuple(missing))
