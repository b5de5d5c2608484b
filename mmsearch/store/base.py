"""What an index directory is to the rest of mmsearch: the values that cross the border and the seam.

Decisions:
- The store knows neither models nor neighbour search. It is handed unit rows and hands them back;
  whoever makes derived files (faiss) comes in as an argument.
- A picture's identity is (root, name); its id is made once and survives moves.
- Changes are made in whole batches. `commit` is the only durable step: a batch is there or it is not.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import UsageError
from mmsearch.store.derived import Derived as Derived
from mmsearch.store.derived import DerivedWriter as DerivedWriter
from mmsearch.types import (
    NO_METADATA,
    Embeddings,
    Item,
    Metadata,
    Modality,
    ModelIdentity,
    Preprocessing,
    Rows,
    Skipped,
    SkipReason,
    Source,
    Stamp,
)
from mmsearch.where import Where


class ItemState(StrEnum):
    """Whether an item can be found, or is only remembered so that it is not tried again."""

    OK = "ok"
    SKIPPED = "skipped"


class ChangeKind(StrEnum):
    """What a scan found out about one source, before any file is opened.

    SUSPECT: size and mtime are those of the last time, but that proves nothing here (ctime differs, or
    the file was written within two seconds of being read, or later): its content hash decides.
    TEXT_CHANGED: the picture is the same, captions or metadata are not.
    """

    NEW = "new"
    CHANGED = "changed"
    SUSPECT = "suspect"
    TEXT_CHANGED = "text changed"
    UNCHANGED = "unchanged"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Known:
    """An item as the index knows it. `item` is its number in items.sqlite, `id` its public name."""

    item: int
    id: str
    root: str
    name: str
    path: str | None
    stamp: Stamp | None
    content_hash: bytes | None
    state: ItemState
    captions: tuple[str, ...] = ()
    metadata: Metadata = field(default_factory=lambda: NO_METADATA)
    has_image: bool = False
    reason: SkipReason | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """One line of a scan's outcome. `source` is None when GONE, `known` is None when NEW.

    `text_changed`: captions or metadata differ, whatever `kind` says (also for CHANGED and SUSPECT).
    """

    kind: ChangeKind
    source: Source | None
    known: Known | None
    text_changed: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Upsert:
    """Insert or replace the item with `source`'s (root, name).

    Picture: exactly one of `image_vector` (d,), `image_from` (number of an item whose stored row is
    copied) and `keep_image` (the row it has stays), or none of them for an item without a picture.
    Facts that are not given (None, "") stay with `keep_image` (hash, width, height, taken_at, note), and
    are those of the other item with `image_from` (all but the hash).
    Texts: `text_vectors` (m, d), row i made of `source.captions[text_parts[i]]` (`text_parts` None:
    captions in order, m of them), or `keep_text`.
    `id`: the id a table brought; the item gets it unless another one has it when the batch is done (of two
    that ask for one id, the first). None: it keeps the id it has. `note`: shown by `info` ("first of 12 frames").
    """

    source: Source
    stamp: Stamp | None = None
    content_hash: bytes | None = None
    width: int | None = None
    height: int | None = None
    taken_at: str | None = None
    image_vector: NDArray[np.floating[Any]] | None = None
    image_from: int | None = None
    keep_image: bool = False
    text_vectors: NDArray[np.floating[Any]] | None = None
    text_parts: tuple[int, ...] | None = None
    keep_text: bool = False
    id: str | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Skip:
    """Remember that `source` cannot be indexed; not tried again until its stamp changes (or `changes` is told to)."""

    source: Source
    skipped: Skipped
    stamp: Stamp | None = None
    content_hash: bytes | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """The item with number `item` is now at `source`: same id, same rows, nothing encoded.

    An item that was at that place before is removed. Moves come before upserts, so a moved item whose
    captions changed too is one `Move` and one `Upsert(keep_image=True)` of the same batch.
    """

    item: int
    source: Source
    stamp: Stamp | None = None


@dataclass(frozen=True, slots=True)
class Touch:
    """The content is what it was; only the stamp is to be brought up to date."""

    item: int
    stamp: Stamp | None


@dataclass(slots=True)
class Batch:
    """What one `commit` makes durable, all or nothing. Carried out in this order."""

    removals: list[int] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    upserts: list[Upsert] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    touched: list[Touch] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    """Facts about the index as a whole (`meta`), set in the same step: how far an import is."""

    def __len__(self) -> int:
        parts = (self.removals, self.moves, self.upserts, self.skips, self.touched, self.facts)
        return sum(len(part) for part in parts)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something `verify` found: which file (relative to the index), what is wrong, what brings it right."""

    file: str
    what: str
    repair: str


@dataclass(frozen=True, slots=True)
class Located:
    """What a vector row stands for. `caption`: the text it was made of, for text rows."""

    row: int
    item: Item
    modality: Modality
    caption: str | None = None


class Snapshot(Protocol):
    """One consistent generation, whatever writers do meanwhile. Thread-safe; a context manager; close it."""

    generation: int
    dim: int
    row_count: int

    @property
    def model(self) -> ModelIdentity:
        """The model whose rows this generation holds."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *details: object) -> None: ...

    def close(self) -> None:
        """Let go of the generation (and of files that compaction has replaced)."""
        ...

    def ranges(self, modality: Modality) -> list[tuple[int, int]]:
        """Sorted half-open ranges of rows of that modality, dead rows included."""
        ...

    def dead_rows(self, modality: Modality) -> Rows:
        """Sorted rows that must not be returned any more."""
        ...

    def alive_rows(self, modality: Modality) -> Rows:
        """Sorted rows of items that are there. (n,) int64."""
        ...

    def rows_where(self, modality: Modality, where: Where) -> Rows:
        """Sorted rows of items that fulfil all conditions. (n,) int64."""
        ...

    def count(self, modality: Modality) -> int:
        """How many rows are alive, without listing them."""
        ...

    def block(self, start: int, stop: int) -> NDArray[np.float16]:
        """Rows start..stop as stored: (stop - start, d) fp16, a view of the mapped file, not a copy."""
        ...

    def scattered(self) -> NDArray[np.float16]:
        """Every row as stored, (row_count, d) fp16, for picking some here and there rather than reading on."""
        ...

    def vectors(self, rows: Rows) -> Embeddings:
        """The rows asked for: (n,) -> (n, d) float32."""
        ...

    def derived(self, modality: Modality) -> Derived | None:
        """The derived file of that modality that fits this generation's vector file, if one is recorded."""
        ...

    def intact(self, derived: Derived) -> str | None:
        """The path of that file if its size and checksum are those recorded, else None.

        Beyond 64 MiB only size, beginning and end are looked at (`verify` reads it all).
        """
        ...

    def locate(self, rows: Rows | Sequence[int]) -> list[Located]:
        """What rows stand for, in the order asked for (one SQL query). Dead rows raise `UsageError`."""
        ...

    def content_hashes(self, rows: Rows | Sequence[int]) -> list[bytes | None]:
        """xxh3_128 (16 bytes) of the picture of each row's item, in the order asked for (one SQL query).

        A caption's row has its item's. None: the item has no picture, or the row is dead.
        """
        ...

    def pictures(self) -> Iterator[tuple[bytes, str]]:
        """(content hash, path) of every item with a picture file, in order of the hash: copies are neighbours."""
        ...

    def rows_of(self, item_id: str, modality: Modality) -> Rows:
        """The rows of one item, by its public id; empty when it has none or is not there."""
        ...

    def present(self, ids: Iterable[str]) -> set[str]:
        """Those of these public ids that items have which are there (skipped ones are not)."""
        ...

    def items(self, *, state: ItemState | None = ItemState.OK) -> Iterator[Known]:
        """Every item in order of (root, name); `state` None for all."""
        ...


class Store(Protocol):
    """An index directory. One writer at a time, any number of readers."""

    path: str
    model: ModelIdentity
    preprocessing: Preprocessing
    settings: Mapping[str, Any]
    dim: int

    @property
    def generation(self) -> int:
        """Counts commits; what a writer or the newest snapshot sees."""
        ...

    @property
    def row_count(self) -> int:
        """Committed rows, dead ones included."""
        ...

    def close(self) -> None:
        """Give the lock back. Committed batches stay whether or not `finish` was called."""
        ...

    def snapshot(self) -> Snapshot:
        """The newest generation, to read from."""
        ...

    def begin_scan(self) -> None:
        """Forget what was seen; stamps recorded from now on are judged against this moment's clock."""
        ...

    def seen(self, sources: Iterable[Source]) -> int:
        """Note what a reader found, streaming; returns how many were new to this scan."""
        ...

    def changes(
        self, *, scanned_roots: Sequence[str], keep_below: Sequence[str] = (), retry: Collection[SkipReason] = ()
    ) -> Iterator[Change]:
        """What differs, in order of (root, name), then what is gone.

        Only items of `scanned_roots` can be GONE, and of those none whose path is at or below one of
        `keep_below` (folders that could not be read). Skips remembered for a reason in `retry` (whose cause
        is gone: other limits) are CHANGED. Batches may be committed while iterating.
        """
        ...

    def was_seen(self, known: Known) -> bool:
        """Whether this scan found a source with that item's (root, name)."""
        ...

    def known_size(self, size: int) -> bool:
        """Whether any item's file had this size in bytes (if not, hashing for a move is pointless)."""
        ...

    def find_content(self, content_hash: bytes) -> list[Known]:
        """Items made of a file with this hash, skipped ones included."""
        ...

    def find_moved(self, content_hash: bytes, *, after: int = 0) -> list[Known]:
        """Items with a picture of this hash that the scan (all `seen`) did not find: candidates for a move.

        At most 16, by item number, above `after`: the last one taken for this hash, perhaps not committed yet.
        """
        ...

    def find_copy(self, content_hash: bytes) -> Known | None:
        """Any one item with a picture of this hash."""
        ...

    def note_settings(self, settings: Mapping[str, Any]) -> None:
        """Replace the stored settings in one durable step; nothing happens when they are the same."""
        ...

    def commit(self, batch: Batch) -> None:
        """Make the batch durable: rows appended and synced, then one SQLite transaction. All or nothing."""
        ...

    def update_derived(self, writer: DerivedWriter) -> None:
        """Bring derived files up to date with the committed rows, and write the manifest."""
        ...

    def compact(self, *, share: float = 0.3, at_least: int = 1000) -> bool:
        """Rewrite the rows without dead ones when they are more than `share` of at least that many rows."""
        ...

    def finish(self) -> None:
        """Write the manifest to match the committed generation."""
        ...

    def verify(self) -> list[Problem]:
        """Check every file against what was recorded; an empty list means that all is well."""
        ...

    def info(self) -> dict[str, Any]:
        """Counts, sizes in bytes, model, roots: JSON values."""
        ...


_STORES: dict[str, tuple[str, str, str | None, str | None]] = {
    "directory": ("mmsearch.store.directory", "IndexStore", None, None),
}
"""name -> (module, class, package it needs, extra that brings that package)."""


def store_class(name: str = "directory") -> type[Any]:
    """The class behind a store's name, imported when asked for."""
    if name not in _STORES:
        raise UsageError("store", expected=" or ".join(sorted(_STORES)), got=name)
    module, attribute, _, _ = _STORES[name]
    loaded: type[Any] = getattr(importlib.import_module(module), attribute)
    return loaded
