"""A collection in PostgreSQL with the extension pgvector: `postgresql://user@host/db?collection=photos`.

    …?host=/run/postgresql   a Unix socket, as libpq writes it     …&index=hnsw   an HNSW index, made by `finish`
    …&ef_search=200          how far it looks, instead of tuned    …&index=none   exact whatever index there is

Decisions:
- A batch of items is one transaction: COPY into a temporary table, then INSERT … ON CONFLICT. Killed, it never was.
- Without an index a search is exact. With one, `ef_search` is the least that reached the overlap wanted, and a search
  goes exactly where HNSW cannot answer: more hits than it may look at, filters that leave few rows.
- Half-precision columns (halfvec, pgvector 0.7) where the server has them, else float32.
- One writer at a time, by an advisory lock that goes with its connection.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypeVar

import numpy as np
import psycopg
from psycopg import errors as pg
from psycopg import sql
from psycopg.types import TypeInfo

from mmsearch.errors import IndexLockedError, IndexNotFoundError, MmsearchError, ResourceError, StoreError
from mmsearch.index.base import check_k
from mmsearch.scale import pgvector_index
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
from mmsearch.scale.pgvector_sql import Tables, Vector, conditions, table_rows, vector_dumper
from mmsearch.similarity import check_embeddings
from mmsearch.types import Embeddings, Modality
from mmsearch.where import Where, storable

T = TypeVar("T")
_OURS = frozenset({"collection", "index", "ef_search", "overlap"})
_PAGE = 1000
_CONNECT_S = "10"
FEW = 20_000
"""So few rows that a filter leaves are compared one by one; `PgvectorEngine.few` starts with it."""


class PgvectorEngine:
    """See `engine.Engine`. A transaction at a time: searches of several threads wait for each other."""

    files_are_here = False
    most_bytes: int | None = 64 << 20

    def __init__(self, address: Address) -> None:
        self.where, self._address = address.shown, address
        self._index = address.choice("index", "auto", "hnsw", "none")
        self._ef = address.number("ef_search", 0, most=1000) if "ef_search" in address.options else None
        self._overlap = pgvector_index.target_of(address)
        self._tables, self._locked = Tables(address.collection), False
        self._lock, self.few = threading.RLock(), FEW
        self._db = self._connect()

    @classmethod
    def open(cls, address: Address, *, create: Collection | None = None) -> Self:
        """See `engine.Engine.open`."""
        engine = cls(address)
        try:
            engine._begin(create)
        except BaseException:
            engine.close()
            raise
        return engine

    def _connect(self) -> psycopg.Connection[Any]:
        uri = self._address.without(_OURS).replace(self._address.scheme, "postgresql", 1)
        try:
            return psycopg.connect(uri, autocommit=True, connect_timeout=int(_CONNECT_S))
        except psycopg.Error as error:
            raise StoreError(
                self.where,
                expected="a PostgreSQL server that lets us in",
                got=self._address.clean(error),
                do="Start it, or correct the address.",
            ) from error

    def _begin(self, create: Collection | None) -> None:
        """Find the collection, or make it."""
        if create is not None:
            self._do(lambda db: _extend(db, self.where))
        version = self._do(_version)
        self._tables = Tables(self._address.collection, "halfvec" if version >= (0, 7) else "vector")
        self._iterative = version >= (0, 8)
        if create is not None:
            self._do(lambda db: self._create(db, create))
        stored = self._do(self._stored) if self._do(self._there) else None
        if stored is None:
            raise IndexNotFoundError(
                self.where, expected="a collection", got="none", do="Make it: mmsearch push INDEX ADDRESS."
            )
        self.collection = Collection.from_json(stored, where=self.where)
        if create is not None:
            refuse_other_model(self.collection.model, create.model, where=self.where)
        self._do(self._learn_types)

    def _there(self, db: psycopg.Connection[Any]) -> bool:
        return bool(_value(db, "SELECT to_regclass(%s) IS NOT NULL", [f'"{self._tables.name}_meta"']))

    def _stored(self, db: psycopg.Connection[Any]) -> str | None:
        return self._get(db, "collection")

    def _create(self, db: psycopg.Connection[Any], wanted: Collection) -> None:
        """Both tables and what they are of, in one transaction; nothing where they are there."""
        with db.transaction():
            db.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", [self._tables.name])
            if self._there(db):
                return
            for statement in self._tables.create(wanted.model.dim):
                db.execute(statement)
            self._put(db, "collection", wanted.to_json())

    def _learn_types(self, db: psycopg.Connection[Any]) -> None:
        """The number of the vector type, and which it is in this table (it may be of an older pgvector)."""
        query = "SELECT t.typname FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid WHERE a.attrelid = %s::regclass AND a.attname = 'embedding'"  # noqa: E501
        kind = str(_value(db, query, [f'"{self._tables.name}"']))
        self._tables = Tables(self._address.collection, kind)
        found = TypeInfo.fetch(db, kind)
        if found is None:
            raise StoreError(self.where, expected=f"the type {kind}", got="none", do="Put pgvector on the search path.")
        db.adapters.register_dumper(Vector, vector_dumper(found.oid))

    def _do(self, work: Callable[[psycopg.Connection[Any]], T]) -> T:
        """Run `work` on the connection (a new one, if it was lost since the last call); errors become ours."""
        with self._lock:
            try:
                if self._db.closed:
                    self._db, self._locked = self._connect(), False
                    self._learn_types(self._db)
                return work(self._db)
            except MmsearchError:
                raise
            except (pg.DiskFull, pg.OutOfMemory) as error:
                got = self._address.clean(error)
                raise ResourceError(self.where, got=got, do="Make room on the server.") from error
            except psycopg.Error as error:
                raise StoreError(
                    self.where, expected="PostgreSQL to answer", got=self._address.clean(error), do="See its log."
                ) from error

    def upsert(self, entries: Sequence[Entry]) -> None:
        """See `engine.Engine.upsert`. One transaction."""
        check_entries(entries, dim=self.collection.model.dim, where=self.where)
        if entries:
            self._do(lambda db: self._upsert(db, entries))

    def _upsert(self, db: psycopg.Connection[Any], entries: Sequence[Entry]) -> None:
        self._only_writer(db)
        with db.transaction(), db.cursor() as cursor:
            cursor.execute(self._tables.stage())
            with cursor.copy(self._tables.copy()) as copy:
                for row in table_rows(entries, self._tables.kind):
                    copy.write_row(row)
            for statement in self._tables.merge():
                cursor.execute(statement)

    def _only_writer(self, db: psycopg.Connection[Any]) -> None:
        if not self._locked:
            query = "SELECT pg_try_advisory_lock(hashtext(%s), 1)"
            if not _value(db, query, [self._tables.name]):
                raise IndexLockedError(
                    self.where, expected="no other writer", got="one that is at work", do="Wait until it has ended."
                )
            self._locked = True

    def delete(self, ids: Sequence[str]) -> None:
        """See `engine.Engine.delete`."""
        wanted = _storable(ids)

        def work(db: psycopg.Connection[Any]) -> None:
            self._only_writer(db)
            db.execute(sql.SQL("DELETE FROM {} WHERE id = ANY(%s)").format(self._tables.rows), [wanted])

        if wanted:
            self._do(work)

    def search(self, queries: Embeddings, k: int, *, modality: Modality, where: Where = ()) -> Answer:
        """See `engine.Engine.search`."""
        queries = check_embeddings(queries, dim=self.collection.model.dim, where="query")
        check_k(k, len(queries))
        return self._do(lambda db: answer_of(self._nearest_of_all(db, queries, k, modality, where), k))

    def _nearest_of_all(
        self, db: psycopg.Connection[Any], queries: Embeddings, k: int, modality: Modality, where: Where
    ) -> list[list[tuple[float, str, int]]]:
        lists = []
        with db.transaction():
            ef = self._ef_search(db, modality, k, where)
            if ef is not None:
                pgvector_index.look(db, ef, iterative=self._iterative)
            for query in queries:
                found = self.nearest(db, query, k, modality=modality, where=where, exact=ef is None)
                if ef is not None and len(found) < k:  # HNSW ended before it had k: only all rows can tell
                    found = self.nearest(db, query, k, modality=modality, where=where, exact=True)
                lists.append(found)
        return lists

    def nearest(
        self,
        db: psycopg.Connection[Any],
        query: np.ndarray,
        k: int,
        *,
        modality: Modality,
        where: Where = (),
        exact: bool,
    ) -> list[tuple[float, str, int]]:
        """(score, id, part) of the k best rows; unless `exact`, by HNSW as far as `pgvector_index.look` says."""
        text, bound = conditions(where)
        vector, statement = Vector(query, self._tables.kind), self._tables.nearest(modality, text, exact=exact)
        found = db.execute(statement, [vector, *bound, vector, k]).fetchall()
        return best([(-distance, name, part) for name, part, distance in found], k)

    def _ef_search(self, db: psycopg.Connection[Any], modality: Modality, k: int, where: Where) -> int | None:
        """How far HNSW should look for this search; None where there is none, or it cannot answer."""
        if self._index == "none" or k > pgvector_index.MOST or not pgvector_index.there(db, self._tables, modality):
            return None
        if where:
            return None if self._few(db, modality, where) else pgvector_index.MOST
        stored = self._get(db, f"ef_search {modality.value}")
        return max(self._ef or int(stored or pgvector_index.STEPS[0]), min(2 * k, pgvector_index.MOST))

    def _few(self, db: psycopg.Connection[Any], modality: Modality, where: Where) -> bool:
        text, bound = conditions(where)
        query = sql.SQL("SELECT count(*) FROM (SELECT 1 FROM {} WHERE modality = {}{} LIMIT %s) AS matching").format(
            self._tables.rows, sql.Literal(modality.value), text
        )
        return int(_value(db, query, [*bound, self.few + 1])) <= self.few

    def fetch(self, ids: Sequence[str]) -> Items:
        """See `engine.Engine.fetch`."""
        return Items({name: item_from(text, where=self.where) for name, text in self._of(ids, "item")})

    def digests(self, ids: Sequence[str]) -> dict[str, str]:
        """See `engine.Engine.digests`."""
        return dict(self._of(ids, "digest"))

    def _of(self, ids: Sequence[str], column: str) -> list[tuple[str, str]]:
        query = sql.SQL("SELECT id, {0} FROM {1} WHERE id = ANY(%s) AND item IS NOT NULL").format(
            sql.Identifier(column), self._tables.rows
        )
        return self._do(lambda db: db.execute(query, [_storable(ids)]).fetchall())

    def ids(self) -> Iterator[list[str]]:
        """See `engine.Engine.ids`."""
        query = sql.SQL("SELECT id FROM {} WHERE id > %s AND item IS NOT NULL ORDER BY id LIMIT %s").format(
            self._tables.rows
        )
        last = ""
        while page := self._do(lambda db, last=last: db.execute(query, [last, _PAGE]).fetchall()):  # type: ignore[misc]
            last = page[-1][0]
            yield [name for (name,) in page]

    def count(self, modality: Modality) -> int:
        """See `engine.Engine.count`."""
        query = sql.SQL("SELECT count(*) FROM {} WHERE modality = %s").format(self._tables.rows)
        return int(self._do(lambda db: _value(db, query, [modality.value])))

    def mark(self) -> str:
        """See `engine.Engine.mark`."""
        return self._do(lambda db: self._get(db, "mark")) or ""

    def set_mark(self, mark: str) -> None:
        """See `engine.Engine.set_mark`."""

        def work(db: psycopg.Connection[Any]) -> None:
            self._only_writer(db)
            self._put(db, "mark", mark)

        self._do(work)

    def _get(self, db: psycopg.Connection[Any], key: str) -> str | None:
        query = sql.SQL("SELECT value FROM {} WHERE key = %s").format(self._tables.meta)
        found: str | None = _value(db, query, [key])
        return found

    def _put(self, db: psycopg.Connection[Any], key: str, value: str) -> None:
        query = sql.SQL("INSERT INTO {} VALUES (%s, %s) ON CONFLICT (key) DO UPDATE SET value = EXCLUDED.value")
        db.execute(query.format(self._tables.meta), [key, value])

    def finish(self) -> list[str]:
        """See `engine.Engine.finish`. Statistics, and with index=hnsw the index, with `ef_search` found anew."""
        return self._do(self._finish)

    def _finish(self, db: psycopg.Connection[Any]) -> list[str]:
        notes: list[str] = []
        for modality in Modality:
            if self._index == "hnsw" and not pgvector_index.there(db, self._tables, modality):
                db.execute(self._tables.index(modality))
            if self._index != "none" and pgvector_index.there(db, self._tables, modality):
                found = pgvector_index.tuned(
                    db, self._tables, modality, nearest=self.nearest, iterative=self._iterative, target=self._overlap
                )
                self._put(db, f"ef_search {modality.value}", str(found.ef))
                notes += [found.words(modality)] if found.queries else []
        db.execute(sql.SQL("ANALYZE {}").format(self._tables.rows))
        return notes

    def info(self) -> dict[str, Any]:
        """See `engine.Engine.info`."""
        server, size = self._do(
            lambda db: (
                _value(db, "SHOW server_version"),
                _value(db, "SELECT pg_total_relation_size(%s::regclass)", [f'"{self._tables.name}"']),
            )
        )
        indexed = {m.value: self._do(lambda db, m=m: pgvector_index.there(db, self._tables, m)) for m in Modality}  # type: ignore[misc]
        return {
            "engine": "pgvector",
            "server": f"PostgreSQL {server}, pgvector {'.'.join(map(str, self._do(_version)))}",
            "vectors": self._tables.kind,
            "hnsw": indexed,
            "bytes": size,
        }

    def close(self) -> None:
        """See `engine.Engine.close`."""
        with self._lock, contextlib.suppress(psycopg.Error):
            if self._locked and not self._db.closed:  # at once: the server notices the end of a connection later
                self._db.execute("SELECT pg_advisory_unlock_all()")
            self._db.close()


def _extend(db: psycopg.Connection[Any], where: str) -> None:
    """Have pgvector, or say what is missing."""
    try:
        if not _version(db) > (0,):
            db.execute("CREATE EXTENSION IF NOT EXISTS vector")
    except (pg.FeatureNotSupported, pg.UndefinedFile, pg.InsufficientPrivilege) as error:
        raise StoreError(
            where,
            expected="the extension pgvector",
            got=" ".join(str(error).split())[:200],
            do="Install it on the server, and let its administrator say CREATE EXTENSION vector.",
        ) from error


def _version(db: psycopg.Connection[Any]) -> tuple[int, ...]:
    """Of pgvector in this database, (0,) without it."""
    text = _value(db, "SELECT extversion FROM pg_extension WHERE extname = 'vector'")
    return tuple(int(part) for part in str(text).split(".")[:3] if part.isdigit()) if text else (0,)


def _value(db: psycopg.Connection[Any], query: Any, values: Sequence[Any] = ()) -> Any:  # noqa: ANN401 - a cell is what it is
    """The first cell of the answer; None for no row."""
    row = db.execute(query, values or None).fetchone()
    return None if row is None else row[0]


def _storable(ids: Sequence[str]) -> list[str]:
    """Ids that can be there at all: PostgreSQL's texts hold neither NUL nor undecodable bytes."""
    return [one for one in ids if storable(one) == one]
