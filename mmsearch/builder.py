"""Collection -> index directory, incremental.

One pass: the scan is streamed into the store, the store says what differs, pictures that are really new
are decoded ahead in worker processes and encoded in batches, and each batch is one durable commit.
A build that is stopped at any instant goes on where it stopped: what was committed is UNCHANGED next time.

Decisions:
- A picture's identity is its absolute path (root "" in the store), so that overlapping folders, single
  files and lists name the same picture once. Rows of a table, and `Source`s handed over, are known by
  their own (root, name): another call with the same root brings that root up to date.
- Gone means: below a folder that was scanned now and found not to be empty. A folder that holds nothing
  any more, or is not there at all, looks like an unmounted disk: its items stay unless `prune`.
- A file whose size some indexed file had is hashed before it is decoded: moves and copies cost a read,
  not a pass through the model.
- Ctrl-C commits what is encoded and then goes on its way as KeyboardInterrupt.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mmsearch.data.collection import read_collection
from mmsearch.data.images import DEFAULT_LIMITS, Limits
from mmsearch.data.reading import stamp_of
from mmsearch.errors import InputError, PartialError
from mmsearch.ingest import Ingest
from mmsearch.store.directory import IndexStore
from mmsearch.towers.locate import is_directory
from mmsearch.types import BuildReport, Skipped, SkipReason, Source

if TYPE_CHECKING:
    from mmsearch.encoder import Encodes

FILES = ""
"""The store's root of everything that is a file of its own (a picture), whatever folder it lies in."""


class Progress(Protocol):
    """Told how a build goes on; the command line draws a bar from it."""

    def start(self, total: int | None) -> None:
        """`total` items were found and are being looked at."""
        ...

    def advance(self, n: int, *, note: str = "") -> None:
        """`n` more items are done."""
        ...

    def note(self, text: str) -> None:
        """One line the user should read."""
        ...


class SilentProgress:
    """Says nothing."""

    def start(self, total: int | None) -> None:
        """Ignore."""

    def advance(self, n: int, *, note: str = "") -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""


def build(
    paths: Sequence[str | os.PathLike[str]] | Iterable[Source],
    out: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    encoder: Encodes | None = None,
    exclude: Sequence[str] = (),
    include_hidden: bool = False,
    prune: bool = False,
    batch_size: int = 32,
    workers: int | None = None,
    limits: Limits | None = None,
    strict: bool = False,
    device: str = "auto",
    force: bool = False,
    progress: Progress | None = None,
) -> BuildReport:
    """Bring the index at `out` up to date with `paths`: folders, picture files, tables, or ready `Source`s.

    `model`: see `Encoder.load`; None means the model of the index, for a new index the bundled one.
    `encoder` is used instead when given. `prune` also drops the items of folders that are empty or gone.
    `batch_size`: pictures per pass of the model. `workers`: decoding processes (None: one a core).
    `force` encodes everything anew when the index was made by another model.

    Raises `InputError` (nothing there), `IndexMismatchError`, `IndexLockedError`, `IndexDamagedError`,
    `ResourceError`, and with `strict` a `PartialError` after the rest has been indexed.
    """
    started = time.perf_counter()
    told = progress or SilentProgress()
    target = os.fspath(out)
    given = list(paths)
    scan = Scan(given, exclude=exclude, include_hidden=include_hidden)
    scan.check(prune=prune)
    if not IndexStore.exists(target):
        _check_not_empty(Scan(given, exclude=exclude, include_hidden=include_hidden))
    name = _model_name(target, model, encoder)
    if encoder is None:
        from mmsearch.encoder import Encoder

        encoder = Encoder.load(name, device=device)
    with _open_store(target, encoder, model=name, force=force, told=told) as store:
        ingest = Ingest(
            store, encoder, batch_size=batch_size, workers=workers, limits=limits or DEFAULT_LIMITS, told=told
        )
        try:
            _bring_up_to_date(store, scan, ingest, prune=prune, told=told)
        finally:
            # Also on Ctrl-C and on errors: what is encoded is kept, the next run goes on from here.
            ingest.close()
        store.compact()
        _derive(store)
    report = replace(
        ingest.report(Path(target)),
        skipped=(*scan.skipped, *ingest.skipped),
        notes=tuple(ingest.notes),
        seconds=time.perf_counter() - started,
    )
    if strict and report.skipped:
        first = report.skipped[0]
        raise PartialError(
            f"{len(report.skipped)} of the files were skipped",
            got=f"{first.path}: {first.reason}",
            do="The rest is indexed; drop --strict to accept this.",
        )
    return report


class Scan:
    """What the user named, made absolute, and what of it can be told to be gone."""

    def __init__(
        self, given: Sequence[str | os.PathLike[str] | Source], *, exclude: Sequence[str], include_hidden: bool
    ) -> None:
        self._ready = [entry for entry in given if isinstance(entry, Source)]
        self._paths = [os.path.abspath(os.fspath(p)) for p in given if not isinstance(p, Source)]
        self._exclude, self._include_hidden = tuple(exclude), include_hidden
        self.folders = [p for p in self._paths if os.path.isdir(p)]
        self.absent = [p for p in self._paths if not os.path.lexists(p)]
        self.skipped = [Skipped(p, SkipReason.VANISHED, "no such path") for p in self.absent]
        self.tables: set[str] = set()
        self._full: set[str] = set()

    def check(self, *, prune: bool) -> None:
        """Raise `InputError` when there is nothing to look at; some absent paths among others are only skipped."""
        if not self._ready and not self._paths:
            raise InputError("index", expected="a folder, a picture, or a table", got="nothing")
        if self._paths and len(self.absent) == len(self._paths) and not prune:
            raise InputError(
                self.names(), expected="a folder, a picture, or a table", got="no such path",
                do="What is indexed of it stays; --prune drops it.",
            )  # fmt: skip

    def names(self) -> str:
        """What the user named, for messages."""
        return ", ".join(self._paths) or "the sources"

    def sources(self) -> Iterator[Source]:
        """Everything found, pictures under their absolute path; streams."""
        present = [p for p in self._paths if p not in self.absent]
        for source in self._ready:
            self.tables.add(source.root)
            yield _stamped(source)
        if present:
            for source in read_collection(
                present, exclude=self._exclude, include_hidden=self._include_hidden, on_skip=self.skipped.append
            ):
                yield self._filed(source)

    def _filed(self, source: Source) -> Source:
        if source.path is None or os.path.isfile(source.root):
            self.tables.add(source.root)
            return source
        for folder in self.folders:
            if is_below(source.path, folder):
                self._full.add(folder)
        return replace(source, root=FILES, name=source.path)

    def emptied(self) -> list[str]:
        """Folders that were named and hold nothing any more (call after the scan)."""
        return [f for f in self.folders if f not in self._full] + self.absent

    def unreadable(self) -> list[str]:
        """Folders that could not be listed: what lies below them is not known to be gone."""
        return [s.path for s in self.skipped if os.path.isdir(s.path)]


def _stamped(source: Source) -> Source:
    """With the stamp of its file, if nobody gave one: without it the picture would be read at each build."""
    if source.path is None or source.stamp is not None:
        return source
    try:
        return replace(source, stamp=stamp_of(os.stat(source.path)))
    except OSError:
        return source  # reading it will say why


def is_below(path: str, folder: str) -> bool:
    """Whether `path` is `folder` or lies in it (by name; both absolute)."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _check_not_empty(scan: Scan) -> None:
    """An index is not made for nothing: a folder without pictures is a wrong path more often than a plan."""
    if next(scan.sources(), None) is None:
        found = f"none (skipped {scan.skipped[0].path}: {scan.skipped[0].reason})" if scan.skipped else "none"
        raise InputError(scan.names(), expected="at least one picture", got=found, do="Name another folder.")


def _model_name(target: str, model: str | os.PathLike[str] | None, encoder: Encodes | None) -> str | None:
    """What `Encoder.load` is to be given, now and by whoever opens the index later; None is the bundled model."""
    if encoder is not None:
        return encoder.identity.name
    if model is None:
        if not IndexStore.exists(target):
            return None
        with IndexStore.open(target) as store:
            kept = store.settings.get("model")
            return None if kept is None else str(kept)
    name = os.fspath(model)
    return os.path.abspath(os.path.expanduser(name)) if is_directory(model) else name


def _open_store(target: str, encoder: Encodes, *, model: str | None, force: bool, told: Progress) -> IndexStore:
    identity, settings = encoder.identity, {"model": model}
    if not IndexStore.exists(target):
        return IndexStore.create(target, model=identity, preprocessing=encoder.preprocessing, settings=settings)
    if not force:
        return IndexStore.open(target, write=True, model=identity)
    store = IndexStore.open(target, write=True, repair=True)
    if store.model.same_space(identity):
        return store
    store.close()
    told.note(f"{target}: made by {store.model.name}; encoding everything anew with {identity.name}")
    return IndexStore.replace(target, model=identity, preprocessing=encoder.preprocessing, settings=settings)


def _bring_up_to_date(store: IndexStore, scan: Scan, ingest: Ingest, *, prune: bool, told: Progress) -> None:
    told.start(None)
    store.begin_scan()
    told.start(store.seen(scan.sources()))
    emptied, unreadable = scan.emptied(), scan.unreadable()
    folders = [f for f in (*scan.folders, *scan.absent) if prune or f not in emptied]

    def is_gone(path: str | None, root: str) -> bool:
        if root in scan.tables:
            return True
        if path is None:
            return False
        return any(is_below(path, f) for f in folders) and not any(is_below(path, u) for u in unreadable)

    kept = ingest.run(store.changes(scanned_roots=[FILES, *scan.tables]), is_gone)
    held = sum(any(is_below(k, f) for f in emptied) for k in kept)
    if held and not prune:
        where = ", ".join(emptied)
        ingest.notes.append(
            f"{where}: nothing there now; its {held} items are kept (not mounted?). --prune drops them."
        )


def _derive(store: IndexStore) -> None:
    from mmsearch.index.faiss import FaissFlat

    store.update_derived(FaissFlat)
    store.finish()

