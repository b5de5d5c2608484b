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
- Patch tokens are made in a pass of their own, after the index is whole: it can be searched meanwhile.
- Fused item vectors are a setting of the index, written down only where they are: all rows that stand for items are
  made one way, and an index without the setting is what it always was.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsearch.data.collection import is_table, read_collection
from mmsearch.data.images import DEFAULT_LIMITS, Limits
from mmsearch.data.reading import stamp_of
from mmsearch.errors import IndexMismatchError, InputError, PartialError, UsageError
from mmsearch.ingest import Ingest
from mmsearch.progress import Progress as Progress
from mmsearch.progress import SilentProgress as SilentProgress
from mmsearch.store.directory import IndexStore
from mmsearch.store.tokens import remove_tokens
from mmsearch.token_fill import keeps_tokens, reranker_of, with_tokens
from mmsearch.towers.config import no_item_fusion
from mmsearch.towers.locate import is_directory
from mmsearch.types import BuildReport, Skipped, SkipReason, Source

if TYPE_CHECKING:
    from mmsearch.encoder import Encodes, JoinsItems
    from mmsearch.rerank.tokens import ReadsPatches

ITEM_VECTORS = ("separate", "fused")
"""What stands for an item with a picture and texts: the picture's row, or one row made of all of it."""

FILES = ""
"""The store's root of everything that is a file of its own (a picture), whatever folder it lies in."""

OF_LIMITS = (SkipReason.TOO_LARGE, SkipReason.OUT_OF_MEMORY)
"""Skips that other limits may undo."""


def build(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str] | Source],
    out: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    encoder: Encodes | None = None,
    exclude: Sequence[str] = (),
    include_hidden: bool = False,
    prune: bool = False,
    item_vectors: str | None = None,
    tokens: bool | None = None,
    reranker: ReadsPatches | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    limits: Limits | None = None,
    strict: bool = False,
    device: str = "auto",
    force: bool = False,
    progress: Progress | None = None,
) -> BuildReport:
    """Bring the index at `out` up to date with `paths`: folders, picture files, tables, ready `Source`s, or one path.

    `model`: see `Encoder.load`; None means the model of the index, for a new index the bundled one.
    `encoder` is used instead when given. `prune` also drops the items of folders that are empty or gone.
    `item_vectors`: "separate" or "fused", None means the index's own, for a new index "separate". Fused: each item's
    picture row is made of its picture and its captions, an item of captions alone gets one of those, and all are
    searched as one list of pictures; the model must have an item head (else `ModelError`).
    `tokens`: keep every picture's patch tokens, so that re-ranking need not look at it again (True also looks for
    damaged ones), or remove them; None means the index's own, for a new index not. They are made by `reranker`, else by
    the model's (`ModelError` when it has none).
    `batch_size`: pictures per pass of the model. `workers`: decoding processes (None: one a core).
    `force` goes on with an index of another model or other item vectors (everything is encoded anew) or a damaged one
    (what is damaged is), and tries skipped files again.

    Raises `InputError` (nothing there), `IndexMismatchError`, `IndexLockedError`, `IndexDamagedError`,
    `ResourceError`, and with `strict` a `PartialError` after the rest has been indexed.
    """
    started = time.perf_counter()
    told = progress or SilentProgress()
    target = os.fspath(out)
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    scan = Scan(given, exclude=exclude, include_hidden=include_hidden)
    scan.check(prune=prune)
    if not IndexStore.exists(target):
        _check_not_empty(Scan(given, exclude=exclude, include_hidden=include_hidden))
    name, kind = _model_name(target, model, encoder), _item_vectors(target, item_vectors)
    reads = (reranker or reranker_of(name, device=device)) if keeps_tokens(target, tokens) else None
    limits = limits or DEFAULT_LIMITS
    if encoder is None:
        from mmsearch.encoder import Encoder

        encoder = Encoder.load(name, device=device)
    joins = _joining(encoder) if kind == "fused" else None
    settings = _settings(name, limits, fused=joins is not None, tokens=reads is not None)
    store, retry = _open_store(target, encoder, settings=settings, force=force, told=told)
    with store:
        ingest = Ingest(store, encoder, batch_size=batch_size, workers=workers, limits=limits, told=told, joins=joins)
        try:
            _bring_up_to_date(store, scan, ingest, prune=prune, retry=retry, told=told)
        finally:
            # Also on Ctrl-C and on errors: what is encoded is kept, the next run goes on from here.
            ingest.close()
        store.compact()
        _derive(store)
        if tokens is False:
            remove_tokens(target)
    report = replace(ingest.report(Path(target)), skipped=(*scan.skipped, *ingest.skipped), notes=tuple(ingest.notes))
    if reads is not None:
        thorough = tokens is True
        report = with_tokens(report, reads, batch_size=batch_size, workers=workers, thorough=thorough, progress=told)
    report = replace(report, seconds=time.perf_counter() - started)
    if strict:
        _check_complete(report)
    return report


def _check_complete(report: BuildReport) -> None:
    """`PartialError` when something was skipped."""
    if report.skipped:
        first = report.skipped[0]
        raise PartialError(
            f"{len(report.skipped)} of the files were skipped",
            got=f"{first.path}: {first.reason}",
            do="The rest is indexed; drop --strict to accept this.",
        )


class Scan:
    """What the user named, made absolute, and what of it can be told to be gone."""

    def __init__(
        self, given: Sequence[str | os.PathLike[str] | Source], *, exclude: Sequence[str], include_hidden: bool
    ) -> None:
        self._ready = [entry for entry in given if isinstance(entry, Source)]
        paths = [os.path.abspath(os.fspath(p)) for p in given if not isinstance(p, Source)]
        self._exclude, self._include_hidden = tuple(exclude), include_hidden
        self.absent = {p for p in paths if not os.path.lexists(p)}
        self._present = [p for p in paths if p not in self.absent]
        self._named = paths
        self.folders = [p for p in self._present if os.path.isdir(p)]
        self._is_folder = frozenset(self.folders)
        self.skipped = [Skipped(p, SkipReason.VANISHED, "no such path") for p in sorted(self.absent)]
        self.tables: set[str] = set()
        self._full: set[str] = set()

    def check(self, *, prune: bool) -> None:
        """Raise `InputError` when there is nothing to look at; some absent paths among others are only skipped."""
        if not self._ready and not self._named:
            raise InputError("index", expected="a folder, a picture, or a table", got="nothing")
        if self._named and not self._present and not self._ready and not prune:
            raise InputError(
                self.names(), expected="a folder, a picture, or a table", got="no such path",
                do="What is indexed of it stays; --prune drops it.",
            )  # fmt: skip

    def names(self) -> str:
        """What the user named, for messages; the first few of many."""
        shown = ", ".join(self._named[:3])
        return (shown + f" and {len(self._named) - 3} more" * (len(self._named) > 3)) or "the sources"

    def sources(self) -> Iterator[Source]:
        """Everything found, pictures under their absolute path; streams.

        Tables come first: a picture that a table names is that row's item, not another one of its folder.
        """
        for source in self._ready:
            self.tables.add(source.root)
            yield _stamped(source)
        tables = [p for p in self._present if p not in self._is_folder and is_table(p)]
        tabled: set[int] = set()
        looked_at: set[str] = set()
        for source in self._read_tables(tables):
            self.tables.add(source.root)
            if source.path is not None and self.folders:
                tabled.add(hash(source.path))
            yield source
        read = set(tables)
        for source in self._read([p for p in self._present if p not in read]):
            path = str(source.path)
            if (parent := os.path.dirname(path)) not in looked_at:
                looked_at.add(parent)
                self._full.update(folder for folder in self.folders if is_below(parent, folder))
            if hash(path) not in tabled:
                yield replace(source, root=FILES, name=path)

    def _read_tables(self, tables: list[str]) -> Iterator[Source]:
        """Rows of all tables; among other paths, a file that turns out to be no table costs itself only."""
        for table in tables:
            try:
                yield from self._read([table])
            except InputError as error:
                if len(self._named) == 1:
                    raise
                self.skipped.append(Skipped(table, SkipReason.BAD_ROW, f"no table: {error.got}"))

    def _read(self, paths: list[str]) -> Iterator[Source]:
        if not paths:
            return iter(())
        return read_collection(
            paths, exclude=self._exclude, include_hidden=self._include_hidden, on_skip=self.skipped.append
        )

    def emptied(self) -> list[str]:
        """Folders and tables that were named and hold nothing any more (call after the scan)."""
        known = self._is_folder | self.tables | {s.path for s in self.skipped}
        tables = (p for p in self._present if p not in known and is_table(p))
        return [*(f for f in self.folders if f not in self._full), *tables, *sorted(self.absent)]

    def gone(self, *, prune: bool) -> Callable[[str | None, str], bool]:
        """Whether an item of (path, root) that the scan did not find is to be dropped (call after the scan).

        Kept, unless `prune`: what lies in a folder or table that is empty or absent, and rows whose picture
        could not be found. Kept in any case: what lies below something that could not be read.
        """
        emptied = self.emptied()
        unreadable = [s.path for s in self.skipped if s.reason is SkipReason.UNREADABLE]
        lost = {s.path for s in self.skipped if s.reason is SkipReason.VANISHED}
        roots = self.tables | (set(emptied) if prune else set())
        folders = [*self.folders, *(self.absent if prune else ())]

        def is_gone(path: str | None, root: str) -> bool:
            if path is not None and any(is_below(path, u) for u in unreadable):
                return False
            if not prune and path is not None and (path in lost or any(is_below(path, e) for e in emptied)):
                return False
            if root != FILES:
                return root in roots
            return path is not None and any(is_below(path, folder) for folder in folders)

        return is_gone


def is_below(path: str, folder: str) -> bool:
    """Whether `path` is `folder` or lies in it (by name; both absolute)."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _stamped(source: Source) -> Source:
    """With the stamp of its file, if nobody gave one: without it the picture would be read at each build."""
    if source.path is None or source.stamp is not None:
        return source
    try:
        return replace(source, stamp=stamp_of(os.stat(source.path)))
    except OSError:
        return source  # reading it will say why


def _check_not_empty(scan: Scan) -> None:
    """An index is not made for nothing: a folder without pictures is a wrong path more often than a plan."""
    if next(scan.sources(), None) is None:
        found = f"none (skipped {scan.skipped[0].path}: {scan.skipped[0].reason})" if scan.skipped else "none"
        raise InputError(scan.names(), expected="at least one picture", got=found, do="Name another folder.")


def _model_name(target: str, model: str | os.PathLike[str] | None, encoder: Encodes | None) -> str | None:
    """What `Encoder.load` is to be given, now and by whoever opens the index later; None is the bundled model."""
    if encoder is not None:
        return encoder.source
    if model is None:
        kept = IndexStore.stored_settings(target).get("model") if IndexStore.exists(target) else None
        return None if kept is None else str(kept)
    name = os.fspath(model)
    return os.path.abspath(os.path.expanduser(name)) if is_directory(model) else name


def _item_vectors(target: str, wanted: str | None) -> str:
    """What was asked for, else what the index has, else "separate"."""
    if wanted is not None and wanted not in ITEM_VECTORS:
        raise UsageError("item_vectors", expected=" or ".join(ITEM_VECTORS), got=repr(wanted))
    if wanted is None and IndexStore.exists(target):
        return _kept_item_vectors(IndexStore.stored_settings(target))
    return wanted or "separate"


def _kept_item_vectors(settings: Mapping[str, Any]) -> str:
    """An index says so where its item vectors are fused, and nothing where they are not."""
    return "fused" if settings.get("item_vectors") == "fused" else "separate"


def _settings(name: str | None, limits: Limits, *, fused: bool, tokens: bool) -> dict[str, Any]:
    """What the index remembers of how it is made; what is as it always was is not written down."""
    settings: dict[str, Any] = {"model": name, "limits": asdict(limits)}
    return settings | ({"item_vectors": "fused"} if fused else {}) | ({"tokens": True} if tokens else {})


def _joining(encoder: Encodes) -> JoinsItems:
    """The encoder as one that joins an item's picture and texts; `ModelError` when it never learned to."""
    from mmsearch.encoder import JoinsItems

    if isinstance(encoder, JoinsItems) and encoder.joins_items:
        return encoder
    raise no_item_fusion(encoder.identity.name)


def _open_store(
    target: str, encoder: Encodes, *, settings: dict[str, Any], force: bool, told: Progress
) -> tuple[IndexStore, Collection[SkipReason]]:
    """The store, opened for writing, and which remembered skips are to be tried again."""
    identity = encoder.identity
    if not IndexStore.exists(target):
        made = IndexStore.create(target, model=identity, preprocessing=encoder.preprocessing, settings=settings)
        return made, ()
    store = IndexStore.open(target, write=True, repair=force, model=None if force else identity)
    kept, wanted = _kept_item_vectors(store.settings), _kept_item_vectors(settings)
    if kept != wanted and not force:
        store.close()
        raise IndexMismatchError(
            target, expected=f"{kept} item vectors, as this index has them", got=wanted,
            do="Choose another --out, or --force to encode everything anew.",
        )  # fmt: skip
    if not store.model.same_space(identity) or kept != wanted:
        store.close()
        was = store.model.name if kept == wanted else f"{store.model.name}, {kept} item vectors"
        told.note(f"{target}: made by {was}; encoding everything anew with {identity.name}")
        anew = IndexStore.replace(target, model=identity, preprocessing=encoder.preprocessing, settings=settings)
        return anew, ()
    if store.repaired:
        told.note(f"{target}: {store.repaired} damaged items were dropped and are encoded again")
    limits_changed = store.settings.get("limits") != settings["limits"]
    store.note_settings(settings)
    return store, tuple(SkipReason) if force else OF_LIMITS if limits_changed else ()


def _bring_up_to_date(
    store: IndexStore, scan: Scan, ingest: Ingest, *, prune: bool, retry: Collection[SkipReason], told: Progress
) -> None:
    told.start(None)
    store.begin_scan()
    told.start(store.seen(scan.sources()))
    emptied = scan.emptied()
    roots = [FILES, *scan.tables, *(e for e in emptied if e not in scan.folders)]
    kept = ingest.run(store.changes(scanned_roots=roots, retry=retry), scan.gone(prune=prune))
    held = sum(root in emptied or (path is not None and any(is_below(path, e) for e in emptied)) for path, root in kept)
    if held and not prune:
        where = ", ".join(emptied)
        ingest.notes.append(
            f"{where}: nothing there now; its {held} items are kept (not mounted?). --prune drops them."
        )


def _derive(store: IndexStore) -> None:
    from mmsearch.index.faiss import FaissFlat

    store.update_derived(FaissFlat)
    store.finish()
