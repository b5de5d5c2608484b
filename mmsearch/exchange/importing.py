"""Vectors from files -> index, in bounded memory, each block one durable commit.

Decisions:
- Memory is a few blocks (at most 40,000 rows and 64 MiB of vectors each), whatever the size of a source; lists of what
  was skipped are cut off, counts are not.
- A source whose rows are new to the index is read once from its beginning. How far that is, is committed with the rows:
  a run that was killed goes on there, and the index ends as if it had not been.
- A source that is known and has changed is compared row by row: what is equal costs no new row, what it no longer holds
  is removed once it was read to its end.
- A source that is unchanged and complete costs a look at its files' stamps.
- A picture's path counts only where there is such a file here; else it is kept in the metadata: a hit without a path is
  shown, one whose file is gone is not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmsearch.errors import PartialError, UsageError
from mmsearch.exchange.base import Reading, VectorSource, rows_at_once
from mmsearch.exchange.comparing import Comparison
from mmsearch.exchange.incoming import Counts, Incoming
from mmsearch.exchange.reports import ImportReport
from mmsearch.exchange.sources import open_source
from mmsearch.exchange.space import Space, check_dim, check_known, open_index, space_of
from mmsearch.index.layouts import EXACT
from mmsearch.progress import Estimating, Progress, SilentProgress
from mmsearch.store.base import Batch
from mmsearch.store.directory import IndexStore
from mmsearch.store.imports import Imported, imports_fact, imports_of
from mmsearch.store.records import count_below
from mmsearch.store.snapshot import DirectorySnapshot
from mmsearch.types import Modality

if TYPE_CHECKING:
    from mmsearch.encoder import Encodes


def import_vectors(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    encoder: Encodes | None = None,
    space: str | None = None,
    ids: str | os.PathLike[str] | None = None,
    id_column: str | None = None,
    vector_column: str | None = None,
    modality: str | None = None,
    strict: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> ImportReport:
    """Bring the vectors at `paths` into the index at `out`, which is made if need be. See `sources` for what is read.

    `model`: whose vectors they are, as for `Encoder.load`; `encoder` instead, when it is loaded already. `space`: a
    name for vectors of a model that mmsearch does not know. Neither: they are the index's own, for a new index unknown.
    `ids`: a file with the ids (or more) of the rows of one `.npy` or FAISS file. `modality`: "image" or "text", what
    plain vectors were made of (default image). `strict`: a `PartialError` when something was skipped, after the rest.

    Stopped at any moment, the same call goes on where it stopped. Raises `InputError`, `UsageError`,
    `IndexMismatchError` (vectors of another model or dimension), `MissingExtraError`, `ResourceError`.
    """
    started, told = time.perf_counter(), Estimating(progress or SilentProgress())
    target = os.fspath(out)
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not given:
        raise UsageError("import", expected="at least one path", got="none", do="Name files or folders of vectors.")
    reading = Reading(
        ids=None if ids is None else os.fspath(ids), id_column=id_column, vector_column=vector_column, modality=modality
    )
    if reading.ids is not None and len(given) > 1:
        raise UsageError("--ids", expected="one file of vectors", got=f"{len(given)} paths")
    sources = [open_source(os.fspath(path), reading) for path in given]
    named = None if model is None else os.fspath(model)
    whose = space_of(target, sources[0].dim, model=named, encoder=encoder, space=space, device=device)
    for source in sources:
        check_dim(whose, source.dim, where=source.path)
    counts = Counts(notes=[note for source in sources for note in source.notes])
    if not _nothing_to_do(target, sources, whose, counts=counts):
        _import(target, sources, whose, counts=counts, told=told)
    report = replace(counts.report(Path(target)), seconds=time.perf_counter() - started)
    if strict and report.skipped_count:
        raise PartialError(
            f"{report.skipped_count} vectors were skipped", got=f"{report.skipped[0].path}: {report.skipped[0].detail}",
            do="The rest is in the index; drop --strict to accept this.",
        )  # fmt: skip
    return report


def _import(target: str, sources: Sequence[VectorSource], whose: Space, *, counts: Counts, told: Progress) -> None:
    with open_index(target, whose) as store:
        for source in sources:
            check_known(store, source, whose)
        for source in sources:
            SourceImport(store, source, counts=counts, told=told).run()
        store.compact()
        _derive(store, whose, told)


def _nothing_to_do(target: str, sources: Sequence[VectorSource], whose: Space, *, counts: Counts) -> bool:
    """Whether the index has all of this already, and is finished; then it is counted. Takes no lock."""
    if not IndexStore.exists(target):
        return False
    with IndexStore.open(target) as store, store.snapshot() as snapshot:
        manifest, known = snapshot.manifest, imports_of(snapshot)
        done = (
            snapshot.model.same_space(whose.model)
            and manifest is not None
            and manifest.generation == snapshot.generation
            and all(_is_laid_out(store, snapshot, one) for one in Modality)
            and all(_is_complete(known.get(source.root), source) for source in sources)
            and all(known[source.root].items == count_below(snapshot, source.root) for source in sources)
        )
        for source in sources if done else ():
            counts.unchanged += source.count - known[source.root].skipped
            counts.remember(known[source.root].skipped, snapshot, source.root)
    return done


def _is_laid_out(store: IndexStore, snapshot: DirectorySnapshot, modality: Modality) -> bool:
    """Whether searches of that modality have what they are to use; for some kinds, and for no rows, that is nothing."""
    scanned = store.settings.get("index", {}).get("kind") == EXACT or not snapshot.count(modality)
    return scanned or snapshot.derived(modality) is not None


def _is_complete(record: Imported | None, source: VectorSource) -> bool:
    return record is not None and record.complete and record.fingerprint == source.fingerprint


class SourceImport:
    """The import of one source into a store that is open for writing."""

    def __init__(self, store: IndexStore, source: VectorSource, *, counts: Counts, told: Progress) -> None:
        self._store, self._source, self._counts, self._told = store, source, counts, told
        with store.snapshot() as snapshot:
            self._others = imports_of(snapshot)
            self._items = count_below(snapshot, source.root)
            self._shares = snapshot.execute("SELECT 1 FROM items WHERE root <> ? LIMIT 1", (os.fsencode(source.root),))
        self._record = self._others.pop(source.root, None)
        self._skipped = 0

    def run(self) -> None:
        """Read what is not in the store yet, and commit it block by block."""
        record, source = self._record, self._source
        fits = record is not None and record.fingerprint == source.fingerprint and record.items == self._items
        if fits and record is not None:
            self._resume(record)
        elif self._items == 0:
            self._read(0, None)
        else:
            self._compare()

    def _resume(self, record: Imported) -> None:
        """Go on behind what is there, if there is more."""
        self._skipped = record.skipped
        with self._store.snapshot() as snapshot:
            self._counts.remember(record.skipped, snapshot, self._source.root)
        if record.complete:
            self._counts.unchanged += self._source.count - record.skipped
            return
        self._counts.resumed += record.rows
        self._told.note(f"{self._source.path}: going on at row {record.rows:,} of {self._source.count:,}")
        self._read(record.rows, None)

    def _compare(self) -> None:
        """Bring known items up to date; what is stored of the source's progress does not count meanwhile."""
        if self._record is not None:
            self._store.commit(Batch(facts=imports_fact(self._others)))
        self._told.note(f"{self._source.path}: comparing with the {self._items:,} items that the index has of it")
        with self._store.snapshot() as snapshot:
            comparison = Comparison(snapshot, self._source.root)
        self._read(0, comparison)
        for removals in comparison.unseen(self._store):
            self._items -= len(removals)
            self._counts.removed += len(removals)
            self._store.commit(Batch(removals=removals))
        self._store.commit(Batch(facts=self._facts(self._source.count, done=True)))

    def _read(self, start: int, comparison: Comparison | None) -> None:
        source, began = self._source, time.perf_counter()
        self._told.start(source.count - start, what=f"importing {os.path.basename(source.path)}", unit="rows")
        incoming = Incoming(source, counts=self._counts, shares_ids=bool(self._shares))
        done = start
        for label, first, block in source.blocks(start, rows_at_once(source.dim)):
            skipped = self._counts.skipped
            with self._store.snapshot() as snapshot:
                batch, new = incoming.batch(block, snapshot, label=label, first=first, comparison=comparison)
            done += len(block)
            self._items += new
            self._skipped += self._counts.skipped - skipped
            if comparison is None:
                batch.facts.update(self._facts(done, done=done == source.count))
            self._store.commit(batch)
            self._counts.rows += len(block)
            self._told.advance(len(block))
            del batch, block  # before the next one is read
        incoming.close()
        self._counts.read_seconds += time.perf_counter() - began

    def _facts(self, rows: int, *, done: bool) -> dict[str, str]:
        entry = Imported(
            self._source.fingerprint, rows=rows, items=self._items, skipped=self._skipped, complete=done,
            space=self._store.model.weights,
        )  # fmt: skip
        return imports_fact({**self._others, self._source.root: entry})


def _derive(store: IndexStore, whose: Space, told: Progress) -> None:
    """Write the files that searches use; the one place where an import does."""
    from mmsearch.derive import derive

    derive(store, encoder=whose.encoder, told=told)
