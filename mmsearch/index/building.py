"""Making and growing a FAISS index of stored rows, in bounded memory and so that a kill costs a minute of adding.

Decisions:
- What is learned (centroids, code books) comes from a random sample; rows are then added piece by piece.
- A long build leaves checkpoints in its work folder: the index so far and the row to go on with. The first is written a
  minute after the beginning, the next when a minute has gone since and ten times as long as the last one took, so
  checkpoints cost a tenth at most. Training is done again when it is interrupted; it takes minutes at most.
- Nothing in the work folder is trusted: it counts only for the same layout of the same vector file, with its checksum.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from mmsearch.errors import IndexDamagedError, ResourceError, UsageError
from mmsearch.index import centroids
from mmsearch.index.approximate import lists_of, read_file
from mmsearch.index.exact_answers import in_pieces
from mmsearch.index.layouts import Layout
from mmsearch.progress import Progress
from mmsearch.types import Embeddings, Rows

_AT_ONCE = 1 << 16
_FIRST_CHECKPOINT_S = 60.0
_CHECKPOINT_SHARE = 10.0
_SEED = 20261126
_PIECE = 1 << 20


class StoredRows(Protocol):
    """What is needed of the rows; see `store.derived.DerivedRows`."""

    @property
    def dim(self) -> int:
        """d."""
        ...

    @property
    def count(self) -> int:
        """n."""
        ...

    @property
    def vectors_path(self) -> str:
        """The file they are in."""
        ...

    @property
    def work(self) -> str:
        """A folder for what is half made."""
        ...

    def blocks(self, start: int = 0) -> Iterator[tuple[int, NDArray[np.float16]]]:
        """(first row, (b, d)) from row `start` on."""
        ...

    def vectors(self, rows: Rows) -> Embeddings:
        """(m,) -> (m, d) float32."""
        ...

    def sample(self, n: int, *, seed: int) -> Rows:
        """At most n rows that are alive."""
        ...


@dataclass(frozen=True, slots=True)
class Built:
    """An index with every row in it. `trained_seconds`, `added_seconds`: of this run; `resumed`: rows it found."""

    index: Any
    trained_seconds: float
    added_seconds: float
    resumed: int


def build(layout: Layout, rows: StoredRows, *, told: Progress, checkpoint_s: float = _FIRST_CHECKPOINT_S) -> Built:
    """A new index of all rows, going on from a checkpoint where there is one.

    `UsageError` when FAISS does not take the layout; `ResourceError` when memory runs out.
    """
    checkpoint = Checkpoint(rows.work, key=_key(layout, rows), every_s=checkpoint_s)
    with out_of_memory(layout):
        index, start, done = checkpoint.load()
        began = time.perf_counter()
        if index is None:
            index = trained(layout, rows, told=told)
        trained_seconds = time.perf_counter() - began
        told.start(rows.count - done, what=f"adding rows to the index ({layout.kind})", unit="rows")
        began = time.perf_counter()
        add(index, rows, start=start, told=told, checkpoint=checkpoint)
    return Built(index, trained_seconds, time.perf_counter() - began, done)


def trained(layout: Layout, rows: StoredRows, *, told: Progress) -> Any:  # noqa: ANN401 - faiss has no types
    """An empty index that has learned from a sample of the rows; one seed, so it is the same each time."""
    import faiss

    try:
        index = faiss.index_factory(rows.dim, layout.factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UsageError(
            "index kind", expected=f"a FAISS factory string for d = {rows.dim}", got=layout.factory,
            do="See FAISS's wiki, 'The index factory'.",
        ) from error  # fmt: skip
    if not index.is_trained:
        sample = rows.vectors(rows.sample(layout.train_rows, seed=_SEED))
        told.start(None, what=f"training {layout.factory} on {len(sample):,} rows", unit="")
        inverted: Any = faiss.downcast_index(index)  # behind a transformation rows would be others
        if layout.lists >= centroids.FROM <= len(sample) and isinstance(inverted, faiss.IndexIVF):
            inverted.quantizer.add(centroids.two_level(sample, layout.lists))
        _settle(faiss.downcast_index(faiss.try_extract_index_ivf(index) or index))
        try:
            index.train(sample)
        except RuntimeError as error:
            raise UsageError(
                "index kind", expected=f"one that can learn from {len(sample):,} rows", got=layout.factory,
                do="Choose another kind, or 'auto'.",
            ) from error  # fmt: skip
    return index


def _settle(index: Any) -> None:  # noqa: ANN401 - faiss has no types
    """How it learns: quickly enough, from one seed, without FAISS's warnings of few rows, which are not a mistake."""
    if hasattr(index, "cp"):
        index.cp.niter, index.cp.seed, index.cp.min_points_per_centroid = 10, 1234, 1
    if hasattr(index, "pq"):
        index.pq.cp.min_points_per_centroid = 1
    if hasattr(index, "do_polysemous_training"):
        index.do_polysemous_training = False  # minutes of annealing for a sort of search that is not used here


def add(
    index: Any,  # noqa: ANN401 - faiss has no types
    rows: StoredRows,
    *,
    start: int,
    told: Progress,
    checkpoint: Checkpoint | None = None,
) -> int:
    """Add every row from `start` on; how many. With inverted lists they go by their row numbers."""
    import faiss

    by_rows, added = lists_of(index) > 0, 0
    innermost = faiss.try_extract_index_ivf(index)
    if innermost is not None:
        coarse = faiss.downcast_index(innermost.quantizer)
        if isinstance(coarse, faiss.IndexHNSW):
            coarse.hnsw.efSearch = 64  # the nearest list, nearly always
    for numbers, wide in in_pieces(rows.blocks(start), _AT_ONCE):
        if by_rows:
            index.add_with_ids(wide, numbers)
        else:
            index.add(wide)
        added += len(wide)
        told.advance(len(wide))
        if checkpoint is not None:
            checkpoint.maybe_save(index, int(numbers[-1]) + 1)
    return added


class Checkpoint:
    """The index so far, in a folder. `key`: what it must be of to count."""

    def __init__(self, folder: str, *, key: str, every_s: float) -> None:
        self._folder, self._key, self._every = folder, key, every_s
        self._facts = os.path.join(folder, "partial.json")
        self._last, self._cost = time.perf_counter(), 0.0

    def load(self) -> tuple[Any, int, int]:
        """(index, the row to go on with, rows in it); (None, 0, 0) where there is none to rely on."""
        try:
            facts = json.loads(Path(self._facts).read_text(encoding="utf-8"))
            file = os.path.join(self._folder, os.path.basename(facts["file"]))
            if facts["key"] != self._key or facts["xxh3"] != _digest(file):
                return None, 0, 0
            index = read_file(file, mapped=False)
            return index, int(facts["next"]), int(index.ntotal)
        except (OSError, ValueError, KeyError, TypeError, IndexDamagedError):
            return None, 0, 0

    def maybe_save(self, index: Any, next_row: int) -> None:  # noqa: ANN401 - faiss has no types
        """Save when it is worth it: see the module's decisions."""
        since = time.perf_counter() - self._last
        if since < self._every or since < _CHECKPOINT_SHARE * self._cost:
            return
        began = time.perf_counter()
        name = f"partial-{next_row}.faiss"  # another name than the last: that one counts until the facts name this one
        file = os.path.join(self._folder, name)
        write_file(index, file)
        facts = {"key": self._key, "next": next_row, "file": name, "xxh3": _digest(file)}
        temporary = self._facts + ".tmp"
        Path(temporary).write_text(json.dumps(facts), encoding="utf-8")
        os.replace(temporary, self._facts)
        for other in Path(self._folder).glob("partial-*.faiss"):
            if other.name != name:
                other.unlink()
        self._last = time.perf_counter()
        self._cost = self._last - began


def write_file(index: Any, path: str) -> None:  # noqa: ANN401 - faiss has no types
    """FAISS's own format, whole or not at all; `ResourceError` when the disk is full."""
    import faiss

    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = path + ".tmp"
    try:
        with open(temporary, "wb") as file:
            faiss.write_index(index, temporary if temporary.isprintable() else f"/dev/fd/{file.fileno()}")
        os.replace(temporary, path)
    except (RuntimeError, OSError) as error:
        free = shutil.disk_usage(os.path.dirname(path)).free
        raise ResourceError(
            path, got=f"{str(error).strip().splitlines()[-1][:150]}, {free:,} bytes free",
            do="The rows are safe. Make room, then run it again.",
        ) from error  # fmt: skip


def pieces_of(index: Any, path: str) -> tuple[int, Iterator[bytes]]:  # noqa: ANN401 - faiss has no types
    """(size, bytes in pieces) of an index's file, by way of one at `path`, which goes with the last piece."""
    write_file(index, path)

    def pieces() -> Iterator[bytes]:
        with open(path, "rb") as file:
            while piece := file.read(_PIECE):
                yield piece
        Path(path).unlink(missing_ok=True)

    return os.path.getsize(path), pieces()


class out_of_memory:  # noqa: N801 - reads as the statement it is used in
    """Turns FAISS's and numpy's failed allocations into a `ResourceError` that says what would help."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "bad_alloc" in str(error)):
            raise ResourceError(
                f"index kind {self._layout.kind}", got="no memory left",
                do="The rows are safe. Give --memory a budget, or split the collection.",
            ) from error  # fmt: skip


def _key(layout: Layout, rows: StoredRows) -> str:
    facts: Mapping[str, Any] = {
        "factory": layout.factory,
        "vectors": os.path.basename(rows.vectors_path),
        "d": rows.dim,
    }
    return str(xxhash.xxh3_64_hexdigest(json.dumps(facts, sort_keys=True).encode()))


def _digest(path: str) -> str:
    state = xxhash.xxh3_64()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            state.update(piece)
    return str(state.hexdigest())
