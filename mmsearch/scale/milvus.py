"""A collection in Milvus: `milvus://host:19530/db?collection=photos`, or in a file: `milvus-lite:///p/x.db?collection=c`.

    …?index=hnsw&ef=200   an approximate index, chosen when the collection is made; else every row is compared
    …?tls=yes             an encrypted connection

Decisions:
- One client for both: what the tests do with milvus-lite, a cluster is asked in the same words.
- Milvus has no transactions. The first row of an item, its head, says how many rows the item has; all rows have its
  digest, and an item counts as there only when they agree. The head is written last and removed last, so that what was
  killed in between is known to be unfinished, and all of its rows can still be found. Where there is no head yet, or
  one that knows of fewer rows, a head without a digest is written first.
- Items are looked up by primary key alone, which needs no scan however large the collection is.
- Reads are strongly consistent: what was upserted is found.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypeVar
from urllib.parse import unquote

from mmsearch.errors import IndexNotFoundError, StoreError, UsageError
from mmsearch.index.base import check_k
from mmsearch.scale.address import Address
from mmsearch.scale.engine import (
    Answer,
    Collection,
    Entry,
    Items,
    answer_of,
    best,
    check_entries,
    item_from,
    refuse_other_model,
)
from mmsearch.scale.milvus_expr import META, expression, key, meta_row, table_rows
from mmsearch.similarity import check_embeddings
from mmsearch.types import Embeddings, Modality
from mmsearch.where import Where, storable

T = TypeVar("T")
MOST_K = 16_384
"""Milvus' own limit of answers to one query."""
_TEXT = 65_535
_PAGE = 500
_IDS = 5000
_SECONDS = 10.0
_OURS = {"collection", "index", "ef", "tls", "token"}


class MilvusEngine:
    """See `engine.Engine`."""

    files_are_here = False
    most_bytes: int | None = _TEXT

    def __init__(self, address: Address) -> None:
        address.refuse_other_options(_OURS)
        self.where, self._address, self._name = address.shown, address, address.collection
        self._kind, self._ef = address.choice("index", "flat", "hnsw"), address.number("ef", 128, most=MOST_K)
        self._client = self._connect()

    @classmethod
    def open(cls, address: Address, *, create: Collection | None = None) -> Self:
        """See `engine.Engine.open`."""
        if address.scheme == "milvus-lite" and create is None and not os.path.exists(_file(address)):
            raise _not_there(address.shown)
        engine = cls(address)
        try:
            engine._begin(create)
        except BaseException:
            engine.close()
            raise
        return engine

    def _connect(self) -> Any:  # noqa: ANN401 - pymilvus is untyped
        from pymilvus import MilvusClient

        # pymilvus logs every error with a traceback before it raises it; what it raises is enough.
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
        if self._address.scheme == "milvus-lite":
            return self._do(lambda: MilvusClient(_file(self._address)))
        parts = self._address.parts
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        token = self._address.options.get("token") or (f"{user}:{password}" if user else "")
        scheme = "https" if self._address.choice("tls", "no", "yes") == "yes" else "http"
        place = f"{scheme}://{parts.hostname or 'localhost'}:{parts.port or 19530}"
        database = unquote(parts.path.strip("/"))
        return self._do(lambda: MilvusClient(place, token=token, db_name=database, timeout=_SECONDS))

    def _do(self, work: Callable[[], T]) -> T:
        """Run `work`; what pymilvus raises becomes ours."""
        from pymilvus.exceptions import MilvusException

        try:
            return work()
        except (MilvusException, OSError) as error:
            raise StoreError(
                self.where,
                expected="Milvus to answer",
                got=self._address.clean(getattr(error, "message", "") or error),
                do="Start it, or correct the address.",
            ) from error

    def _begin(self, create: Collection | None) -> None:
        """Find the collection, or make it."""
        there = self._do(lambda: self._client.has_collection(self._name))
        if not there and create is not None:
            self._do(lambda: self._create(create.model.dim))
        elif not there:
            raise _not_there(self.where)
        self._do(lambda: self._client.load_collection(self._name))
        stored = self._meta()
        if stored is None and create is not None and not any(self.count(modality) for modality in Modality):
            # It was made just now, or a creation was killed before this.
            self._write([meta_row(create.model.dim, create.to_json(), "")])
            stored = self._meta()
        if stored is None:
            raise StoreError(
                self.where, expected="a collection of mmsearch", got="another one", do="Name another collection."
            )
        self.collection = Collection.from_json(stored["item"], where=self.where)
        if create is not None:
            refuse_other_model(self.collection.model, create.model, where=self.where)

    def _create(self, dim: int) -> None:
        from pymilvus import DataType, MilvusClient

        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=_TEXT)
        for name, length in (("id", _TEXT), ("modality", 16), ("digest", 256), ("item", _TEXT)):
            schema.add_field(name, DataType.VARCHAR, max_length=length)
        for name in ("part", "of"):
            schema.add_field(name, DataType.INT64)
        schema.add_field("head", DataType.BOOL)
        schema.add_field("facts", DataType.JSON)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
        index = self._client.prepare_index_params()
        how = {"M": 16, "efConstruction": 200} if self._kind == "hnsw" else {}
        index.add_index("vector", index_type=self._kind.upper(), metric_type="IP", params=how)
        self._client.create_collection(self._name, schema=schema, index_params=index, consistency_level="Strong")

    def _get(self, keys: Sequence[str], *fields: str) -> Iterator[dict[str, Any]]:
        """Rows by primary key, those that are there."""
        for some in _pages(keys):
            yield from self._do(lambda some=some: self._client.get(self._name, ids=some, output_fields=list(fields)))  # type: ignore[misc]

    def _meta(self) -> dict[str, Any] | None:
        return next(self._get([META], "item", "digest"), None)

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        for some in _pages(rows):
            self._do(lambda some=some: self._client.upsert(self._name, some))  # type: ignore[misc]

    def _remove(self, keys: Sequence[str]) -> None:
        for some in _pages(keys):
            self._do(lambda some=some: self._client.delete(self._name, ids=some))  # type: ignore[misc]

    def _heads(self, ids: Sequence[str], *fields: str) -> dict[str, dict[str, Any]]:
        """The first row of each item, by id."""
        keys = [key(one, 0) for one in ids if storable(one) == one]
        return {row["id"]: row for row in self._get(keys, "id", *fields)}

    def upsert(self, entries: Sequence[Entry]) -> None:
        """See `engine.Engine.upsert`. Other rows first, then what an item has no more goes, then the heads.

        Before all of them, heads that say how many rows are to come: what is killed later can be found, and removed.
        """
        check_entries(entries, dim=self.collection.model.dim, where=self.where)
        had = self._heads([entry.item.id for entry in entries], "of")
        rows = [table_rows(entry) for entry in entries]
        known = {name: int(head["of"]) for name, head in had.items()}
        more = [some for some in rows if len(some) > max(1, known.get(some[0]["id"], 0))]
        self._write([{**some[0], "digest": ""} for some in more])
        self._write([row for some in rows for row in some[1:]])
        self._remove([k for some in rows if some for k in _keys(had.get(some[0]["id"]), start=len(some))])
        self._write([some[0] for some in rows if some])

    def delete(self, ids: Sequence[str]) -> None:
        """See `engine.Engine.delete`. The heads last: they say which other rows there are."""
        heads = self._heads(ids, "of")
        self._remove([k for head in heads.values() for k in _keys(head, start=1)])
        self._remove([key(one, 0) for one in heads])

    def search(self, queries: Embeddings, k: int, *, modality: Modality, where: Where = ()) -> Answer:
        """See `engine.Engine.search`."""
        queries = check_embeddings(queries, dim=self.collection.model.dim, where="query")
        check_k(k, len(queries))
        if k > MOST_K:
            raise UsageError("k", expected=f"at most {MOST_K}, Milvus' limit", got=str(k))
        found = self._do(
            lambda: self._client.search(
                self._name,
                data=list(queries),
                anns_field="vector",
                limit=k,
                filter=expression(modality, where),
                output_fields=["id", "part"],
                search_params={"metric_type": "IP", "params": {"ef": max(self._ef, k)} if self._kind == "hnsw" else {}},
                consistency_level="Strong",
            )
        )
        lists = [[(h["distance"], h["entity"]["id"], int(h["entity"]["part"])) for h in hits] for hits in found]
        return answer_of([best(one, k) for one in lists], k)

    def fetch(self, ids: Sequence[str]) -> Items:
        """See `engine.Engine.fetch`."""
        heads = self._heads(ids, "item")
        return Items({name: item_from(row["item"], where=self.where) for name, row in heads.items()})

    def digests(self, ids: Sequence[str]) -> dict[str, str]:
        """See `engine.Engine.digests`. An item whose rows are not all there, or not of one upsert, is left out."""
        heads = self._heads(ids, "digest", "of")
        others = [k for head in heads.values() for k in _keys(head, start=1)]
        found = {row["key"]: row["digest"] for row in self._get(others, "key", "digest")}
        return {
            name: head["digest"]
            for name, head in heads.items()
            if all(found.get(k) == head["digest"] for k in _keys(head, start=1))
        }

    def ids(self) -> Iterator[list[str]]:
        """See `engine.Engine.ids`."""
        self.finish()  # milvus-lite reads what is not yet flushed row by row, a page at a time
        pages = self._do(
            lambda: self._client.query_iterator(
                self._name, batch_size=_IDS, filter="head == true", output_fields=["id"], consistency_level="Strong"
            )
        )
        try:
            while page := self._do(pages.next):
                yield [row["id"] for row in page]
        finally:
            pages.close()

    def count(self, modality: Modality) -> int:
        """See `engine.Engine.count`."""
        where = f'modality == "{modality.value}"'
        found = self._do(lambda: self._client.query(self._name, filter=where, output_fields=["count(*)"]))
        return int(found[0]["count(*)"])

    def mark(self) -> str:
        """See `engine.Engine.mark`."""
        return str((self._meta() or {}).get("digest", ""))

    def set_mark(self, mark: str) -> None:
        """See `engine.Engine.set_mark`."""
        self._write([meta_row(self.collection.model.dim, self.collection.to_json(), mark)])

    def finish(self) -> list[str]:
        """See `engine.Engine.finish`. Milvus indexes by itself; what is in memory is made durable."""
        self._do(lambda: self._client.flush(self._name))
        return []

    def info(self) -> dict[str, Any]:
        """See `engine.Engine.info`."""
        version = self._do(self._client.get_server_version)
        return {"engine": self._address.scheme, "server": version, "index": self._kind}

    def close(self) -> None:
        """See `engine.Engine.close`."""
        self._client.close()


def _pages(values: Sequence[T]) -> Iterator[list[T]]:
    """So many at a time as one request takes."""
    return (list(values[start : start + _PAGE]) for start in range(0, len(values), _PAGE))


def _keys(head: dict[str, Any] | None, *, start: int) -> list[str]:
    """Keys of an item's rows from number `start` on; none for an item that is not there."""
    return [] if head is None else [key(head["id"], number) for number in range(start, int(head["of"]))]


def _file(address: Address) -> str:
    """The file of a milvus-lite address."""
    path = unquote(address.parts.path)
    if address.parts.netloc or not path.endswith(".db"):
        raise UsageError(address.shown, expected="milvus-lite:///path/of/a/file.db", got="another place")
    return path


def _not_there(where: str) -> IndexNotFoundError:
    return IndexNotFoundError(where, expected="a collection", got="none", do="Make it: mmsearch push INDEX ADDRESS.")
