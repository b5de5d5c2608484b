"""Indexes merged into one, and one split into many, with every vector as it is.

    merge(["indexes/2023", "indexes/2024"], "indexes/all")
    split("indexes/all", "indexes/parts", shards=4)

Decisions:
- What is made grows in a hidden folder beside its place, and gets its name by one rename when it is whole: nobody ever
  opens half of it. Killed at any moment, the same command goes on from the last commit; with inputs that changed
  meanwhile it begins anew.
- Nothing is encoded, and rows, ids, roots, stamps, captions, metadata and skips are kept: a later `mmsearch index` goes
  on from there. Dead rows stay behind.
- `shards=N` sends each item where its id says, see `shard_of`: an item is in the same shard of N whenever it is split.
  `rows=M` fills one shard after another, in the order in which items came into the index.
- Memory holds a batch of rows and a page of item numbers, whatever the size of the indexes.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from mmsearch.derive import derive_or_scan
from mmsearch.errors import ModelError, StoreError, UsageError
from mmsearch.opened import SHARDS_NAME, TOGETHER, check_alike, directories, refuse_shards
from mmsearch.progress import Progress, SilentProgress
from mmsearch.store.copying import Contest, Origin, copy_items, copy_tokens, keep_spaces, last_item
from mmsearch.store.directory import IndexStore
from mmsearch.store.disk import Disk, os_guard
from mmsearch.store.lock import WriterLock
from mmsearch.store.settings import PUSHED
from mmsearch.store.tokens import tokens_identity
from mmsearch.types import Modality

if TYPE_CHECKING:
    from mmsearch.encoder import Encodes

MOST_SHARDS = 1000
BATCH_ITEMS = 4096
"""Items of one commit, at most."""
OPEN_AT_ONCE = 64
"""Shards that are written side by side in one pass over the index: each takes a few open files."""
_PLAN = "plan.json"
_WHOLE = "whole"

Path_ = str | os.PathLike[str]
Route = Callable[[int, str], int]
"""(item number, id) -> which shard."""


@dataclass(frozen=True, slots=True)
class CopyReport:
    """What `merge` or `split` made. `indexes`: the index directories; counts are of all of them together.

    `superseded`: items that were left out since another input has a newer one of the same name or id. `skipped`: files
    that are remembered as unreadable. `tokens`: pictures whose patch tokens were copied. `seconds`: wall time.
    """

    out: Path
    indexes: tuple[Path, ...]
    items: int = 0
    skipped: int = 0
    image_rows: int = 0
    text_rows: int = 0
    superseded: int = 0
    tokens: int = 0
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


def merge(
    indexes: Sequence[Path_],
    out: Path_,
    *,
    progress: Progress | None = None,
    encoder: Encodes | None = None,
    batch_items: int = BATCH_ITEMS,
    disk: Disk | None = None,
) -> CopyReport:
    """Make one index at `out`, which must not be there, of several of one model; folders of shards count as theirs.

    Of items with one (root, name) or one id in several inputs the one with the newer stamp is kept, see
    `store.copying`. Settings are those of the first input, memory the sum of all. `encoder`: makes the queries that a
    large index is tuned with; None: that of the model, when it is needed. `batch_items`: of one commit, at most.
    Raises `UsageError`, `StoreError` where something is at `out`, `IndexMismatchError`, `IndexLockedError` while the
    same is being made, and what opening the inputs raises.
    """
    started, told, disk = time.perf_counter(), progress or SilentProgress(), disk or Disk()
    paths = directories(indexes)
    if not paths:
        raise UsageError("merge", expected="index directories", got="none", do="Name at least one.")
    with ExitStack() as stack:
        origins = [stack.enter_context(Origin(path)) for path in dict.fromkeys(map(os.path.realpath, paths))]
        for other in origins[1:]:
            check_alike(
                origins[0], other, to_be="to be merged with", model=TOGETHER,
                items="Index one of them anew with --item-vectors.",
            )  # fmt: skip
        settings = _merged_settings(origins)
        if any(origin.settings.get("tokens") is True for origin in origins):
            settings["tokens"] = True
        with _draft(os.fspath(out), _plan("merge", origins), disk=disk, told=told) as draft:
            copying = _Copying(origins, [draft.whole], settings=settings, batch_items=batch_items, disk=disk, told=told)
            copying.run(lambda item, id_: 0, encoder)
            draft.publish()
    return copying.report(Path(out), [Path(out)], started=started)


def split(
    index: Path_,
    out: Path_,
    *,
    shards: int | None = None,
    rows: int | None = None,
    progress: Progress | None = None,
    encoder: Encodes | None = None,
    batch_items: int = BATCH_ITEMS,
    disk: Disk | None = None,
) -> CopyReport:
    """Make the folder `out`, which must not be there, of indexes `shard-00`, `shard-01`, ... that together are `index`.

    `shards`: how many, 1..1000, each item where its id says; or `rows`: at most so many rows a shard (more where one
    item has more), filled one after another. `Searcher.open(out)` searches them all. Raises as `merge` does.
    """
    started, told, disk = time.perf_counter(), progress or SilentProgress(), disk or Disk()
    if (shards is None) == (rows is None):
        got = "none" if shards is None else "both"
        raise UsageError(
            "split", expected="a number of shards or of rows a shard", got=got, do="Name one: --shards N or --rows N."
        )
    if shards is not None and not 1 <= shards <= MOST_SHARDS:
        raise UsageError("shards", expected=f"1 to {MOST_SHARDS}", got=str(shards), do="Name another number.")
    if rows is not None and rows < 1:
        raise UsageError("rows", expected="1 or more", got=str(rows), do="Name how many rows a shard may hold.")
    refuse_shards(os.fspath(index))
    with Origin(index) as origin:
        count, route = (shards, _by_id(shards)) if shards is not None else _by_rows(origin, rows or 1)
        names = [f"shard-{number:0{max(2, len(str(count - 1)))}d}" for number in range(count)]
        rule = {"shards": shards, "rows": rows}
        with _draft(os.fspath(out), _plan("split", [origin], **rule), disk=disk, told=told) as draft:
            disk.make_dir(draft.whole)
            listing = json.dumps({"format": 1, "shards": names, "by": rule}, indent=1) + "\n"
            targets = [os.path.join(draft.whole, name) for name in names]
            copying = _Copying(
                [origin], targets, settings=_kept_settings(origin.settings, shards=count),
                batch_items=batch_items, disk=disk, told=told,
            )  # fmt: skip
            copying.run(route, encoder)
            disk.put(os.path.join(draft.whole, SHARDS_NAME), [listing.encode()])
            draft.publish()
    return copying.report(Path(out), [Path(out, name) for name in names], started=started)


def _merged_settings(origins: Sequence[Origin]) -> dict[str, Any]:
    """Those of the first, with the memory that all of them together may take."""
    settings = _kept_settings(origins[0].settings)
    memory = [origin.settings.get("index", {}).get("memory") for origin in origins]
    if "index" in settings and memory[0] is not None:
        layout = {name: value for name, value in settings["index"].items() if name != "memory"}
        settings["index"] = layout | ({} if None in memory else {"memory": sum(memory)})
    return settings


def _kept_settings(settings: Mapping[str, Any], *, shards: int = 1) -> dict[str, Any]:
    """Those of an index that is one of so many made of another: no engine's mirror, and with its part of the memory."""
    kept = {name: value for name, value in settings.items() if name != PUSHED}
    layout = kept.get("index", {})
    if layout.get("memory") is not None:
        kept["index"] = {**layout, "memory": max(layout["memory"] // shards, 1)}
    return kept


def shard_of(item_id: str, shards: int) -> int:
    """Which of so many shards an item is in: xxh3_64 of its id, modulo their number."""
    return int(xxhash.xxh3_64_intdigest(item_id.encode()) % shards)


def _by_id(shards: int) -> Route:
    return lambda item, id_: shard_of(id_, shards)


def _by_rows(origin: Origin, most: int) -> tuple[int, Route]:
    """How many shards of at most so many rows there are, and which item is in which."""
    first_items, held = [0], 0
    for item, count in origin.row_counts():
        if held and held + count > most:
            first_items.append(item)
            held = 0
            if len(first_items) > MOST_SHARDS:
                do = "Let a shard hold more rows."
                raise UsageError("rows", expected=f"enough for {MOST_SHARDS} shards at most", got=str(most), do=do)
        held += count
    return len(first_items), lambda item, id_: bisect_right(first_items, item) - 1


class _Copying:
    """Items of all origins on their way into targets, which are made where they are not yet."""

    def __init__(
        self,
        origins: Sequence[Origin],
        targets: Sequence[str],
        *,
        settings: Mapping[str, Any],
        batch_items: int,
        disk: Disk,
        told: Progress,
    ) -> None:
        self._origins, self._targets, self._settings = origins, targets, settings
        self._batch_items, self._disk, self._told = batch_items, disk, told
        self._contest = Contest(origins) if len(origins) > 1 else None
        self._counts = dict.fromkeys(("items", "skipped", "image_rows", "text_rows", "tokens"), 0)
        self._notes: list[str] = []

    def run(self, route: Route, encoder: Encodes | None) -> None:
        """Copy everything that is not in a target yet, and finish all of them."""
        every = sum(origin.items for origin in self._origins)
        passes = range(0, len(self._targets), OPEN_AT_ONCE)
        self._told.start(every * len(passes), what="copying", unit="items")
        for low in passes:
            with ExitStack() as stack:
                some = self._targets[low : low + OPEN_AT_ONCE]
                stores = [stack.enter_context(self._open(path)) for path in some]
                self._copy(stores, lambda item, id_, low=low: route(item, id_) - low)  # type: ignore[misc]
                for store in stores:
                    keep_spaces(store, self._origins)
                    self._notes += _derive(store, encoder, told=self._told)
                    self._count(store)
        self._copy_tokens()

    def _open(self, path: str) -> IndexStore:
        if IndexStore.exists(path):
            return IndexStore.open(path, write=True, disk=self._disk)
        first = self._origins[0]
        return IndexStore.create(
            path, model=first.model, preprocessing=first.preprocessing, settings=self._settings, disk=self._disk
        )

    def _copy(self, stores: Sequence[IndexStore], route: Route) -> None:
        """Items for these stores, those that `route` sends to number 0, 1, ...; what they have is passed over."""
        done, offset = [last_item(store) for store in stores], 0
        for place, origin in enumerate(self._origins):
            waiting: list[list[int]] = [[] for _ in stores]
            after = min(done) - offset
            while page := origin.page(max(after, 0)):
                after = page[-1][0]
                kept = set(self._contest.kept(place, [item for item, _ in page])) if self._contest else None
                for item, id_ in page:
                    number = route(item, id_)
                    if 0 <= number < len(stores) and item + offset > done[number] and (kept is None or item in kept):
                        waiting[number].append(item)
                for number, store in enumerate(stores):
                    if len(waiting[number]) >= self._batch_items:
                        self._write(store, origin, waiting[number], offset=offset)
                        waiting[number] = []
                self._told.advance(len(page))
            for number, store in enumerate(stores):
                self._write(store, origin, waiting[number], offset=offset)
            offset += origin.last_item

    def _write(self, store: IndexStore, origin: Origin, items: Sequence[int], *, offset: int) -> None:
        for start in range(0, len(items), self._batch_items):
            for batch in origin.batches(items[start : start + self._batch_items]):
                copy_items(store, origin, batch, offset=offset)

    def _count(self, store: IndexStore) -> None:
        with store.snapshot() as snapshot:
            found = snapshot.execute("SELECT count(*), coalesce(sum(state = 'ok'), 0) FROM items")
            self._counts["items"] += found[0][1]
            self._counts["skipped"] += found[0][0] - found[0][1]
            self._counts["image_rows"] += snapshot.count(Modality.IMAGE)
            self._counts["text_rows"] += snapshot.count(Modality.TEXT)

    def _copy_tokens(self) -> None:
        """Patch tokens of what is there, where all that there are were made by one."""
        identities = {who for origin in self._origins if (who := tokens_identity(origin.path)) is not None}
        if len(identities) > 1:
            self._notes.append("patch tokens were not copied: the indexes have them from different re-rankers")
        if len(identities) == 1:
            self._told.start(self._counts["items"], what="patch tokens", unit="pictures")
            for target in self._targets:
                self._counts["tokens"] += copy_tokens(
                    target, self._origins, identity=next(iter(identities)), told=self._told.advance
                )

    def report(self, out: Path, indexes: Sequence[Path], *, started: float) -> CopyReport:
        """What was done, now that it is at its place."""
        given = sum(origin.items for origin in self._origins)
        return CopyReport(
            out,
            tuple(indexes),
            **self._counts,
            superseded=given - self._counts["items"] - self._counts["skipped"],
            notes=tuple(self._notes),
            seconds=time.perf_counter() - started,
        )


def _derive(store: IndexStore, encoder: Encodes | None, *, told: Progress) -> tuple[str, ...]:
    """The files that make an index fast, as `build` makes them; tuned on what is there where its model is not."""

    def load() -> Encodes:
        from mmsearch.encoder import Encoder

        return encoder or Encoder.load(store.settings.get("model"))

    try:
        return derive_or_scan(store, encoder=load, told=told)
    except ModelError as error:
        told.note(f"{store.path}: tuned without texts: {error}")
        return derive_or_scan(store, encoder=None, told=told)


class _Draft:
    """What is being made for `out`, in a hidden folder beside it until it is whole."""

    def __init__(self, out: str, *, disk: Disk) -> None:
        self.out, self._disk = os.path.abspath(out), disk
        parent, name = os.path.split(self.out)
        self.folder = os.path.join(parent, f".{name}.part")
        self.whole = os.path.join(self.folder, _WHOLE)

    def begin(self, plan: str, told: Progress) -> None:
        """Make room; what an earlier run with another plan left is removed. For who holds the lock."""
        path = os.path.join(self.folder, _PLAN)
        before = Path(path).read_text(encoding="utf-8") if os.path.exists(path) else None
        if before != plan:
            if os.path.exists(self.whole):
                told.note(f"{self.out}: the inputs are not those of the run that was stopped; beginning anew")
            shutil.rmtree(self.whole, ignore_errors=True)
            self._disk.put(path, [plan.encode()])
        elif os.path.exists(self.whole):
            told.note(f"{self.out}: going on where it was stopped")

    def publish(self) -> None:
        """Give what was made its name, and remove the rest."""
        with os_guard(self.out):
            self._disk.step("replace", self.out)
            os.rename(self.whole, self.out)  # also over an empty folder
            self._disk.sync_dir(os.path.dirname(self.out))
            shutil.rmtree(self.folder)


@contextmanager
def _draft(out: str, plan: Mapping[str, Any], *, disk: Disk, told: Progress) -> Iterator[_Draft]:
    """The place where `out` is made, locked; it stays when making it fails."""
    draft = _Draft(out, disk=disk)
    with os_guard(out):
        if os.path.lexists(draft.out) and not (os.path.isdir(draft.out) and not os.listdir(draft.out)):
            if not os.path.exists(draft.whole):  # killed between giving it its name and removing the rest
                shutil.rmtree(draft.folder, ignore_errors=True)
            raise StoreError(draft.out, expected="nothing there", got="something", do="Choose another place.")
        disk.make_dir(draft.folder)
        lock = WriterLock(draft.folder)
        lock.acquire()
    try:
        with os_guard(out):
            draft.begin(json.dumps(plan, indent=1, sort_keys=True) + "\n", told)
        yield draft
    finally:
        lock.release()


def _plan(verb: str, origins: Sequence[Origin], **rule: object) -> dict[str, Any]:
    """What is to be made, of what: with another one, what an earlier run has done is of no use."""
    inputs = [
        {"path": one.path, "generation": one.snapshot.generation, "created_at": str(one.snapshot.meta["created_at"])}
        for one in origins
    ]
    return {"verb": verb, "inputs": inputs, **rule}
