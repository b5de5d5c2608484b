"""Items with their rows, in pages; items by id; and which items fulfil conditions: what engines ask of a snapshot.

Decisions:
- Pages go by item number, so that memory does not grow with the index.
- Conditions are evaluated here, field by field: SQLite finds the items that have the field, `where.Condition.holds`
  decides. Field names and values never become part of a query's text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmsearch.store.base import ItemState
from mmsearch.store.snapshot import DirectorySnapshot
from mmsearch.store.sqlite import ITEM_COLUMNS, ITEMS_NAME, is_text, item_of
from mmsearch.types import Item, Modality, Rows
from mmsearch.where import Condition, Value, Where, scalar, storable

PAGE = 1000
_BLOB_TEXT = "CASE j.type WHEN 'text' THEN CAST(j.atom AS BLOB) ELSE j.atom END"
_COLUMNS = ("width", "height", "taken_at")


@dataclass(frozen=True, slots=True)
class Listed:
    """An item with its rows. `number`: in items.sqlite; `image`: row or None; `texts`: (part, row) in order of part."""

    number: int
    root: bytes
    name: bytes
    item: Item
    image: int | None
    texts: tuple[tuple[int, int], ...]

    def rows(self) -> list[int]:
        """The picture's row first, if there is one."""
        return [*([] if self.image is None else [self.image]), *(row for _, row in self.texts)]


def pages(snapshot: DirectorySnapshot, *, size: int = PAGE, after: int = -1) -> Iterator[list[Listed]]:
    """Every item that can be found, by number; those above `after`."""
    last = after
    query = f"SELECT i.item, i.root, i.name, {ITEM_COLUMNS} FROM items AS i WHERE i.item > ? AND i.state = ?"
    while found := snapshot.execute(f"{query} ORDER BY i.item LIMIT ?", (last, ItemState.OK, size)):
        last = found[-1][0]
        yield _with_rows(snapshot, found)


def by_ids(snapshot: DirectorySnapshot, ids: Iterable[str]) -> dict[str, Listed]:
    """Items by their public id; those that are not there are left out."""
    query = (
        f"SELECT i.item, i.root, i.name, {ITEM_COLUMNS} FROM json_each(?) AS w"
        " JOIN items AS i ON i.id = w.value WHERE i.state = ?"
    )
    found = snapshot.execute(query, (_json(sorted({one for one in ids if _may_be(one)})), ItemState.OK))
    return {one.item.id: one for one in _with_rows(snapshot, found)}


def known_ids(snapshot: DirectorySnapshot, ids: Sequence[str]) -> set[str]:
    """Which of these ids are of items that can be found."""
    query = "SELECT i.id FROM json_each(?) AS w JOIN items AS i ON i.id = w.value WHERE i.state = ?"
    wanted = _json([one for one in ids if _may_be(one)])
    return {one for (one,) in snapshot.execute(query, (wanted, ItemState.OK))}


def rows_where(snapshot: DirectorySnapshot, modality: Modality, where: Where) -> Rows:
    """Sorted rows of that modality whose items fulfil all conditions. (n,) int64."""
    items: set[int] | None = None
    for condition in where:
        held = {number for number, value in _field(snapshot, condition) if condition.holds(value)}
        items = held if items is None else items & held
        if not items:
            return np.empty(0, np.int64)
    query = "SELECT r.row FROM json_each(?) AS w JOIN rows AS r ON r.item = w.value WHERE (r.part IS NOT NULL) = ?"
    found = snapshot.execute(query, (_json(sorted(items or ())), is_text(modality)))
    rows = np.fromiter((row for (row,) in found), np.int64, len(found))
    rows.sort()
    return rows


def parts_of(snapshot: DirectorySnapshot, rows: Rows) -> dict[int, int]:
    """Row -> -1 for a picture, else which of the captions."""
    query = "SELECT r.row, ifnull(r.part, -1) FROM json_each(?) AS w JOIN rows AS r ON r.row = w.value"
    return dict(snapshot.execute(query, (_json([int(row) for row in rows]),)))


def _field(snapshot: DirectorySnapshot, condition: Condition) -> Iterator[tuple[int, Value | None]]:
    """(item number, value) of every item that has the field at all."""
    name = condition.field
    found = snapshot.execute(
        f"SELECT i.item, j.type, {_BLOB_TEXT} FROM items AS i,"
        " json_each(CASE WHEN json_valid(i.metadata) THEN i.metadata ELSE '{}' END) AS j"
        " WHERE i.metadata <> '{}' AND j.key = ? AND i.state = ?",
        (name, ItemState.OK),
    )
    stated = {number for number, *_ in found}
    for number, kind, value in found:
        yield number, _value(kind, value)
    if name in _COLUMNS:  # unless the metadata has that name; three names of ours, so this is no pasted text
        for number, value in snapshot.execute(f"SELECT item, {name} FROM items WHERE {name} IS NOT NULL"):
            if number not in stated:
                yield number, scalar(value)


def _value(kind: str, value: object) -> Value | None:
    """One cell of json_each as filters see it."""
    if kind in ("true", "false"):
        return kind == "true"
    if isinstance(value, bytes):
        return scalar(value.decode("utf-8", "surrogatepass"))
    return scalar(value) if kind in ("integer", "real") else None


def _with_rows(snapshot: DirectorySnapshot, found: Sequence[tuple[Any, ...]]) -> list[Listed]:
    query = "SELECT r.item, r.part, r.row FROM json_each(?) AS w JOIN rows AS r ON r.item = w.value"
    images: dict[int, int] = {}
    texts: dict[int, list[tuple[int, int]]] = {}
    for number, part, row in snapshot.execute(query, (_json([row[0] for row in found]),)):
        if part is None:
            images[number] = row
        else:
            texts.setdefault(number, []).append((part, row))
    listed = []
    for number, root, name, *facts in found:
        item, captions = item_of(tuple(facts), ITEMS_NAME), tuple(sorted(texts.get(number, ())))
        listed.append(Listed(number, root, name, item, images.get(number), captions))
    return listed


def _may_be(one: str) -> bool:
    """Whether an id can be one of the store's: those hold no undecodable bytes and no NUL."""
    return storable(one) == one


def _json(values: object) -> str:
    return json.dumps(values)
