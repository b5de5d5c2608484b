"""How a batch becomes rows: first the vectors to append, then the changes to the database.

Decisions:
- All vectors are checked and read (copies included) before anything is written.
- Replaced rows are not overwritten; they go into `dead`, and compaction leaves them out one day.
- Moves pass through temporary names, so that files that swapped names can move in one batch; ids that
  a table swapped do likewise. Ids are given last, when it is known which ones are kept.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from mmsearch.errors import UsageError
from mmsearch.similarity import check_embeddings
from mmsearch.store.base import Batch, ItemState, Move, Skip, Touch, Upsert
from mmsearch.store.sqlite import encode_path, encode_stamp, encode_texts, plain
from mmsearch.types import Embeddings, Rows, Source, Stamp

_IN_A_QUERY = 500
_COPIED = ("width", "height", "taken_at", "note")


@dataclass(slots=True)
class RowPlan:
    """The rows a batch appends. Row i of `images` belongs to `image_of[i]`, a position in `batch.upserts`;
    row i of `texts` to `text_of[i]`, (position, which caption).
    """

    images: Embeddings
    texts: Embeddings
    image_of: list[int] = field(default_factory=list)
    text_of: list[tuple[int, int]] = field(default_factory=list)
    copied: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    """Item that is copied from -> the columns a copy takes over."""


def plan_rows(
    upserts: Sequence[Upsert], dim: int, *, connection: sqlite3.Connection, gather: Callable[[Rows], Embeddings]
) -> RowPlan:
    """Check the vectors of a batch and line them up. Raises `UsageError` for one that is not a unit row."""
    plan = RowPlan(np.empty((0, dim), np.float32), np.empty((0, dim), np.float32))
    pictures = _pictures(connection, sorted({u.image_from for u in upserts if u.image_from is not None}))
    plan.copied = {item: facts for item, (_, facts) in pictures.items()}
    images, texts = [], []
    for position, upsert in enumerate(upserts):
        where = upsert.source.path or upsert.source.name
        _check_one_picture(upsert, where)
        if upsert.image_vector is not None:
            images.append(check_embeddings(np.asarray(upsert.image_vector)[None], dim=dim, where=where))
            plan.image_of.append(position)
        elif upsert.image_from is not None:
            if upsert.image_from not in pictures:
                raise UsageError(where, expected="an item with a picture to copy from", got=str(upsert.image_from))
            images.append(gather(np.array([pictures[upsert.image_from][0]], np.int64)))
            plan.image_of.append(position)
        if upsert.text_vectors is not None and len(upsert.text_vectors):
            texts.append(check_embeddings(upsert.text_vectors, dim=dim, where=where))
            plan.text_of += [(position, part) for part in _parts(upsert, where)]
    plan.images = np.concatenate(images) if images else plan.images
    plan.texts = np.concatenate(texts) if texts else plan.texts
    return plan


def _check_one_picture(upsert: Upsert, where: str) -> None:
    given = (upsert.image_vector is not None) + (upsert.image_from is not None) + upsert.keep_image
    if given > 1:
        raise UsageError(where, expected="one of image_vector, image_from, keep_image", got="several")
    if upsert.keep_text and upsert.text_vectors is not None:
        raise UsageError(where, expected="text_vectors or keep_text", got="both")


def _parts(upsert: Upsert, where: str) -> Sequence[int]:
    count = 0 if upsert.text_vectors is None else len(upsert.text_vectors)
    captions = len(upsert.source.captions)
    parts = upsert.text_parts if upsert.text_parts is not None else tuple(range(captions))
    if len(parts) != count or len(set(parts)) != count or any(not 0 <= part < captions for part in parts):
        raise UsageError(
            where, expected="one text vector for each caption named", got=f"{count} vectors, captions {parts}"
        )
    return parts


def _pictures(connection: sqlite3.Connection, items: Sequence[int]) -> dict[int, tuple[int, Mapping[str, Any]]]:
    """Item -> row of its picture, and what is known of that."""
    found: dict[int, tuple[int, Mapping[str, Any]]] = {}
    for start in range(0, len(items), _IN_A_QUERY):
        some = items[start : start + _IN_A_QUERY]
        marks = ",".join("?" * len(some))
        query = f"SELECT item, image, {', '.join(_COPIED)} FROM items WHERE image IS NOT NULL AND item IN ({marks})"
        for item, row, *facts in connection.execute(query, some):
            found[item] = row, dict(zip(_COPIED, facts, strict=True))
    return found


def _picture_facts(upsert: Upsert, copied: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Columns to set; what is not given stays (`keep_image`: not set) or is the other item's (`image_from`)."""
    columns = {
        "hash": upsert.content_hash,
        "width": upsert.width,
        "height": upsert.height,
        "taken_at": None if upsert.taken_at is None else plain(upsert.taken_at),
        "note": plain(upsert.note),
    }
    given = {name: value for name, value in columns.items() if value not in (None, "")}
    if upsert.keep_image:
        return given
    return {**columns, **(copied[upsert.image_from] if upsert.image_from is not None else {}), **given}


class Applier:
    """Carries batches out on an open transaction. `read_ns`: clock before which no file of it was read."""

    def __init__(self, connection: sqlite3.Connection, *, read_ns: int) -> None:
        self._db, self._read_ns = connection, read_ns

    def apply(self, batch: Batch, plan: RowPlan, *, first_row: int) -> None:
        """Every change of the batch, in the order `Batch` states."""
        for item in batch.removals:
            self._remove(item)
        self._move(batch.moves)
        numbers = [self._upsert(upsert, plan.copied) for upsert in batch.upserts]
        self._give_ids({n: plain(u.id) for n, u in zip(numbers, batch.upserts, strict=True) if u.id})
        rows = [(first_row + i, numbers[position], None) for i, position in enumerate(plan.image_of)]
        self._db.executemany("UPDATE items SET image = ? WHERE item = ?", [(row, item) for row, item, _ in rows])
        first_text = first_row + len(rows)
        texts = [(first_text + i, numbers[position], part) for i, (position, part) in enumerate(plan.text_of)]
        self._db.executemany("INSERT INTO rows (row, item, part) VALUES (?, ?, ?)", [*rows, *texts])
        for skip in batch.skips:
            self._skip(skip)
        self._touch(batch.touched)

    def _remove(self, item: int) -> None:
        self._bury(item, pictures=True, texts=True)
        self._db.execute("DELETE FROM items WHERE item = ?", (item,))

    def _bury(self, item: int, *, pictures: bool, texts: bool) -> None:
        if not (pictures or texts):
            return
        which = "" if pictures and texts else " AND part IS NULL" if pictures else " AND part IS NOT NULL"
        where = f"FROM rows WHERE item = ?{which}"
        self._db.execute(f"INSERT INTO dead (row, is_text) SELECT row, part IS NOT NULL {where}", (item,))
        self._db.execute(f"DELETE {where}", (item,))
        if pictures:
            self._db.execute("UPDATE items SET image = NULL WHERE item = ?", (item,))

    def _move(self, moves: Sequence[Move]) -> None:
        for move in moves:  # out of the way first: a and b may have swapped names
            aside = b"\0moving\0%d" % move.item
            if self._db.execute("UPDATE items SET name = ? WHERE item = ?", (aside, move.item)).rowcount != 1:
                raise UsageError("move", expected="an item of the index", got=str(move.item))
        for move in moves:
            key = (os.fsencode(move.source.root), os.fsencode(move.source.name))
            there = self._db.execute("SELECT item FROM items WHERE root = ? AND name = ?", key).fetchone()
            if there is not None:
                self._remove(there[0])
            stamp = encode_stamp(move.stamp or move.source.stamp)
            self._db.execute(
                "UPDATE items SET root = ?, name = ?, path = ?, size = ?, mtime_ns = ?, ctime_ns = ?, read_ns = ?"
                " WHERE item = ?",
                (*key, encode_path(move.source.path), *stamp, self._read_ns, move.item),
            )

    def _upsert(self, upsert: Upsert, copied: Mapping[int, Mapping[str, Any]]) -> int:
        values = {
            **self._facts(upsert.source, upsert.stamp or upsert.source.stamp),
            "state": ItemState.OK.value,
            "reason": None,
            "detail": "",
            **_picture_facts(upsert, copied),
        }
        item, had_image = self._put(upsert.source, values)
        if upsert.keep_image and not had_image:
            raise UsageError(upsert.source.path or upsert.source.name, expected="a stored picture to keep", got="none")
        self._bury(item, pictures=not upsert.keep_image, texts=not upsert.keep_text)
        return item

    def _skip(self, skip: Skip) -> None:
        values = {
            **self._facts(skip.source, skip.stamp or skip.source.stamp),
            "hash": skip.content_hash,
            "state": ItemState.SKIPPED.value,
            "reason": skip.skipped.reason.value,
            "detail": plain(skip.skipped.detail),
            "width": None,
            "height": None,
            "taken_at": None,
            "note": "",
        }
        item, _ = self._put(skip.source, values)
        self._bury(item, pictures=True, texts=True)

    def _facts(self, source: Source, stamp: Stamp | None) -> dict[str, Any]:
        size, mtime, ctime = encode_stamp(stamp)
        captions, metadata = encode_texts(source.captions, source.metadata)
        return {
            "path": encode_path(source.path),
            "size": size,
            "mtime_ns": mtime,
            "ctime_ns": ctime,
            "read_ns": self._read_ns,
            "captions": captions,
            "metadata": metadata,
        }

    def _put(self, source: Source, values: dict[str, Any]) -> tuple[int, bool]:
        """Insert or update the item of that (root, name): its number, and whether it had a picture."""
        key = (os.fsencode(source.root), os.fsencode(source.name))
        there = self._db.execute("SELECT item, image FROM items WHERE root = ? AND name = ?", key).fetchone()
        if there is not None:
            sets = ", ".join(f"{name} = ?" for name in values)
            self._db.execute(f"UPDATE items SET {sets} WHERE item = ?", (*values.values(), there[0]))
            return there[0], there[1] is not None
        everything = {"id": self._new_id(key), "root": key[0], "name": key[1], **values}
        marks = ", ".join("?" * len(everything))
        cursor = self._db.execute(
            f"INSERT INTO items ({', '.join(everything)}) VALUES ({marks})", tuple(everything.values())
        )
        return int(cursor.lastrowid or 0), False

    def _new_id(self, key: tuple[bytes, bytes]) -> str:
        candidate, counter = item_id(*key), 0
        while self._holder(candidate) is not None:
            counter += 1
            candidate = item_id(*key, counter=counter)
        return candidate

    def _holder(self, public_id: str) -> int | None:
        found = self._db.execute("SELECT item FROM items WHERE id = ?", (public_id,)).fetchone()
        return None if found is None else int(found[0])

    def _give_ids(self, asked: Mapping[int, str]) -> None:
        """Give items the ids they ask for, except those that an item keeps; `asked`: item -> id."""
        has: dict[int, str] = {}
        wanted: dict[str, int] = {}
        for item, new in asked.items():
            (has[item],) = self._db.execute("SELECT id FROM items WHERE item = ?", (item,)).fetchone()
            if has[item] != new:
                wanted.setdefault(new, item)
        changing = set(wanted.values())
        kept = [new for new in wanted if (holder := self._holder(new)) is not None and holder not in changing]
        while kept:  # who does not get the one keeps the other, which somebody else may be waiting for
            loser = wanted.pop(kept.pop())
            if has[loser] in wanted:
                kept.append(has[loser])
        aside = [(b"\0naming\0%d" % item, item) for item in wanted.values() if has[item] in wanted]
        for pairs in (aside, list(wanted.items())):
            self._db.executemany("UPDATE items SET id = ? WHERE item = ?", pairs)

    def _touch(self, touched: Sequence[Touch]) -> None:
        self._db.executemany(
            "UPDATE items SET size = ?, mtime_ns = ?, ctime_ns = ?, read_ns = ? WHERE item = ?",
            [(*encode_stamp(touch.stamp), self._read_ns, touch.item) for touch in touched],
        )


def item_id(root: bytes, name: bytes, *, counter: int = 0) -> str:
    """16 hex digits: xxh3_64 of root, NUL, name (and, when that is taken, NUL and a counter)."""
    salt = b"\0%d" % counter if counter else b""
    return str(xxhash.xxh3_64_hexdigest(root + b"\0" + name + salt))
