"""The indexing pipeline: what differs -> decoded and encoded -> committed.

`builder` decides what belongs to the index; this carries it out. Pictures flow through
`EncodesPictures.encode`, here or on a cluster; everything that needs no decoding (moves, copies, new
captions) is put into the batch directly, so that one commit holds both.

Decisions:
- A failed picture never shifts its neighbours: every request carries a key, and what comes back is
  looked up by that key.
- A commit follows after `COMMIT_ROWS` pictures or `COMMIT_SECONDS`, whichever is first: a kill costs at most that.
- Texts of a batch are encoded together at the commit, a few dozen items a call.
- A file that may be a known one elsewhere is hashed before it is encoded; one that is remote would be fetched for that,
  so it is compared when it comes back encoded: a move costs a pass through the model, and keeps its id all the same.
- With fused item vectors, what stands as an item's picture row is made of picture and captions: it is kept or copied
  only where the captions are the same too, else the picture is read again. An item of texts alone has such a row too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import xxhash

from mmsearch.data.loading import Failed, file_digest
from mmsearch.data.remote import is_there, is_uri, read_uri
from mmsearch.errors import ImageError
from mmsearch.pictures import Encoded, EncodesPictures, Outcome, Request
from mmsearch.store.base import Batch, Change, ChangeKind, ItemState, Known, Move, Skip, Touch, Upsert
from mmsearch.types import BuildReport, Skipped, SkipReason, Source, Stamp

if TYPE_CHECKING:
    from mmsearch.encoder import Encodes, JoinsItems
    from mmsearch.store.directory import IndexStore

COMMIT_ROWS = 512
COMMIT_SECONDS = 1.5
TEXTS_AT_ONCE = 64
"""Items whose captions are encoded in one call."""

NOT_REMEMBERED = frozenset({SkipReason.VANISHED, SkipReason.CHANGING, SkipReason.OUT_OF_MEMORY})
"""Skips that say nothing about the file itself: it is tried again next time."""


class Told(Protocol):
    """What the pipeline says about how far it is."""

    def advance(self, n: int, *, note: str = "") -> None:
        """`n` more items are done."""
        ...


@dataclass(slots=True)
class Counts:
    """Running totals of a build, in items."""

    added: int = 0
    changed: int = 0
    moved: int = 0
    unchanged: int = 0
    removed: int = 0
    encoded_images: int = 0
    encoded_texts: int = 0


@dataclass(slots=True)
class Pending:
    """Work collected since the last commit."""

    batch: Batch = field(default_factory=Batch)
    items: int = 0
    since: float = field(default_factory=time.monotonic)


class Ingest:
    """Brings a store up to date with a stream of changes.

    `pictures` makes their rows; whoever made it closes it. `encoder` reads what texts `pictures` does not.
    `joins`: makes one row of an item's picture and captions, for fused item vectors; None keeps them separate.
    """

    def __init__(
        self,
        store: IndexStore,
        encoder: Encodes,
        pictures: EncodesPictures,
        *,
        told: Told,
        joins: JoinsItems | None = None,
    ) -> None:
        self._store, self._encoder, self._told, self._joins = store, encoder, told, joins
        self._pictures = pictures
        self._waiting: dict[int, Change] = {}
        self._moved: set[int] = set()
        self._taken: dict[bytes, int] = {}  # content hash -> the last item that moved, perhaps not committed yet
        self._next_key = 0
        self._pending = Pending()
        self._gone: Iterator[Change] = iter(())
        self.skipped: list[Skipped] = []
        self.notes: list[str] = []
        self.counts = Counts()

    def report(self, index: Path) -> BuildReport:
        """The totals so far."""
        return BuildReport(index, **asdict(self.counts))

    def run(
        self, changes: Iterator[Change], is_gone: Callable[[str | None, str], bool]
    ) -> list[tuple[str | None, str]]:
        """Carry out all changes. Returns (path, root) of items that are not there and are kept (`is_gone` said no)."""
        try:
            for outcomes in self._pictures.encode(self._requests(changes)):
                self._take(outcomes)
        finally:
            self._take(self._pictures.rest())
            self._commit()
        return self._remove_gone(is_gone)

    # What differs -> requests

    def _requests(self, changes: Iterator[Change]) -> Iterator[Request]:
        for change in changes:
            if change.source is None:
                self._gone = chain([change], changes)
                return
            unread = self._settle(change, change.source)
            if unread is None:
                self._finish_items(1)
                continue
            key, self._next_key = self._next_key, self._next_key + 1
            self._waiting[key] = unread
            yield Request.of(key, change.source, self._texts_of(unread, change.source))

    def _texts_of(self, change: Change, source: Source) -> tuple[str, ...]:
        """The captions that have no rows yet, if they are encoded with the picture."""
        stay = self._joins is None and self._keeps_text(change.known, source)
        return source.captions if self._pictures.takes_texts and not stay else ()

    def _settle(self, change: Change, source: Source) -> Change | None:
        """Deal with a change that needs no decoding; what is returned needs it."""
        known = change.known
        if change.kind is ChangeKind.UNCHANGED and known is not None:
            self._count_unchanged(known)
            return None
        if change.kind is ChangeKind.TEXT_CHANGED and known is not None and self._row_stays(known, source):
            self._upsert(source, known=known, upsert=Upsert(source, stamp=source.stamp, keep_image=known.has_image))
            return None
        if source.path is None:
            if self._pictures.takes_texts and source.captions:
                return change
            self._upsert(source, known=known, upsert=Upsert(source))
            return None
        if change.kind is ChangeKind.SUSPECT and known is not None:
            return self._settle_suspect(change, source, known)
        if is_uri(source.path):
            return change
        if change.kind is ChangeKind.NEW and source.stamp and self._store.known_size(source.stamp.size):
            return self._settle_seen_content(change, source)
        return change

    def _row_stays(self, known: Known, source: Source) -> bool:
        """Whether the picture row of `known` is that of `source` too, the pictures being the same."""
        return self._joins is None or known.captions == source.captions

    def _count_unchanged(self, known: Known) -> None:
        if known.state is ItemState.SKIPPED and known.reason is not None:
            self.skipped.append(Skipped(known.path or known.name, known.reason, known.detail))
        else:
            self.counts.unchanged += 1

    def _settle_suspect(self, change: Change, source: Source, known: Known) -> Change | None:
        if known.content_hash is None or not self._row_stays(known, source):
            return change
        digest, stamp = _digest(source)
        if digest is None or digest != known.content_hash:
            return change
        if change.text_changed and known.state is ItemState.OK:
            self._upsert(
                source, known=known, upsert=Upsert(source, stamp=stamp, content_hash=digest, keep_image=known.has_image)
            )
        else:
            self._pending.batch.touched.append(Touch(known.item, stamp))
            self._count_unchanged(known)
        return None

    def _settle_seen_content(self, change: Change, source: Source) -> Change | None:
        digest, stamp = _digest(source)
        if digest is None or stamp is None:
            return change
        known = self._moved_here(source, digest, stamp)
        if known is not None:
            if not self._row_stays(known, source):
                return replace(change, known=known)  # keeps its id, and counts as changed
            if (known.captions, dict(known.metadata)) != (source.captions, dict(source.metadata)) or _own_id(source):
                self._upsert(
                    source, known=known, counted=False,
                    upsert=Upsert(source, stamp=stamp, content_hash=digest, keep_image=True),
                )  # fmt: skip
            self.counts.moved += 1
            return None
        original = self._store.find_copy(digest)
        if original is not None and self._row_stays(original, source):
            copy = Upsert(source, stamp=stamp, content_hash=digest, image_from=original.item)
            self._upsert(source, known=None, upsert=copy)
            return None
        return change

    def _moved_here(self, source: Source, digest: bytes, stamp: Stamp | None) -> Known | None:
        """The item that `source` is now, if it was at a place where it is no more; its move is put into the batch."""
        candidates = self._store.find_moved(digest, after=self._taken.get(digest, 0))
        known = next((k for k in candidates if k.item not in self._moved and _left(k, source)), None)
        if known is not None:
            self._moved.add(known.item)
            self._taken[digest] = known.item
            self._pending.batch.moves.append(Move(known.item, source, stamp))
        return known

    # What came back -> commit

    def _take(self, outcomes: Sequence[Outcome]) -> None:
        for one in outcomes:
            change = self._waiting.pop(one.key)
            source = change.source
            assert source is not None  # only changes with a source become requests
            if isinstance(one, Failed):
                self._skip(source, one)
                continue
            self._store_encoded(change, source, one)
        if outcomes:
            self._finish_items(len(outcomes))

    def _store_encoded(self, change: Change, source: Source, one: Encoded) -> None:
        known, upsert = change.known, _upsert_of(one, source)
        moved = None
        if change.kind is ChangeKind.NEW and known is None and one.content_hash and is_uri(str(source.path)):
            moved = self._moved_here(source, one.content_hash, one.stamp)
        if moved is not None and self._row_stays(moved, source):
            upsert = replace(upsert, image_vector=None, keep_image=True)
        self._upsert(source, known=known or moved, upsert=upsert, counted=moved is None)
        self.counts.moved += moved is not None
        self.counts.encoded_images += one.vector is not None
        self.counts.encoded_texts += 0 if one.texts is None else len(one.texts)

    def _skip(self, source: Source, failed: Failed) -> None:
        self.skipped.append(failed.skipped)
        if failed.skipped.reason not in NOT_REMEMBERED:
            skip = Skip(source, failed.skipped, failed.stamp or source.stamp, failed.content_hash)
            self._pending.batch.skips.append(skip)

    def _upsert(self, source: Source, *, known: Known | None, upsert: Upsert, counted: bool = True) -> None:
        keeps_text = upsert.text_vectors is None and self._keeps_text(known, source)
        if self._joins is not None and not upsert.keep_image and upsert.image_from is None:
            keeps_text = False  # the item's row is made anew, of its texts too
        self._pending.batch.upserts.append(replace(upsert, id=_own_id(source), keep_text=keeps_text))
        if counted and known is not None and known.state is ItemState.OK:
            self.counts.changed += 1
        elif counted:
            self.counts.added += 1

    def _keeps_text(self, known: Known | None, source: Source) -> bool:
        """Whether the rows of the texts of `known` are those of `source` too."""
        return known is not None and known.state is ItemState.OK and known.captions == source.captions

    def _finish_items(self, n: int) -> None:
        self._told.advance(n)
        self._pending.items += n
        if self._pending.items >= COMMIT_ROWS or time.monotonic() - self._pending.since > COMMIT_SECONDS:
            self._commit()

    def _commit(self) -> None:
        pending = self._pending
        if not len(pending.batch):
            self._pictures.committed()
            return
        # What lacks its texts is told by the upserts themselves: a Ctrl-C in here leaves the rest to the commit
        # that follows it, and nothing that was encoded is lost.
        upserts = pending.batch.upserts
        lacking = [i for i, one in enumerate(upserts) if one.source.captions and not one.keep_text]
        lacking = [i for i in lacking if upserts[i].text_vectors is None]
        for first in range(0, len(lacking), TEXTS_AT_ONCE):
            part = lacking[first : first + TEXTS_AT_ONCE]
            vectors = self._encoder.encode_texts([text for i in part for text in upserts[i].source.captions])
            start = 0
            for i in part:
                stop = start + len(upserts[i].source.captions)
                upserts[i] = replace(upserts[i], text_vectors=vectors[start:stop])
                start = stop
            self.counts.encoded_texts += len(vectors)
        # What is joined goes into the store only: a Ctrl-C in here leaves the sides as they are to the next commit.
        joined = upserts if self._joins is None else join_sides(upserts, self._joins, dim=self._encoder.dim)
        self._store.commit(replace(pending.batch, upserts=joined))
        self._pending = Pending()
        self._pictures.committed()

    # What is gone

    def _remove_gone(self, is_gone: Callable[[str | None, str], bool]) -> list[tuple[str | None, str]]:
        kept: list[tuple[str | None, str]] = []
        removals: list[int] = []
        for change in self._gone:
            known = change.known
            if known is None or known.item in self._moved:
                continue
            if is_gone(known.path, known.root):
                removals.append(known.item)
            else:
                kept.append((known.path, known.root))
        for start in range(0, len(removals), 10_000):
            self._store.commit(Batch(removals=removals[start : start + 10_000]))
        self.counts.removed += len(removals)
        return kept


def join_sides(upserts: list[Upsert], joins: JoinsItems, *, dim: int) -> list[Upsert]:
    """The upserts, each new row of a picture joined with the mean of its captions' rows; texts alone get one too.

    Rows that are kept or copied are joined already.
    """
    new = [i for i, one in enumerate(upserts) if not one.keep_image and one.image_from is None]
    new = [i for i in new if upserts[i].image_vector is not None or upserts[i].text_vectors is not None]
    if not new:
        return upserts
    sides, there = np.zeros((2, len(new), dim), np.float32), np.zeros((2, len(new)), bool)
    for row, i in enumerate(new):
        image, texts = upserts[i].image_vector, upserts[i].text_vectors
        if image is not None:
            sides[0, row], there[0, row] = image, True
        if texts is not None:
            mean = np.asarray(texts, np.float32).mean(axis=0)
            sides[1, row], there[1, row] = mean / max(float(np.linalg.norm(mean)), 1e-12), True
    rows = joins.item_rows(sides[0], sides[1], has_image=there[0], has_text=there[1])
    joined = list(upserts)
    for row, i in enumerate(new):
        joined[i] = replace(upserts[i], image_vector=rows[row])
    return joined


def _upsert_of(one: Encoded, source: Source) -> Upsert:
    info = one.info
    if info is None:
        return Upsert(source, text_vectors=one.texts)
    return Upsert(
        source, stamp=one.stamp, content_hash=one.content_hash, image_vector=one.vector, text_vectors=one.texts,
        width=info.width, height=info.height, taken_at=info.taken_at, note=info.note,
    )  # fmt: skip


def _left(known: Known, source: Source) -> bool:
    """Whether an item that the scan did not see is what `source` now is: its file is gone, or is that very file.

    A file that is not gone lies somewhere else than what is being scanned, and stays an item of its own.
    """
    return known.path is None or known.path == source.path or not is_there(known.path)


def _own_id(source: Source) -> str | None:
    """The id that a table or side-car brought; results carry it instead of one of ours."""
    own = source.metadata.get("id")
    return own if isinstance(own, str) and own else None


def _digest(source: Source) -> tuple[bytes | None, Stamp | None]:
    """Content hash and stamp of the file, or nothing when it cannot be read just now (the loader will say why)."""
    path = str(source.path)
    try:
        if is_uri(path):
            data, stamp = read_uri(path, stamp=source.stamp)
            return xxhash.xxh3_128_digest(data), stamp
        return file_digest(path)
    except (OSError, ImageError):
        return None, None
