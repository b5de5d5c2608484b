"""How a batch becomes rows: first the vectors to append, then the changes to the database.

Decisions:
- All vectors are checked and read (copies included) before anything is written.
- Replaced rows are not overwritten; they go into `dead`, and compaction leaves them out one day.
- Moves pass through temporary names, so that files that swapped names can move in one batch; ids that
  a table swapped do likewise. Ids are given last, when it is known which ones are kept.
- Vectors are checked together and new items inserted together (`insert`): an import brings millions of them.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import UsageError
from mmsearch.similarity import UNIT_TOLERANCE, check_embeddings
from mmsearch.store.base import Batch, ItemState, Move, Skip, Touch, Upsert
from mmsearch.store.insert import Key, ids_for, insert, item_id, items_there, last_item
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
    images: list[NDArray[Any]] = []
    texts: list[NDArray[Any]] = []
    for position, upsert in enumerate(upserts):
        where = _where(upsert)
        _check_one_picture(upsert, where)
        if upsert.image_vector is not None:
            images.append(np.asarray(upsert.image_vector)[None])
            plan.image_of.append(position)
        elif upsert.image_from is not None:
            if upsert.image_from not in pictures:
                raise UsageError(where, expected="an item with a picture to copy from", got=str(upsert.image_from))
            images.append(gather(np.array([pictures[upsert.image_from][0]], np.int64)))
            plan.image_of.append(position)
        if upsert.text_vectors is not None and len(upsert.text_vectors):
            texts.append(np.asarray(upsert.text_vectors))
            plan.text_of += [(position, part) for part in _parts(upsert, where)]
    given = [upserts[position] for position in plan.image_of]
    plan.images = _together(images, given, dim)
    plan.texts = _together(texts, [u for u in upserts if u.text_vectors is not None and len(u.text_vectors)], dim)
    return plan


def _where(upsert: Upsert) -> str:
    return upsert.source.path or upsert.source.name


def _together(rows: Sequence[NDArray[Any]], of: Sequence[Upsert], dim: int) -> Embeddings:
    """Rows of upserts, (m, d) each, below one another: (n, d). Raises `UsageError` naming the first without norm 1."""
    if all(part.ndim == 2 and part.shape[1] == dim for part in rows):
        joined = np.concatenate(rows, dtype=np.float32) if rows else np.empty((0, dim), np.float32)
        if (np.abs(np.linalg.norm(joined, axis=1) - 1.0) <= UNIT_TOLERANCE).all():
            return joined
    return np.concatenate(
        [check_embeddings(part, dim=dim, where=_where(upsert)) for part, upsert in zip(rows, of, strict=True)]
    )


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
        "note": plain(upsert.note) if upsert.note else "",
    }
    given = {name: value for name, value in columns.items() if value not in (None, "")}
    if upsert.keep_image:
        return given
    if upsert.image_from is None:
        return columns
    return {**columns, **copied[upsert.image_from], **given}


class Applier:
    """Carries batches out on an open transaction. `read_ns`: clock before which no file of it was read."""

    def __init__(self, connection: sqlite3.Connection, *, read_ns: int) -> None:
        self._db, self._read_ns = connection, read_ns

    def apply(self, batch: Batch, plan: RowPlan, *, first_row: int) -> None:
        """Every change of the batch, in the order `Batch` states."""
        for item in batch.removals:
            self._remove(item)
        self._move(batch.moves)
        numbers = self._put_all(batch.upserts, plan, first_row)
        rows = [(first_row + i, numbers[position], None) for i, position in enumerate(plan.image_of)]
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

    def _put_all(self, upserts: Sequence[Upsert], plan: RowPlan, first_row: int) -> list[int]:
        """Insert or update the items of all upserts: their numbers, in order. Old rows are buried, ids given."""
        keys = [_key(upsert.source) for upsert in upserts]
        there = items_there(self._db, keys)
        new = {position: key for position, key in enumerate(keys) if key not in there}
        if len(set(keys)) < len(keys):
            raise _twice(upserts, keys)
        images = {position: first_row + i for i, position in enumerate(plan.image_of)}
        served = self._insert_new(new, upserts, plan.copied, images)
        numbers = [there[key][0] if key in there else -1 for key in keys]
        for number, position in enumerate(new, last_item(self._db) - len(new) + 1):
            numbers[position] = number
        for position, upsert in enumerate(upserts):
            if position not in new:
                self._update(numbers[position], there[keys[position]][1], upsert, plan.copied)
        self._db.executemany(
            "UPDATE items SET image = ? WHERE item = ?",
            [(row, numbers[position]) for position, row in images.items() if position not in new],
        )
        self._give_ids({numbers[p]: plain(u.id) for p, u in enumerate(upserts) if u.id and p not in served})
        return numbers

    def _insert_new(
        self,
        new: Mapping[int, Key],
        upserts: Sequence[Upsert],
        copied: Mapping[int, Mapping[str, Any]],
        images: Mapping[int, int],
    ) -> set[int]:
        """Insert the items at positions `new`; the positions that got the id they asked for."""
        ids, served = ids_for(self._db, new, upserts)
        rows = []
        for item, (position, key) in enumerate(new.items(), last_item(self._db) + 1):
            upsert = upserts[position]
            if upsert.keep_image:
                raise UsageError(_where(upsert), expected="a stored picture to keep", got="none")
            first = {"item": item, "id": ids[position], "root": key[0], "name": key[1], "image": images.get(position)}
            rows.append({**first, **self._values(upsert, copied)})
        insert(self._db, rows)
        return served

    def _update(self, item: int, image: int | None, upsert: Upsert, copied: Mapping[int, Mapping[str, Any]]) -> None:
        if upsert.keep_image and image is None:
            raise UsageError(_where(upsert), expected="a stored picture to keep", got="none")
        self._set(item, self._values(upsert, copied))
        self._bury(item, pictures=not upsert.keep_image, texts=not upsert.keep_text)

    def _values(self, upsert: Upsert, copied: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
        return {
            **self._facts(upsert.source, upsert.stamp or upsert.source.stamp),
            "state": ItemState.OK.value,
            "reason": None,
            "detail": "",
            **_picture_facts(upsert, copied),
        }

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
        key = _key(skip.source)
        there = items_there(self._db, [key])
        if there:
            (item, _), *_rest = there.values()
            self._set(item, values)
            self._bury(item, pictures=True, texts=True)
            return
        (new_id,) = ids_for(self._db, {0: key}, [])[0].values()
        item = last_item(self._db) + 1
        insert(self._db, [{"item": item, "id": new_id, "root": key[0], "name": key[1], **values}])

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

    def _set(self, item: int, values: Mapping[str, Any]) -> None:
        sets = ", ".join(f"{name} = ?" for name in values)
        self._db.execute(f"UPDATE items SET {sets} WHERE item = ?", (*values.values(), item))

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


def _twice(upserts: Sequence[Upsert], keys: Sequence[Key]) -> UsageError:
    last = {key: position for position, key in enumerate(keys)}
    position = next(position for position, key in enumerate(keys) if last[key] != position)
    return UsageError(_where(upserts[position]), expected="one upsert an item in a batch", got="two")


def _key(source: Source) -> Key:
    return os.fsencode(source.root), os.fsencode(source.name)


__all__ = ["Applier", "RowPlan", "item_id", "plan_rows"]
