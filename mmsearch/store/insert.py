"""New items of a batch, written many at once: what one statement an item costs is most of a large import.

Decisions:
- Item numbers are counted here, in the order of the batch, as SQLite itself would have given them.
- An id that a table brought is written at once where nobody has it or asked for it before; every other case is left to
  `Applier`, which gives ids last.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

import xxhash

from mmsearch.store.base import Upsert
from mmsearch.store.sqlite import plain

Key = tuple[bytes, bytes]
"""(root, name) as stored."""

_IN_A_QUERY = 500


def items_there(db: sqlite3.Connection, keys: Iterable[Key]) -> dict[Key, tuple[int, int | None]]:
    """Of those (root, name) that the index has: item number, and row of its picture."""
    by_root: dict[bytes, list[bytes]] = {}
    for root, name in keys:
        by_root.setdefault(root, []).append(name)
    found: dict[Key, tuple[int, int | None]] = {}
    for root, names in by_root.items():
        for some, marks in _portions(sorted(names)):
            query = f"SELECT name, item, image FROM items WHERE root = ? AND name IN ({marks})"
            found.update(((root, name), (item, image)) for name, item, image in db.execute(query, (root, *some)))
    return found


def ids_there(db: sqlite3.Connection, ids: Sequence[str]) -> set[str]:
    """Those public ids that an item has."""
    return {
        one
        for some, marks in _portions(sorted(ids))
        for (one,) in db.execute(f"SELECT id FROM items WHERE id IN ({marks})", some)
    }


def _portions(values: Sequence[Any]) -> Iterator[tuple[Sequence[Any], str]]:
    for start in range(0, len(values), _IN_A_QUERY):
        some = values[start : start + _IN_A_QUERY]
        yield some, ",".join("?" * len(some))


def last_item(db: sqlite3.Connection) -> int:
    """The highest item number ever given."""
    found = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'items'").fetchone()
    return 0 if found is None else int(found[0])


def insert(db: sqlite3.Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert items; every row has the same columns in the same order, `item`, `root` and `name` among them.

    In order of their names: names in no order would each be on another page of a large index.
    """
    if rows:
        marks = ", ".join("?" * len(rows[0]))
        ordered = sorted(rows, key=itemgetter("root", "name"))
        db.executemany(
            f"INSERT INTO items ({', '.join(rows[0])}) VALUES ({marks})", (tuple(row.values()) for row in ordered)
        )


def ids_for(
    db: sqlite3.Connection, new: Mapping[int, Key], upserts: Sequence[Upsert]
) -> tuple[dict[int, str], set[int]]:
    """(position of a new item -> the id it begins with, positions that got the id they asked for).

    `new`: positions in `upserts` of items that are not there yet.
    """
    first_to_ask: dict[str, int] = {}
    for position, upsert in enumerate(upserts):
        if upsert.id:
            first_to_ask.setdefault(plain(upsert.id), position)
    own = {asked: position for asked, position in first_to_ask.items() if position in new}
    held = ids_there(db, list(own))
    ids = {position: asked for asked, position in own.items() if asked not in held}
    served, taken = set(ids), set(ids.values())
    rest = {position: item_id(*key) for position, key in new.items() if position not in served}
    held = ids_there(db, list(rest.values()))
    for position, candidate in rest.items():
        counter = 0
        while candidate in taken or candidate in held or (counter and ids_there(db, [candidate])):
            counter += 1
            candidate = item_id(*new[position], counter=counter)
        ids[position] = candidate
        taken.add(candidate)
    return ids, served


def item_id(root: bytes, name: bytes, *, counter: int = 0) -> str:
    """16 hex digits: xxh3_64 of root, NUL, name (and, when that is taken, NUL and a counter)."""
    salt = b"\0%d" % counter if counter else b""
    return str(xxhash.xxh3_64_hexdigest(root + b"\0" + name + salt))
