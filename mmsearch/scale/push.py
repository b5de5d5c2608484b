"""An engine's collection brought up to date with an index directory, or with the shards that `split` made of one.

    report = push("indexes/photos", "postgresql://me@db/search?collection=photos")

Decisions:
- The collection becomes a mirror: what is new or changed is sent, what is gone is deleted, the rest is left alone. What
  differs is told by the digests that the engine keeps, so a push that was killed, or is run twice, sends no item again.
- Items go in batches; memory does not grow with the index. The index is read at one generation.
- The collection remembers of which index it is a mirror. Another index is refused: it would delete those items. One
  that nobody filled by a push becomes a mirror if all that it holds is in the index as it is there: nothing is lost.
- Of an id that several indexes have, the first-named index counts, as where they are searched together.
- An item that the engine cannot hold costs itself only; what the engine had of it goes, as it is not true any more.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mmsearch.errors import StoreError
from mmsearch.opened import TOGETHER, check_same_space, directories
from mmsearch.progress import Progress, SilentProgress
from mmsearch.scale.address import Address
from mmsearch.scale.engine import Collection, Engine, Entry, item_json, open_engine, refuse_other_kind
from mmsearch.scale.local_engine import entries_of
from mmsearch.scale.marks import mark_of, read_mark, unfinished
from mmsearch.store import listing
from mmsearch.store.directory import IndexStore
from mmsearch.store.snapshot import DirectorySnapshot
from mmsearch.types import Modality, Skipped, SkipReason
from mmsearch.where import storable

BATCH = 1000
MOST_ID_BYTES = 512


@dataclass(slots=True)
class PushReport:
    """What one push did. Counts are items; `skipped`: those that the engine cannot hold; `seconds`: wall time."""

    indexes: tuple[str, ...]
    address: str
    added: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


def push(
    index: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    uri: str,
    *,
    batch: int = BATCH,
    progress: Progress | None = None,
) -> PushReport:
    """Make the collection at `uri` hold what the index holds; the collection is made if it is not there.

    Raises `IndexMismatchError` for a collection of another model or kind of item vectors, `StoreError` for a mirror of
    another index and for a server that fails; what was sent until then stays, and the next push goes on from there.
    """
    begun, progress = time.monotonic(), progress or SilentProgress()
    paths = [os.path.abspath(path) for path in directories([index] if isinstance(index, str | os.PathLike) else index)]
    with contextlib.ExitStack() as stack:
        stores = [stack.enter_context(IndexStore.open(path)) for path in paths]
        for store in stores[1:]:
            check_same_space(stores[0].model, store.model, where=store.path, do=TOGETHER)
            refuse_other_kind(stores[0].settings, store.settings, where=store.path)
        snapshots = [stack.enter_context(store.snapshot()) for store in stores]
        first = stores[0]
        engine = open_engine(uri, create=Collection(first.model, first.preprocessing, _settings(first)))
        stack.callback(engine.close)
        refuse_other_kind(engine.collection.settings, first.settings, where=engine.where)
        report = PushReport(tuple(paths), Address.parse(uri).shown)
        _bring_up_to_date(engine, snapshots, report, batch=batch, progress=progress)
    report.seconds = time.monotonic() - begun
    return report


def _settings(store: IndexStore) -> dict[str, Any]:
    """What a searcher needs to know: which model to load."""
    return {name: value for name, value in store.settings.items() if name in ("model", "item_vectors")}


def _bring_up_to_date(
    engine: Engine, snapshots: Sequence[DirectorySnapshot], report: PushReport, *, batch: int, progress: Progress
) -> None:
    mark = mark_of(report.indexes, snapshots)
    old = read_mark(engine.mark())
    _refuse_another_index(engine, snapshots, old, mark)
    total = sum(snapshot.execute("SELECT count(*) FROM items WHERE state = 'ok'")[0][0] for snapshot in snapshots)
    progress.start(total, what="pushing", unit="items")
    if old == mark:
        report.unchanged = total
        return
    engine.set_mark(unfinished(mark))
    for place, snapshot in enumerate(snapshots):
        for page in listing.pages(snapshot, size=batch):
            earlier = _known(snapshots[:place], [one.item.id for one in page])
            _send(engine, entries_of(snapshot, [one for one in page if one.item.id not in earlier]), report)
            progress.advance(len(page))
    _remove_gone(engine, snapshots, report)
    report.notes += engine.finish()
    engine.set_mark(json.dumps(mark))


def _send(engine: Engine, entries: Sequence[Entry], report: PushReport) -> None:
    """What differs of one batch."""
    fit, unfit = [], []
    for entry in entries:
        reason = _unfit(engine, entry)
        if reason is not None:
            report.skipped.append(reason)
            unfit.append(entry.item.id)
        else:
            fit.append(entry)
    _delete(engine, sorted(engine.fetch(unfit)) if unfit else [], report)
    have = engine.digests([entry.item.id for entry in fit])
    differ = [entry for entry in fit if have.get(entry.item.id) != entry.digest()]
    changed = sum(entry.item.id in have for entry in differ)
    engine.upsert(differ)
    report.changed += changed
    report.added += len(differ) - changed
    report.unchanged += len(fit) - len(differ)


def _unfit(engine: Engine, entry: Entry) -> Skipped | None:
    """Why an engine cannot hold an item; None when it can."""
    item = entry.item
    where = item.path or item.id
    if next(entry.rows(), None) is None:
        return Skipped(where, SkipReason.BAD_EMBEDDING, "it has no row to be found by")
    if storable(item.id) != item.id or not 0 < len(item.id.encode()) <= MOST_ID_BYTES:
        detail = f"an id of over {MOST_ID_BYTES} bytes, or with characters that no database holds"
        return Skipped(where, SkipReason.BAD_ROW, detail)
    size = len(item_json(item))
    if engine.most_bytes is not None and size > engine.most_bytes:
        detail = f"{size:,} bytes of captions and metadata, the engine holds {engine.most_bytes:,}"
        return Skipped(where, SkipReason.TOO_LARGE, detail)
    return None


def _remove_gone(engine: Engine, snapshots: Sequence[DirectorySnapshot], report: PushReport) -> None:
    for ids in engine.ids():
        _delete(engine, sorted(set(ids) - _known(snapshots, ids)), report)


def _delete(engine: Engine, ids: Sequence[str], report: PushReport) -> None:
    if ids:
        engine.delete(ids)
        report.removed += len(ids)


def _known(snapshots: Sequence[DirectorySnapshot], ids: Sequence[str]) -> set[str]:
    """Which of these ids one of the indexes has."""
    return set[str]().union(*(listing.known_ids(snapshot, ids) for snapshot in snapshots))


def _refuse_another_index(
    engine: Engine, snapshots: Sequence[DirectorySnapshot], old: dict[str, Any], new: dict[str, Any]
) -> None:
    """A collection is a mirror of the index that it was first filled from: at that place, or moved from there."""
    had, has = old.get("indexes", []), new["indexes"]
    same_place = [one[0] for one in had] == [one[0] for one in has]
    moved = [one[1] for one in had] == [one[1] for one in has] and not any(IndexStore.exists(one[0]) for one in had)
    if same_place or moved or not any(engine.count(modality) for modality in Modality):
        return
    if not had and all(_as_they_are(engine, snapshots, ids) for ids in engine.ids()):
        return
    raise StoreError(
        engine.where,
        expected=f"a collection that mirrors {has[0][0]}",
        got=f"one of {had[0][0]}" if had else "one that was filled otherwise",
        do="Push to another collection: what is not in this index would be deleted.",
    )


def _as_they_are(engine: Engine, snapshots: Sequence[DirectorySnapshot], ids: Sequence[str]) -> bool:
    """Whether the engine holds these items as the indexes do."""
    wanted: dict[str, str] = {}
    for snapshot in reversed(snapshots):
        listed = list(listing.by_ids(snapshot, ids).values())
        wanted |= {entry.item.id: entry.digest() for entry in entries_of(snapshot, listed)}
    have = engine.digests(ids)
    return all(name in wanted and have.get(name) == wanted[name] for name in ids)
