"""Index -> files for other programs, in bounded memory, all of them or none.

| format | files |
|---|---|
| clip-retrieval | `img_emb/img_emb_0000.npy`, `text_emb/...`, `metadata/metadata_0000.parquet`, rows side by side |
| parquet, arrow | `part_0000.parquet`: an item a row, vectors in columns |
| npy | `image_0000.npy`, `text_0000.npy`, with the ids and facts of their rows in `....ids.jsonl` |
| faiss | `image.faiss`, `text.faiss`, flat, half precision, inner product; ids and facts in `....ids.jsonl` |

Decisions:
- One generation is written, whatever a writer does meanwhile, and its rows are checked before they are copied.
- Everything is written beside the target under a name of its own and renamed at the end: a folder of that name is a
  whole export. What a killed export left is removed by the next one to the same target.
- Rows that are dead, and items that were skipped, are not exported.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import InputError, MissingExtraError, UsageError
from mmsearch.exchange.base import rows_at_once
from mmsearch.exchange.npy_out import JsonLinesFile, NpyShards, beside, image_entry, text_entry
from mmsearch.exchange.pages import Page, pages
from mmsearch.exchange.reports import ExportReport
from mmsearch.index.faiss_files import flat_file
from mmsearch.opened import refuse_shards
from mmsearch.progress import Progress, SilentProgress
from mmsearch.store.directory import IndexStore
from mmsearch.store.disk import Disk, os_guard
from mmsearch.store.records import refuse_damage
from mmsearch.store.snapshot import DirectorySnapshot
from mmsearch.types import Modality

if TYPE_CHECKING:
    from mmsearch.exchange.arrow_out import Shard

FORMATS = ("clip-retrieval", "npy", "parquet", "arrow", "faiss")
MODALITIES = ("image", "text", "both")
ROWS_PER_FILE = 250_000
_MARK = ".mmsearch-export"


@dataclass(slots=True)
class _Job:
    """What is exported, and where to; totals as they grow."""

    snapshot: DirectorySnapshot
    folder: str
    images: bool
    texts: bool
    rows_per_file: int
    told: Progress
    image_rows: int = 0
    text_rows: int = 0

    def pages(self, *, images: bool, texts: bool) -> Iterator[Page]:
        """Pages of what is exported, counted."""
        for page in pages(self.snapshot, size=rows_at_once(self.snapshot.dim), images=images, texts=texts):
            yield page
            self.image_rows += int(page.has_image.sum())
            self.text_rows += len(page.texts)
            self.told.advance(int(page.has_image.sum()) + len(page.texts))


def export_vectors(
    index: str | os.PathLike[str],
    to: str | os.PathLike[str],
    *,
    format: str,
    modality: str = "both",
    rows_per_file: int = ROWS_PER_FILE,
    progress: Progress | None = None,
) -> ExportReport:
    """Write the vectors of the index at `index`, with ids, captions and metadata, into the new folder `to`.

    `format`: see above. `modality`: vectors of pictures ("image"), of texts ("text"), or "both". `rows_per_file`: items
    in a file, where the format has several files. Vectors keep the very bits they have in the index.
    Raises `UsageError`, `InputError` (there is something at `to`, or nothing to export), `IndexDamagedError`,
    `MissingExtraError`, `ResourceError`.
    """
    started = time.perf_counter()
    write = _writer(format, modality, rows_per_file)
    target = os.path.abspath(os.path.expanduser(os.fspath(to)))
    refuse_shards(os.fspath(index))
    with os_guard(target), IndexStore.open(os.fspath(index)) as store, store.snapshot() as snapshot:
        wanted = [one for one in Modality if modality in ("both", one.value)]
        total = sum(snapshot.count(one) for one in wanted)
        if not total:
            raise InputError(store.path, expected=f"vectors ({modality})", got="none")
        folder = _begin(target)
        try:
            job = _Job(
                snapshot, folder, images=Modality.IMAGE in wanted, texts=Modality.TEXT in wanted,
                rows_per_file=rows_per_file, told=progress or SilentProgress(),
            )  # fmt: skip
            job.told.start(total, what=f"exporting {os.path.basename(store.path)}", unit="rows")
            refuse_damage(snapshot)
            write(job)
            files, size = _finish(folder, target)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return ExportReport(
        Path(target), format, image_rows=job.image_rows, text_rows=job.text_rows,
        files=files, bytes=size, seconds=time.perf_counter() - started,
    )  # fmt: skip


def _writer(format: str, modality: str, rows_per_file: int) -> Callable[[_Job], None]:
    if modality not in MODALITIES:
        raise UsageError("modality", expected=" or ".join(MODALITIES), got=modality)
    if rows_per_file < 1:
        raise UsageError("rows per file", expected="1 or more", got=str(rows_per_file))
    if format not in FORMATS:
        raise UsageError("format", expected=" or ".join(FORMATS), got=format)
    if format in ("npy", "faiss"):
        return _write_npy if format == "npy" else _write_faiss
    if importlib.util.find_spec("pyarrow") is None:
        raise MissingExtraError(f"format {format}", package="pyarrow", extra="parquet")
    return lambda job: _write_shards(job, format)


def _begin(target: str) -> str:
    """The folder to write into, beside the target; `InputError` when something is at the target."""
    if os.path.lexists(target) and (not os.path.isdir(target) or os.listdir(target)):
        got = "one with files in it" if os.path.isdir(target) else "a file"
        raise InputError(target, expected="a folder that is not there yet", got=got, do="Choose another place.")
    folder = f"{target}.part"
    if os.path.lexists(folder):
        if not os.path.isfile(os.path.join(folder, _MARK)):
            raise InputError(folder, expected="no such folder", got="one that no export left", do="Move it away.")
        shutil.rmtree(folder)
    os.makedirs(folder)
    Path(folder, _MARK).touch()
    return folder


def _finish(folder: str, target: str) -> tuple[int, int]:
    """Make the files durable and give the folder its name: how many files, and their bytes."""
    disk, files, size = Disk(), 0, 0
    for inside, _, names in os.walk(folder, topdown=False):
        for name in set(names) - {_MARK}:
            descriptor = os.open(os.path.join(inside, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
                files, size = files + 1, size + os.fstat(descriptor).st_size
            finally:
                os.close(descriptor)
        disk.sync_dir(inside)
    os.rename(folder, target)
    os.unlink(os.path.join(target, _MARK))  # last: killed before, a folder of that name is still known as an export
    disk.sync_dir(target)
    disk.sync_dir(os.path.dirname(target))
    return files, size


def _write_shards(job: _Job, format: str) -> None:
    """Formats whose files hold items: a new one after so many of them."""
    from mmsearch.exchange.arrow_out import ClipShard, TableShard

    dim = job.snapshot.dim

    def open_shard(number: int) -> Shard:
        if format == "clip-retrieval":
            return ClipShard(job.folder, number, dim=dim, images=job.images, texts=job.texts)
        return TableShard(job.folder, number, dim=dim, ending=format, images=job.images, texts=job.texts)

    shard, number, room = open_shard(0), 0, job.rows_per_file
    try:
        for page in job.pages(images=job.images, texts=job.texts):
            start = 0
            while start < len(page):
                if room == 0:
                    shard.close()
                    number, room = number + 1, job.rows_per_file
                    shard = open_shard(number)
                stop = min(start + room, len(page))
                shard.add(page.piece(start, stop))
                start, room = stop, room - (stop - start)
    finally:
        shard.close()


def _rows(job: _Job, modality: Modality) -> Iterator[tuple[NDArray[np.float16], list[dict[str, Any]]]]:
    """The vectors of a modality, page by page, and what is known of each."""
    pictures = modality is Modality.IMAGE
    for page in job.pages(images=pictures, texts=not pictures):
        if pictures:
            yield page.images, [image_entry(record) for record in page.records]
        else:
            places = zip(page.text_of.tolist(), page.text_part.tolist(), strict=True)
            yield page.texts, [text_entry(page.records[place], part) for place, part in places]


def _modalities(job: _Job) -> list[Modality]:
    wanted = [Modality.IMAGE] * job.images + [Modality.TEXT] * job.texts
    return [one for one in wanted if job.snapshot.count(one)]


def _write_npy(job: _Job) -> None:
    """Pairs of files for so many vectors of a modality."""
    for modality in _modalities(job):
        shards = NpyShards(job.folder, modality.value, dim=job.snapshot.dim, most=job.rows_per_file)
        try:
            for rows, entries in _rows(job, modality):
                shards.add(rows, entries)
        finally:
            shards.close()


def _write_faiss(job: _Job) -> None:
    """One flat file a modality, and its ids."""
    for modality in _modalities(job):
        path = os.path.join(job.folder, f"{modality.value}.faiss")
        lines = JsonLinesFile(beside(path))
        try:
            with open(path, "wb") as file:
                count = job.snapshot.count(modality)
                for chunk in flat_file(_noted(_rows(job, modality), lines), dim=job.snapshot.dim, count=count):
                    file.write(chunk)
        finally:
            lines.close()


def _noted(
    rows: Iterator[tuple[NDArray[np.float16], list[dict[str, Any]]]], lines: JsonLinesFile
) -> Iterator[NDArray[np.float16]]:
    for vectors, entries in rows:
        for entry in entries:
            lines.add(entry)
        yield vectors
