"""Items copied from one index into another as they are: rows bit by bit, ids, names, stamps, captions, skips.

    with Origin("indexes/photos") as origin, IndexStore.create(...) as target:
        copy_items(target, origin, [item for item, _ in origin.page(last_item(target))], offset=0)

Decisions:
- An item keeps its number, raised by an offset that all items of its origin share, and items are copied in order of
  their numbers. So what was copied is said by the greatest number that the target has, and by nothing else.
- A batch is one commit: items, their rows and the checksums of those are there or they are not. Dead rows stay behind.
- Rows are read against their checksums, block by block, before they are written anywhere; items.sqlite as a whole.
- Where several origins have an item of one (root, name) or of one id, the newer stamp wins: the later modification,
  then the later change of the inode, then what could be read over what could not, then what was read later, then the
  origin named first. An item gives way only to one that is copied itself.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import IndexDamagedError
from mmsearch.store.base import Batch, ItemState
from mmsearch.store.check import ItemsFile
from mmsearch.store.directory import IndexStore
from mmsearch.store.disk import REENCODE, os_guard, sqlite_guard
from mmsearch.store.imports import Imported, imports_fact, imports_of
from mmsearch.store.manifest import read_manifest
from mmsearch.store.snapshot import DirectorySnapshot
from mmsearch.store.sqlite import write_meta
from mmsearch.store.tokens import TokenStore
from mmsearch.store.vectors import BYTES_PER_NUMBER, digest, split
from mmsearch.types import Rows

T = TypeVar("T")

ROWS_AT_ONCE = 32_768
"""A commit holds at most so many rows, unless one item has more: 25 MB with d = 384."""
_CACHE_KIB = 1 << 16
_PAGE = 5000
_AT_ONCE = 400
"""Names in one query: SQLite allows 999 values on old systems."""
_TOKENS_AT_ONCE = 256
_KEYS = "item, id, root, name, mtime_ns, ctime_ns, state, read_ns"


class Origin:
    """An index that is copied from, held at one generation whatever its writer does. A context manager."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads all of items.sqlite. Raises what opening an index raises, `IndexDamagedError`."""
        store = IndexStore.open(os.fspath(path))
        self.path, self.model = store.path, store.model
        self.preprocessing, self.settings = store.preprocessing, store.settings
        with os_guard(self.path):
            items = ItemsFile(self.path, read_manifest(self.path), limit=None)
            self.snapshot = DirectorySnapshot(self.path)
        try:
            items.judge(self.snapshot.generation)
            self._blocks = self.snapshot.execute("SELECT first, count, xxh3 FROM blocks ORDER BY first")
            self._firsts = np.array([first for first, _, _ in self._blocks], np.int64)
            self._checked = np.zeros(len(self._blocks), np.bool_)
            found = self.snapshot.execute("SELECT count(*), coalesce(max(item), 0) FROM items")
            self.items, self.last_item = int(found[0][0]), int(found[0][1])
        except BaseException:
            self.snapshot.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.snapshot.close()

    def page(self, after: int, limit: int = _PAGE) -> list[tuple[int, str]]:
        """(number, id) of the next items after number `after`, skipped ones included, in order of the number."""
        found = self.snapshot.execute("SELECT item, id FROM items WHERE item > ? ORDER BY item LIMIT ?", (after, limit))
        return [(int(item), str(id_)) for item, id_ in found]

    def row_counts(self) -> Iterator[tuple[int, int]]:
        """(number, rows) of every item, in order of the number."""
        query = (
            "SELECT i.item, (SELECT count(*) FROM rows AS r WHERE r.item = i.item) FROM items AS i"
            " WHERE i.item > ? ORDER BY i.item LIMIT ?"
        )
        after = 0
        while page := self.snapshot.execute(query, (after, _PAGE)):
            yield from ((int(item), int(count)) for item, count in page)
            after = page[-1][0]

    def batches(self, items: Sequence[int]) -> Iterator[list[int]]:
        """`items` in parts that have at most `ROWS_AT_ONCE` rows each, or are one item."""
        query = "SELECT r.item, count(*) FROM json_each(?) AS w JOIN rows AS r ON r.item = w.value GROUP BY r.item"
        counts = dict(self.snapshot.execute(query, (json.dumps(list(items)),)))
        batch: list[int] = []
        rows = 0
        for item in items:
            own = int(counts.get(item, 0))
            if batch and rows + own > ROWS_AT_ONCE:
                yield batch
                batch, rows = [], 0
            batch.append(item)
            rows += own
        if batch:
            yield batch

    def rows_of(self, items: Sequence[int]) -> list[tuple[int, int, int | None]]:
        """(row, item, part) of these items: pictures' rows in order, then captions' rows in order."""
        query = (
            "SELECT r.row, r.item, r.part FROM json_each(?) AS w JOIN rows AS r ON r.item = w.value"
            " ORDER BY r.part IS NOT NULL, r.row"
        )
        found = self.snapshot.execute(query, (json.dumps(list(items)),))
        return [(int(row), int(item), part) for row, item, part in found]

    def columns_of(self, items: Sequence[int], names: Sequence[str]) -> list[tuple[Any, ...]]:
        """These columns of these items, in order of the number."""
        listed = ", ".join(f"i.{name}" for name in names)
        query = f"SELECT {listed} FROM json_each(?) AS w JOIN items AS i ON i.item = w.value ORDER BY i.item"
        return self.snapshot.execute(query, (json.dumps(list(items)),))

    def take(self, rows: Rows) -> NDArray[np.float16]:
        """(n,) -> (n, d) as stored, a copy, of blocks that are what was written; else `IndexDamagedError`."""
        for place in np.unique(np.searchsorted(self._firsts, rows, side="right") - 1).tolist():
            if not self._checked[place]:
                first, count, recorded = self._blocks[place]
                if digest(self.snapshot.block(first, first + count)) != recorded:
                    raise IndexDamagedError(
                        self.snapshot.vectors_path,
                        got=f"rows {first} to {first + count - 1} that are not those written",
                        do=REENCODE,
                    )
                self._checked[place] = True
        return self.snapshot.take(rows)


def last_item(target: IndexStore) -> int:
    """The greatest number of an item in a target, 0 without items: what copying goes on from."""
    writer = target._writing()
    with sqlite_guard(writer.items_path):
        return int(writer.db.execute("SELECT coalesce(max(item), 0) FROM items").fetchone()[0])


def copy_items(target: IndexStore, origin: Origin, items: Sequence[int], *, offset: int) -> int:
    """Copy items, in order of their numbers, into `target` in one durable step; how many rows they have.

    Raises `IndexDamagedError` for rows that are not what was written, `ResourceError`.
    """
    writer, wanted = target._writing(), origin.rows_of(items)
    facts = writer.facts()
    first, start = int(facts["rows"]), int(facts["rows"]) * target.dim * BYTES_PER_NUMBER
    pictures = sum(part is None for _, _, part in wanted)
    stored = origin.take(np.array([row for row, _, _ in wanted], np.int64))
    if len(stored):
        writer.disk.append(writer.path_of(facts), [memoryview(stored.tobytes())], at=start, need=stored.nbytes)
    blocks = [(*block, 0) for block in split(first, stored[:pictures])]
    blocks += [(*block, 1) for block in split(first + pictures, stored[pictures:])]
    rows = [(first + place, item + offset, part) for place, (_, item, part) in enumerate(wanted)]
    image = {item: row for row, item, part in rows if part is None}
    with sqlite_guard(writer.items_path):
        writer.db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        names = [str(name) for _, name, *_ in writer.db.execute("PRAGMA table_info(items)")]
    names = ["item", "image", *(name for name in names if name not in ("item", "image"))]
    lines = [(item + offset, image.get(item + offset), *rest) for item, _, *rest in origin.columns_of(items, names)]
    with writer.transaction() as db:
        marks = ", ".join("?" * len(names))
        db.executemany(f"INSERT INTO items ({', '.join(names)}) VALUES ({marks})", lines)
        db.executemany("INSERT INTO rows (row, item, part) VALUES (?, ?, ?)", rows)
        writer.add_blocks(blocks)
        write_meta(db, {"rows": first + len(rows)})
    return len(rows)


@dataclass(frozen=True, slots=True)
class Entrant:
    """An item of one of several origins. `newness`: greater is newer; no two of different origins are alike."""

    item: int
    id: str
    key: tuple[bytes, bytes]
    newness: tuple[int, int, bool, int, int]


class Contest:
    """Which of the items that several origins have under one (root, name) or one id is copied."""

    def __init__(self, origins: Sequence[Origin]) -> None:
        self._origins = origins
        self._beaten: dict[tuple[int, int], bool] = {}

    def kept(self, place: int, items: Sequence[int]) -> list[int]:
        """Those of these items of origin number `place` that no newer one takes the place of."""
        lines = self._origins[place].columns_of(items, _KEYS.split(", "))
        entrants = [_entrant(place, line) for line in lines]
        self._beaten.clear()  # of use within one page: many copies of one index ask the same again and again
        beaten = self._are_beaten(place, entrants)
        return [one.item for one, is_beaten in zip(entrants, beaten, strict=True) if not is_beaten]

    def _are_beaten(self, place: int, entrants: Sequence[Entrant]) -> list[bool]:
        """Whether a newer rival of each, in another origin, is copied. Ends: each round asks about newer ones only."""
        asked = [one for one in entrants if (place, one.item) not in self._beaten]
        for other in range(len(self._origins)):
            if other == place or not asked:
                continue
            rivals = self._rivals(other, asked)
            newer = [
                {rival for rival in rivals[one.id] + rivals[one.key] if rival.newness > one.newness} for one in asked
            ]
            they: list[Entrant] = sorted(set().union(*newer), key=lambda rival: rival.item)
            kept = {rival for rival, gone in zip(they, self._are_beaten(other, they), strict=True) if not gone}
            self._beaten.update(
                ((place, one.item), True) for one, some in zip(asked, newer, strict=True) if some & kept
            )
        for one in asked:
            self._beaten.setdefault((place, one.item), False)
        return [self._beaten[place, one.item] for one in entrants]

    def _rivals(self, other: int, entrants: Sequence[Entrant]) -> defaultdict[str | tuple[bytes, bytes], list[Entrant]]:
        """Items of origin number `other` with the id or the (root, name) of an entrant, by either."""
        found: defaultdict[str | tuple[bytes, bytes], list[Entrant]] = defaultdict(list)
        execute = self._origins[other].snapshot.execute
        for some in _parts(entrants, _AT_ONCE):
            marks = ", ".join("?" * len(some))
            for line in execute(f"SELECT {_KEYS} FROM items WHERE id IN ({marks})", [one.id for one in some]):
                found[line[1]].append(_entrant(other, line))
            pairs, names = ", ".join(["(?, ?)"] * len(some)), [value for one in some for value in one.key]
            # Joined, not "IN": SQLite has the pairs look their names up, where it would read all names for "IN".
            wanted = f"WITH w (r, n) AS (VALUES {pairs})"
            for line in execute(f"{wanted} SELECT {_KEYS} FROM w CROSS JOIN items ON root = r AND name = n", names):
                found[line[2], line[3]].append(_entrant(other, line))
        return found


def _entrant(place: int, line: tuple[Any, ...]) -> Entrant:
    item, id_, root, name, mtime, ctime, state, read = line
    newness = (-1 if mtime is None else mtime, -1 if ctime is None else ctime, state == ItemState.OK, read, -place)
    return Entrant(item, id_, (root, name), newness)


def copy_tokens(target: str, origins: Sequence[Origin], *, identity: str, told: Callable[[int], None]) -> int:
    """Copy the patch tokens of the pictures of the index at `target` from where they are; how many pictures have some.

    `identity`: of who made them; others are passed over. `told` is called with how many pictures were looked at.
    Goes on where it was stopped. Raises `IndexLockedError`, `ResourceError`.
    """
    with IndexStore.open(target) as store, store.snapshot() as snapshot, contextlib.ExitStack() as stack:
        sources = [stack.enter_context(TokenStore.open(origin.path, identity=identity)) for origin in origins]
        tokens = stack.enter_context(TokenStore.open(target, identity=identity, write=True))
        for some in _parts(snapshot.pictures(), _TOKENS_AT_ONCE):
            lacking = tokens.missing(digest for digest, _ in some)
            found: dict[bytes, bytes] = {}
            for source in sources:
                found.update(source.get(hash_ for hash_ in lacking if hash_ not in found))
            tokens.put(found.items())
            told(len(some))
        return tokens.count


def keep_spaces(target: IndexStore, origins: Sequence[Origin]) -> None:
    """Let a target remember whose vectors each imported source was said to hold; how far it was read is not copied.

    Where origins differ, what is not of the model that they have now is kept: that is what an import must know.
    """
    kept: dict[str, Imported] = {}
    for origin in origins:
        for root, entry in imports_of(origin.snapshot).items():
            if root not in kept or kept[root].space == origin.model.weights:
                kept[root] = Imported("", space=entry.space)
    with target.snapshot() as snapshot:
        known = imports_of(snapshot)
    if known != kept:
        target.commit(Batch(facts=imports_fact(kept)))


def _parts(several: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(several)
    while part := list(islice(rest, size)):
        yield part
