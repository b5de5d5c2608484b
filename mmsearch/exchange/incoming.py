"""A block of a source -> the batch that brings it into the index."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmsearch.exchange.base import Block, Facts, VectorSource
from mmsearch.exchange.comparing import Comparison
from mmsearch.exchange.reports import ImportReport
from mmsearch.exchange.units import unit_rows
from mmsearch.store.base import Batch, Skip, Upsert
from mmsearch.store.imports import TEXT_UNKNOWN
from mmsearch.store.records import ids_elsewhere, records_named, skipped_below
from mmsearch.store.snapshot import DirectorySnapshot
from mmsearch.types import Embeddings, Skipped, SkipReason, Source

NAMED_SKIPS = 1000
"""So many skipped vectors are named in a report; the others are counted."""
_FOLDERS = 10_000
PATH_KEY = "image_path"
"""What a picture's path is called in the metadata where there is no such file here."""


@dataclass(slots=True)
class Counts:
    """Running totals of an import."""

    rows: int = 0
    resumed: int = 0
    added: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    normalised: int = 0
    skipped: int = 0
    read_seconds: float = 0.0
    named: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def skip(self, name: str, detail: str) -> Skipped:
        """Count a vector that is none."""
        found = Skipped(name, SkipReason.BAD_EMBEDDING, detail)
        self.skipped += 1
        if len(self.named) < NAMED_SKIPS:
            self.named.append(found)
        return found

    def remember(self, skipped: int, snapshot: DirectorySnapshot, root: str) -> None:
        """Count vectors below `root` that an earlier run skipped; they are named again."""
        if skipped:
            self.skipped += skipped
            found = skipped_below(snapshot, root, most=NAMED_SKIPS - len(self.named))
            self.named += [Skipped(name, SkipReason.BAD_EMBEDDING, detail) for name, detail in found]

    def report(self, index: Path) -> ImportReport:
        """The totals so far."""
        notes = list(self.notes)
        if self.normalised:
            notes.append(f"{self.normalised:,} vectors were scaled to length 1")
        if self.skipped > len(self.named):
            notes.append(f"only the first {len(self.named):,} of {self.skipped:,} skipped vectors are named")
        return ImportReport(
            index, rows=self.rows, resumed=self.resumed, added=self.added, changed=self.changed,
            unchanged=self.unchanged, removed=self.removed, normalised=self.normalised, skipped_count=self.skipped,
            skipped=tuple(self.named), notes=tuple(notes), read_seconds=self.read_seconds,
        )  # fmt: skip


@dataclass(slots=True)
class _Images:
    """The pictures' vectors of a block: `ok` (n,) which are unit rows; `bad` (n,) which should be and are not."""

    rows: Embeddings
    ok: NDArray[np.bool_]
    bad: NDArray[np.bool_]


@dataclass(slots=True)
class _Texts:
    """The captions' vectors of a block, by row: row i has `rows[starts[i]:starts[i + 1]]`, made of those of `parts`.

    `bad` (n,): rows of the block with a vector that has no direction.
    """

    rows: Embeddings
    parts: list[int]
    starts: list[int]
    bad: NDArray[np.bool_]


class Incoming:
    """Turns the blocks of one source into batches. `shares_ids`: the index holds items of other sources as well."""

    def __init__(self, source: VectorSource, *, counts: Counts, shares_ids: bool) -> None:
        self._source, self._counts, self._shares_ids = source, counts, shares_ids
        self._tally: Counter[str] = Counter()
        self._folders: dict[str, bool] = {}

    def batch(
        self,
        block: Block,
        snapshot: DirectorySnapshot,
        *,
        label: str,
        first: int,
        comparison: Comparison | None,
    ) -> tuple[Batch, int]:
        """The batch of a block that begins with row `first` of part `label`, and how many of its items are new."""
        prefix = f"{label}:" if label else ""
        names = [facts.id or f"{prefix}{first + row}" for row, facts in enumerate(block.facts)]
        last = {name: row for row, name in enumerate(names)}
        self._tally["repeated"] += len(names) - len(last)
        known = records_named(snapshot, self._source.root, list(last))
        if self._shares_ids:
            self._tally["taken"] += ids_elsewhere(snapshot, self._source.root, [n for n in last if n not in known])
        batch = Batch()
        images, texts = self._images(block), self._texts(block)
        given = _given(block)
        for row, name in enumerate(names):
            if last[name] != row:
                continue  # an id met again: the later row stands
            upsert = self._upsert(block.facts[row], name, row, images=images, texts=texts)
            if upsert is None:
                detail = "no direction (zero, NaN or infinite)" if given[row] else "no vector"
                skip = Skip(Source(self._source.root, name, None, None), self._counts.skip(name, detail))
                batch.skips.append(skip)
            else:
                batch.upserts.append(upsert)
        if comparison is not None:
            self._counts.unchanged += comparison.drop_equal(batch, known, snapshot)
        changed = sum(u.source.name in known and not known[u.source.name].skipped for u in batch.upserts)
        self._counts.changed += changed
        self._counts.added += len(batch.upserts) - changed
        return batch, len(last) - len(known)

    def close(self) -> None:
        """Say what the user should know of this source."""
        said = {
            "repeated": "rows have an id that comes again later; the last one stands",
            "taken": "ids belong to items of other sources; these rows got ids of their own",
            "no caption": "vectors of texts without a text were left out",
            "bad image": "vectors of pictures have no direction and were left out; their texts are there",
            "bad text": "items have a text whose vector has no direction; the rest of them is there",
            "no text": "items have vectors of texts that nobody kept; their ids stand for them",
            "paths": "pictures are not on this machine; their paths are in the metadata",
        }
        for what, text in said.items():
            if self._tally[what]:
                self._counts.notes.append(f"{self._source.path}: {self._tally[what]:,} {text}")

    def _images(self, block: Block) -> _Images | None:
        if block.images is None:
            return None
        unit, ok, scaled = unit_rows(block.images)
        self._counts.normalised += scaled
        return _Images(unit, ok, ~ok if block.has_image is None else ~ok & block.has_image)

    def _texts(self, block: Block) -> _Texts | None:
        if block.texts is None or not len(block.texts):
            return None
        unit, ok, scaled = unit_rows(block.texts)
        self._counts.normalised += scaled
        bad = np.zeros(len(block), bool)
        bad[block.text_of[~ok]] = True
        # a text is known by its id where nobody kept it and there is no picture
        captions = np.array([len(facts.captions) or block.images is None for facts in block.facts], np.int64)
        said = (block.text_part >= 0) & (block.text_part < captions[block.text_of])
        self._tally["no caption"] += int((ok & ~said).sum())
        order = np.flatnonzero(ok & said)
        order = order[np.lexsort((block.text_part[order], block.text_of[order]))]
        of, parts = block.text_of[order], block.text_part[order]
        first = (np.diff(of, prepend=-1) != 0) | (np.diff(parts, prepend=-1) != 0)  # one vector a caption
        order, of = order[first], of[first]
        starts = np.searchsorted(of, np.arange(len(block) + 1))
        return _Texts(unit[order], block.text_part[order].tolist(), starts.tolist(), bad)

    def _upsert(
        self,
        facts: Facts,
        name: str,
        row: int,
        *,
        images: _Images | None,
        texts: _Texts | None,
    ) -> Upsert | None:
        """One row as an item; None when it has no vector that can be used."""
        vectors: dict[str, Any] = {}
        if images is not None and images.ok[row]:
            vectors["image_vector"] = images.rows[row]
        captions, unknown = facts.captions, False
        if texts is not None and (start := texts.starts[row]) < (stop := texts.starts[row + 1]):
            vectors["text_vectors"], vectors["text_parts"] = texts.rows[start:stop], tuple(texts.parts[start:stop])
            captions, unknown = captions or (name,), not captions
        if not vectors:
            return None
        self._tally["bad image"] += images is not None and bool(images.bad[row])
        self._tally["bad text"] += texts is not None and bool(texts.bad[row])
        path, metadata = self._path(facts)
        if unknown:
            self._tally["no text"] += 1
            metadata = {**metadata, TEXT_UNKNOWN: True}
        source = Source(self._source.root, name, path, None, captions, metadata)
        return Upsert(source, width=facts.width, height=facts.height, taken_at=facts.taken_at, id=name, **vectors)

    def _is_here(self, folder: str) -> bool:
        """Whether there is such a folder; asked once for many pictures of one that is on another machine."""
        if folder not in self._folders:
            if len(self._folders) >= _FOLDERS:
                self._folders.clear()
            self._folders[folder] = os.path.isdir(folder or "/")
        return self._folders[folder]

    def _path(self, facts: Facts) -> tuple[str | None, Any]:
        """The picture's path where it is a file here, and the metadata, with the path where it is none."""
        if facts.path is None:
            return None, facts.metadata
        path = facts.path if facts.path.startswith("/") else f"{self._source.folder}/{facts.path}"
        if "\0" not in path and self._is_here(path.rpartition("/")[0]) and os.path.isfile(path):
            return os.path.normpath(path), facts.metadata
        self._tally["paths"] += 1
        return None, {PATH_KEY: facts.path, **facts.metadata}


def _given(block: Block) -> NDArray[np.bool_]:
    """(n,) rows that come with a vector, whatever it is worth."""
    given = np.zeros(len(block), bool)
    if block.images is not None:
        given |= True if block.has_image is None else block.has_image
    given[block.text_of] = True
    return given
