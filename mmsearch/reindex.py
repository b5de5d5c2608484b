"""A new model for an index: every item encoded anew, then one switch.

    report = reindex("indexes/photos", model="./mine")

Decisions:
- The old index answers until the switch, and is whole whatever happens. The writer lock is held for the whole run: a
  second writer gets the usual message. A run that is stopped lets go of it; the index may then be brought up to date
  as usual, and the next run encodes what is new or changed.
- Pictures come from their files, captions from the index. The pipeline is that of a build (`ingest`): batches of at
  most 512 items or 1.5 s are durable, and that is all that a kill can cost.
- Items that cannot be encoded again keep the switch from happening, unless they may be dropped: losing items is never a
  side effect. The report says which they are; the same call tries them again.
- Fused item vectors stay fused, so the model must have learned to join. Patch tokens belong to the old model: they are
  made anew where the new one has a re-ranker that reads them, else dropped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsearch.data.images import kept_limits
from mmsearch.derive import derive_or_scan
from mmsearch.errors import ModelError
from mmsearch.ingest import Ingest
from mmsearch.opened import refuse_shards
from mmsearch.pictures import Engine, ThisProcess
from mmsearch.progress import Estimating, Progress, SilentProgress
from mmsearch.store import reindexing
from mmsearch.store.base import Change, ChangeKind
from mmsearch.store.directory import IndexStore
from mmsearch.store.imports import TEXT_UNKNOWN
from mmsearch.store.reindexing import Reindexing, Task
from mmsearch.store.tokens import remove_tokens
from mmsearch.token_fill import reranker_of, with_tokens
from mmsearch.towers.config import no_item_fusion
from mmsearch.types import BuildReport, Skipped, SkipReason

if TYPE_CHECKING:
    from mmsearch.encoder import Encodes, JoinsItems
    from mmsearch.rerank.tokens import ReadsPatches

NO_PICTURE = "only its vector is there: it was imported without a picture"
NO_TEXT = "only its vector is there: it was imported without its text"


@dataclass(frozen=True, slots=True)
class ReindexReport:
    """What a reindexing did. Counts are items; `seconds` is wall time.

    `before`, `after`: names of the models. `switched`: whether the index has the new model now. `kept`: items that
    earlier runs had encoded. `missing`: items that could not be encoded, each with its reason; with `switched` they
    were dropped, else they are why there was no switch.
    """

    index: Path
    before: str
    after: str
    switched: bool
    items: int = 0
    kept: int = 0
    encoded_images: int = 0
    encoded_texts: int = 0
    missing: tuple[Skipped, ...] = ()
    tokens: int = 0
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


def reindex(
    path: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    encoder: Encodes | None = None,
    drop_missing: bool = False,
    reranker: ReadsPatches | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    engine: Engine | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> ReindexReport:
    """Give the index at `path` another model: encode every item with it, then switch to the new rows in one step.

    `model`: see `Encoder.load` (None: the bundled one); `encoder` is used instead when given. `drop_missing`: items
    that cannot be encoded again (their file is gone, or they are imported vectors) are dropped by the switch; without
    it there is no switch while there are any. `reranker`: makes the patch tokens of an index that keeps them, instead
    of the model's own. `batch_size`: pictures per pass of the model. `workers`: decoding processes (None: one a core).
    `engine`: what decodes and encodes, as for `build`; None is this process.

    Killed at any moment the old index is whole, and the same call goes on; after the switch it brings derived files up
    to date and changes nothing else. Raises `IndexNotFoundError`, `IndexLockedError`, `IndexDamagedError`,
    `ResourceError`, `ModelError` (also for fused item vectors and a model that joins none), and `IndexMismatchError`
    when a reindexing with another model has begun.
    """
    started, told = time.perf_counter(), progress or SilentProgress()
    target = os.fspath(path)
    refuse_shards(target)
    IndexStore.stored_settings(target)  # no model is loaded for an index that is not there
    if encoder is None:
        from mmsearch.encoder import Encoder

        encoder = Encoder.load(os.fspath(model) if model is not None else None, device=device)
    with IndexStore.open(target, write=True) as store:
        joins = _joining(encoder) if store.settings.get("item_vectors") == "fused" else None
        keeps = store.settings.get("tokens") is True
        reads, notes = _tokens_of(store, encoder, reranker, device=device)
        settings = _settings(store, encoder, tokens=reads is not None)
        pipeline = _Pipeline(
            encoder, joins, batch_size=batch_size, workers=workers, engine=engine or ThisProcess(), told=told
        )
        report, new = _renew(store, pipeline, settings=settings, drop_missing=drop_missing)
        with new:
            if report.switched:
                notes = (*(notes if new is not store else ()), *derive_or_scan(new, encoder=lambda: encoder, told=told))
                if reads is None and (new is not store or not keeps):
                    remove_tokens(target)
    report = replace(report, notes=(*report.notes, *notes)) if report.switched else report
    if report.switched and reads is not None:
        filled = with_tokens(
            BuildReport(Path(target)), reads, batch_size=batch_size, workers=workers, thorough=False, progress=told
        )
        report = replace(report, tokens=filled.tokens, notes=(*report.notes, *filled.notes))
    return replace(report, seconds=time.perf_counter() - started)


def abort(path: str | os.PathLike[str]) -> bool:
    """Give up the reindexing that has begun for the index at `path`; whether there was one."""
    refuse_shards(os.fspath(path))
    return reindexing.abort(os.fspath(path))


@dataclass(frozen=True, slots=True)
class _Pipeline:
    """How items are encoded. `joins`: for fused item vectors."""

    encoder: Encodes
    joins: JoinsItems | None
    batch_size: int
    workers: int | None
    engine: Engine
    told: Progress


def _renew(
    store: IndexStore, pipeline: _Pipeline, *, settings: dict[str, Any], drop_missing: bool
) -> tuple[ReindexReport, IndexStore]:
    """Encode and switch; what happened, and the index, still open for writing."""
    encoder, before = pipeline.encoder, store.model.name
    report = ReindexReport(Path(store.path), before, encoder.identity.name, switched=True)
    if store.model.same_space(encoder.identity):
        return replace(report, notes=("the index has this model already",)), store
    identity, prepared = encoder.identity, encoder.preprocessing
    with Reindexing.begin(store, model=identity, preprocessing=prepared, settings=settings) as work:
        items, left = work.items(), work.left()
        encoded = _encode(work, pipeline, left)
        report = replace(report, kept=items - left, items=items - work.left(), **encoded)
        if report.missing and not drop_missing:
            return replace(report, switched=False), store
        return report, work.switch(settings=settings, drop=len(report.missing))  # and not one more than is listed


def _encode(work: Reindexing, pipeline: _Pipeline, left: int) -> dict[str, Any]:
    """Encode what the nested index lacks: what was encoded, and what could not be, as `ReindexReport` has them."""
    told, encoder = Estimating(pipeline.told), pipeline.encoder
    limits = kept_limits(work.store.settings)
    encoding = pipeline.engine.pictures(
        encoder, index=work.fresh.path, batch_size=pipeline.batch_size, workers=pipeline.workers, limits=limits,
        told=told,
    )  # fmt: skip
    missing: list[Skipped] = []
    with closing(encoding) as pictures:
        ingest = Ingest(work.fresh, encoder, pictures, told=told, joins=pipeline.joins)
        told.start(left, what="reindexing", unit="items")
        ingest.run(_changes(work, missing, told, fused=pipeline.joins is not None), lambda path, root: False)
    counts = ingest.counts
    return {
        "encoded_images": counts.encoded_images,
        "encoded_texts": counts.encoded_texts,
        "missing": (*missing, *ingest.skipped),
    }


def _changes(work: Reindexing, missing: list[Skipped], told: Progress, *, fused: bool) -> Iterator[Change]:
    """What is to be done, as the pipeline takes it; what has nothing to be encoded of goes to `missing`."""
    for task in work.pending():
        known = task.known
        why = NO_TEXT if known.metadata.get(TEXT_UNKNOWN) is True else ""
        if known.path is None and known.has_image and not (fused and known.captions):
            why = NO_PICTURE
        if why:
            where = f"{known.root}: {known.name}" if known.root else known.name
            missing.append(Skipped(where, SkipReason.VANISHED, why))
            told.advance(1)
            continue
        yield Change(_kind(task), task.source, task.fresh, text_changed=True)


def _kind(task: Task) -> ChangeKind:
    """Never NEW: that would look for files that moved, and here nothing has."""
    return ChangeKind.TEXT_CHANGED if task.same_picture else ChangeKind.CHANGED


def _joining(encoder: Encodes) -> JoinsItems:
    from mmsearch.encoder import JoinsItems

    if isinstance(encoder, JoinsItems) and encoder.joins_items:
        return encoder
    raise no_item_fusion(encoder.identity.name)


def _tokens_of(
    store: IndexStore, encoder: Encodes, reranker: ReadsPatches | None, *, device: str
) -> tuple[ReadsPatches | None, tuple[str, ...]]:
    """What makes the patch tokens after the switch, None for none; and what the user should know about it."""
    if store.settings.get("tokens") is not True:
        return None, ()
    try:
        return reranker or reranker_of(encoder.source, device=device), ()
    except ModelError as error:
        return None, (f"patch tokens were dropped, the new model makes none: {error}",)


def _settings(store: IndexStore, encoder: Encodes, *, tokens: bool) -> dict[str, Any]:
    """The index's own, with the new model; what else is in them stays."""
    kept = {name: value for name, value in store.settings.items() if name not in ("model", "tokens")}
    return {**kept, "model": encoder.source, **({"tokens": True} if tokens else {})}
