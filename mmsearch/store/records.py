"""Items with the rows that they have, many at a time: what an export writes and an import compares with.

Decisions:
- Pages go by item number, the order in which items came: their rows lie in the vector file in about that order.
- What is handed out are row numbers; whoever wants the rows takes them from the same snapshot.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmsearch.errors import IndexDamagedError
from mmsearch.store.base import ItemState
from mmsearch.store.disk import REBUILD, REENCODE
from mmsearch.store.snapshot import DirectorySnapshot
from mmsearch.store.sqlite import decode_captions, decode_metadata, plain
from mmsearch.store.vectors import wrong_blocks
from mmsearch.types import NO_METADATA, Metadata

_IN_A_QUERY = 500
_COLUMNS = "item, id, name, path, captions, metadata, width, height, taken_at, image, state"


@dataclass(slots=True)
class ItemRecord:
    """One item and its rows. `image`: row of its picture; `texts`: (row, which caption), in order of the captions.

    `skipped`: it is only remembered, and has no rows.
    """

    item: int
    id: str
    name: str
    path: str | None
    captions: tuple[str, ...] = ()
    metadata: Metadata = field(default_factory=lambda: NO_METADATA)
    width: int | None = None
    height: int | None = None
    taken_at: str | None = None
    image: int | None = None
    skipped: bool = False
    texts: list[tuple[int, int]] = field(default_factory=list)


def records(snapshot: DirectorySnapshot, *, page: int) -> Iterator[list[ItemRecord]]:
    """Every item that can be found, by item number, at most `page` at a time."""
    query = f"SELECT {_COLUMNS} FROM items WHERE item > ? AND state = ? ORDER BY item LIMIT ?"
    last = 0
    while found := [_record(row) for row in snapshot.execute(query, (last, ItemState.OK.value, page))]:
        last = found[-1].item
        _add_texts(snapshot, found)
        yield found


def records_named(snapshot: DirectorySnapshot, root: str, names: Sequence[str]) -> dict[str, ItemRecord]:
    """Those of `names` that are known below `root`, skipped ones included."""
    found: list[ItemRecord] = []
    for some in _portions(sorted(os.fsencode(name) for name in names)):
        query = f"SELECT {_COLUMNS} FROM items WHERE root = ? AND name IN ({','.join('?' * len(some))})"
        found += [_record(row) for row in snapshot.execute(query, (os.fsencode(root), *some))]
    _add_texts(snapshot, found)
    return {one.name: one for one in found}


def item_numbers(snapshot: DirectorySnapshot, root: str, *, page: int = 100_000) -> Iterator[list[int]]:
    """The numbers of all items below `root`, ascending, at most `page` at a time."""
    query = "SELECT item FROM items NOT INDEXED WHERE root = ? AND item > ? ORDER BY item LIMIT ?"
    last = 0
    while found := [item for (item,) in snapshot.execute(query, (os.fsencode(root), last, page))]:
        last = found[-1]
        yield found


def count_below(snapshot: DirectorySnapshot, root: str) -> int:
    """How many items are known below `root`, skipped ones included."""
    return int(snapshot.execute("SELECT count(*) FROM items WHERE root = ?", (os.fsencode(root),))[0][0])


def skipped_below(snapshot: DirectorySnapshot, root: str, *, most: int) -> list[tuple[str, str]]:
    """(name, why) of items below `root` that are only remembered, the first so many."""
    query = "SELECT name, detail FROM items WHERE root = ? AND state = ? ORDER BY item LIMIT ?"
    found = snapshot.execute(query, (os.fsencode(root), ItemState.SKIPPED.value, most))
    return [(os.fsdecode(name), detail) for name, detail in found]


def ids_elsewhere(snapshot: DirectorySnapshot, root: str, ids: Iterable[str]) -> int:
    """How many of those public ids belong to items that are not below `root`."""
    count = 0
    for some in _portions([plain(one) for one in ids]):
        query = f"SELECT count(*) FROM items WHERE id IN ({','.join('?' * len(some))}) AND root <> ?"
        count += int(snapshot.execute(query, (*some, os.fsencode(root)))[0][0])
    return count


def refuse_damage(snapshot: DirectorySnapshot) -> None:
    """`IndexDamagedError` when a stored row is not what was written; reads all of them."""
    blocks = snapshot.execute("SELECT first, count, xxh3 FROM blocks ORDER BY first")
    wrong = ((one[0], one[1], one[2]) for one in blocks)
    for first, count, _ in wrong_blocks(snapshot.vectors_path, wrong, dim=snapshot.dim):
        raise IndexDamagedError(
            snapshot.vectors_path, got=f"rows {first} to {first + count - 1} that are not those written", do=REENCODE
        )


def _add_texts(snapshot: DirectorySnapshot, found: Sequence[ItemRecord]) -> None:
    """Fill in `texts`."""
    by_item = {one.item: one for one in found}
    for some in _portions(sorted(one.item for one in found if one.captions)):
        marks = ",".join("?" * len(some))
        query = f"SELECT item, row, part FROM rows WHERE part IS NOT NULL AND item IN ({marks}) ORDER BY item, part"
        for item, row, part in snapshot.execute(query, some):
            by_item[item].texts.append((row, part))


def _portions(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (values[start : start + _IN_A_QUERY] for start in range(0, len(values), _IN_A_QUERY))


def _record(row: tuple[Any, ...]) -> ItemRecord:
    item, public_id, name, path, captions, metadata, width, height, taken_at, image, state = row
    try:
        return ItemRecord(
            item=item,
            id=public_id,
            name=os.fsdecode(name),
            path=None if path is None else os.fsdecode(path),
            captions=decode_captions(captions),
            metadata=decode_metadata(metadata),
            width=width,
            height=height,
            taken_at=taken_at,
            image=image,
            skipped=state == ItemState.SKIPPED.value,
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise IndexDamagedError("items.sqlite", got=f"item {item} that cannot be read ({error})", do=REBUILD) from error
