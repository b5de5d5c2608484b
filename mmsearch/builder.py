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
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsearch.data.images import DEFAULT_LIMITS, Limits
from mmsearch.derive import IndexWish, derive
from mmsearch.errors import IndexMismatchError, InputError, PartialError, UsageError
from mmsearch.ingest import Ingest
from mmsearch.pictures import Engine, ThisProcess
from mmsearch.progress import Estimating
from mmsearch.progress import Progress as Progress
from mmsearch.progress import SilentProgress as SilentProgress
from mmsearch.scan import FILES, Scan, is_below
from mmsearch.store.directory import IndexStore
from mmsearch.store.tokens import remove_tokens
from mmsearch.token_fill import keeps_tokens, reranker_of, with_tokens
from mmsearch.towers.config import no_item_fusion
from mmsearch.towers.locate import is_directory
from mmsearch.types import BuildReport, SkipReason, Source

if TYPE_CHECKING:
    from mmsearch.encoder import Encodes, JoinsItems
    from mmsearch.rerank.tokens import ReadsPatches

ITEM_VECTORS = ("separate", "fused")
"""What stands for an item with a picture and texts: the picture's row, or one row made of all of it."""

OWN_SETTINGS = ("model", "limits", "item_vectors", "tokens")
"""Settings that a build makes anew; what else an index has of them stays."""

OF_LIMITS = (SkipReason.TOO_LARGE, SkipReason.OUT_OF_MEMORY)
"""Skips that other limits may undo."""


_ITEM_BYTES = 600
"""About what an item takes beside its vector: a path, facts, rows of indexes in SQLite."""


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
    kind: str | None = None,
    memory: int | str | None = None,
    overlap: float | None = None,
    queries: str | os.PathLike[str] | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    limits: Limits | None = None,
    strict: bool = False,
    device: str = "auto",
    force: bool = False,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Bring the index at `out` up to date with `paths`: folders, picture files, tables, ready `Source`s, or one path.

    A URI (`data.remote`) is a folder or a picture that lies elsewhere.

    `model`: see `Encoder.load`; None means the model of the index, for a new index the bundled one.
    `encoder` is used instead when given. `prune` also drops the items of folders that are empty or gone.
    `item_vectors`: "separate" or "fused", None means the index's own, for a new index "separate". Fused: each item's
    picture row is made of its picture and its captions, an item of captions alone gets one of those, and all are
    searched as one list of pictures; the model must have an item head (else `ModelError`).
    `tokens`: keep every picture's patch tokens, so that re-ranking need not look at it again (True also looks for
    damaged ones), or remove them; None means the index's own, for a new index not. They are made by `reranker`, else by
    the model's (`ModelError` when it has none).
    `kind`, `memory`, `overlap`, `queries`: how the rows are laid out for searching, see `derive.IndexWish`; None means
    the index's own, for a new index "auto", which is exact below 50,000 rows.
    `batch_size`: pictures per pass of the model. `workers`: decoding processes (None: one a core).
    `engine`: what decodes and encodes, see `scale.ray_encode.RayEngine`; None is this process.
    `force` goes on with an index of another model or other item vectors (everything is encoded anew) or a damaged one
    (what is damaged is), and tries skipped files again.

    Raises `InputError` (nothing there), `IndexMismatchError`, `IndexLockedError`, `IndexDamagedError`,
    `ResourceError`, and with `strict` a `PartialError` after the rest has been indexed.
    """
    started = time.perf_counter()
    told = progress or SilentProgress()
    wish = IndexWish(kind, memory, overlap, queries)
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
    wish.check(encoder.identity.dim)
    told = Estimating(told, item_bytes=_ITEM_BYTES + 2 * encoder.identity.dim)
    settings = _settings(name, limits, fused=joins is not None, tokens=reads is not None)
    encoding = (engine or ThisProcess()).pictures(
        encoder, index=target, batch_size=batch_size, workers=workers, limits=limits, told=told
    )
    with closing(encoding) as pictures:
        store, retry = _open_store(target, encoder, settings=settings, force=force, told=told)
        with store:
            ingest = Ingest(store, encoder, pictures, told=told, joins=joins)
            # Also on Ctrl-C and on errors: what is encoded is kept, the next run goes on from here.
            _bring_up_to_date(store, scan, ingest, prune=prune, retry=retry, told=told)
            pictures.close()
            store.compact()
            derive(store, encoder=lambda: encoder, wish=wish, told=told)
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
    settings = {name: value for name, value in store.settings.items() if name not in OWN_SETTINGS} | settings
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
