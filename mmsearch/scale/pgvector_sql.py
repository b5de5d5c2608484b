"""What pgvector's engine says to PostgreSQL: the tables, filters as bound parameters, vectors as bytes.

Decisions:
- A collection is two tables, `mm_NAME` and `mm_NAME_meta`. NAME is a checked identifier, and quoted all the same;
  nothing else of what a user says is ever part of a statement's text.
- Whole items and digests stand in the first row of each item only; what filters read stands in all of them.
- Texts are compared with the collation "C", which orders UTF-8 by code point, as filters promise.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from psycopg import sql
from psycopg.adapt import Dumper
from psycopg.pq import Format
from psycopg.types.json import Jsonb
from psycopg.types.numeric import Int4

from mmsearch.scale.engine import Entry, item_json
from mmsearch.types import Modality
from mmsearch.where import Condition, Op, Value, Where, facts_of, storable, tag, tagged

COLUMNS = ("id", "part", "modality", "embedding", "digest", "path", "caption", "facts", "item")
_COLUMNS = sql.SQL(", ").join(map(sql.Identifier, COLUMNS))


class Tables:
    """The names of one collection, quoted. `kind`: the vector type, "vector" (float32) or "halfvec" (float16)."""

    def __init__(self, collection: str, kind: str = "vector") -> None:
        self.name, self.kind = f"mm_{collection}", kind
        self.rows, self.meta = sql.Identifier(self.name), sql.Identifier(f"{self.name}_meta")

    def index_name(self, modality: Modality) -> str:
        """Of the HNSW index of one modality."""
        return f"{self.name}_{modality.value}_hnsw"

    def create(self, dim: int) -> Iterator[sql.Composed]:
        """The statements that make both tables."""
        yield sql.SQL("CREATE TABLE {} (key text PRIMARY KEY, value text NOT NULL)").format(self.meta)
        yield sql.SQL(
            'CREATE TABLE {} (id text COLLATE "C" NOT NULL, part integer NOT NULL, modality text NOT NULL,'
            " embedding {}({}) NOT NULL, digest text, path text, caption text, facts jsonb NOT NULL, item text,"
            " PRIMARY KEY (id, part))"
        ).format(self.rows, sql.SQL(self.kind), sql.Literal(dim))
        yield sql.SQL("CREATE INDEX {} ON {} USING gin (facts jsonb_path_ops)").format(
            sql.Identifier(f"{self.name}_facts"), self.rows
        )

    def stage(self) -> sql.Composed:
        """A temporary table for rows to come, gone with the transaction."""
        return sql.SQL("CREATE TEMP TABLE mm_stage (LIKE {}) ON COMMIT DROP").format(self.rows)

    def copy(self) -> sql.Composed:
        """COPY into that table, binary."""
        return sql.SQL("COPY mm_stage ({}) FROM STDIN (FORMAT BINARY)").format(_COLUMNS)

    def merge(self) -> Iterator[sql.Composed]:
        """From there to the collection: rows that an item has no more are removed, the others inserted or replaced."""
        yield sql.SQL(
            "DELETE FROM {} AS t WHERE t.id IN (SELECT id FROM mm_stage)"
            " AND NOT EXISTS (SELECT 1 FROM mm_stage AS s WHERE s.id = t.id AND s.part = t.part)"
        ).format(self.rows)
        changes = (sql.SQL("{0} = EXCLUDED.{0}").format(sql.Identifier(name)) for name in COLUMNS[2:])
        yield sql.SQL(
            "INSERT INTO {0} ({1}) SELECT {1} FROM mm_stage ORDER BY id, part ON CONFLICT (id, part) DO UPDATE SET {2}"
        ).format(self.rows, _COLUMNS, sql.SQL(", ").join(changes))

    def nearest(self, modality: Modality, conditions: sql.Composable, *, exact: bool) -> sql.Composed:
        """The query of a search; parameters: the vector, those of the conditions, the vector, k.

        `exact`: written so that no index can answer it. Settings would not do: a prepared statement keeps its plan.
        """
        return sql.SQL(
            "SELECT id, part, embedding <#> %s::{0} FROM {1} WHERE modality = {2}{3}"
            " ORDER BY (embedding <#> %s::{0}){4} LIMIT %s"
        ).format(
            sql.SQL(self.kind), self.rows, sql.Literal(modality.value), conditions, sql.SQL(" + 0" if exact else "")
        )

    def index(self, modality: Modality) -> sql.Composed:
        """The statement that makes the HNSW index of one modality."""
        return sql.SQL("CREATE INDEX {} ON {} USING hnsw (embedding {}) WHERE modality = {}").format(
            sql.Identifier(self.index_name(modality)),
            self.rows,
            sql.SQL(f"{self.kind}_ip_ops"),
            sql.Literal(modality.value),
        )


def conditions(where: Where) -> tuple[sql.Composed, list[Any]]:
    """` AND …` for each condition, and the parameters in order. Fields and values are parameters, all of them."""
    pieces: list[sql.SQL] = []
    values: list[Any] = []
    for condition in where:
        text, bound = _condition(condition)
        pieces.append(sql.SQL(" AND " + text))
        values += bound
    return sql.Composed(pieces), values


def _condition(condition: Condition) -> tuple[Any, list[Any]]:
    first = condition.values[0]
    if condition.op is Op.EQUAL:
        return "facts @> %s", [Jsonb({tag(first): {condition.field: first}})]
    if condition.op is Op.IN:
        return _listed(condition.field, condition.values)
    compared = "<=" if condition.op is Op.AT_MOST else ">="
    if isinstance(first, str):
        return f"(facts -> 't' ->> %s::text) COLLATE \"C\" {compared} %s::text", [condition.field, first]
    return f"(facts -> 'n' ->> %s::text)::float8 {compared} %s::float8", [condition.field, float(first)]


def _listed(name: str, values: Sequence[Value]) -> tuple[str, list[Any]]:
    by_tag: dict[str, list[Value]] = {}
    for value in values:
        by_tag.setdefault(tag(value), []).append(value)
    texts = [f"(facts -> '{letter}' -> %s::text) = ANY(%s::jsonb[])" for letter in by_tag]
    bound: list[Any] = []
    for some in by_tag.values():
        bound += [name, [json.dumps(value) for value in some]]
    return f"({' OR '.join(texts)})", bound


class Vector:
    """A (d,) vector as PostgreSQL's binary protocol has it: d, 0, then big-endian floats of 4 or 2 bytes."""

    __slots__ = ("packed",)

    def __init__(self, row: np.ndarray, kind: str) -> None:
        self.packed = struct.pack(">HH", len(row), 0) + row.astype(">f2" if kind == "halfvec" else ">f4").tobytes()


def vector_dumper(oid: int) -> type[Dumper]:
    """How psycopg sends a `Vector` where the type has this number (each database gives it another one)."""

    class VectorDumper(Dumper):
        format = Format.BINARY

        def dump(self, obj: Vector) -> bytes:
            return obj.packed

    VectorDumper.oid = oid
    return VectorDumper


def table_rows(entries: Sequence[Entry], kind: str) -> Iterator[tuple[Any, ...]]:
    """The rows of items in the order of COLUMNS."""
    for entry in entries:
        item, first = entry.item, True
        facts = Jsonb(tagged(facts_of(item)))
        path = None if item.path is None else storable(item.path)
        for modality, part, row in entry.rows():
            caption = None if part < 0 else storable(item.captions[part])
            whole = (entry.digest(), item_json(item)) if first else (None, None)
            yield item.id, Int4(part), modality.value, Vector(row, kind), whole[0], path, caption, facts, whole[1]
            first = False
