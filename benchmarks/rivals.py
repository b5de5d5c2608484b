"""Other libraries behind one seam: built from blocks of rows, opened from disk, asked for the k nearest.

Needs numpy and the one library that is asked for, so that each can live in an environment of its own. Settings are
what a library searches harder with; those of the HNSW libraries are `ef`, and all have M = 32, efConstruction = 200.
Rows come as fp16 blocks of unit rows; libraries that hold float32 are given float32.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]
Setting = int | str | tuple[int, ...]

LINKS, EFFORT = 32, 200
EF = (10, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)


class Base:
    """The rows of a base.npy, read piece by piece: a mapped file would count as memory of whoever reads it."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            shape, _, self.dtype = np.lib.format.read_array_header_1_0(file)
            self._start = file.tell()
        self.path, self.count, self.dim = path, int(shape[0]), int(shape[1])

    def blocks(self, size: int = 1 << 16) -> Iterator[tuple[int, NDArray[np.float16]]]:
        """(first row, (b, d) fp16)."""
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._start)
            for start in range(0, self.count, size):
                rows = min(size, self.count - start)
                yield start, np.fromfile(file, self.dtype, rows * self.dim).reshape(rows, self.dim)

    def whole(self) -> Floats:
        """All rows at once, (n, d) float32."""
        rows = np.empty((self.count, self.dim), np.float32)
        for start, block in self.blocks():
            rows[start : start + len(block)] = block
        return rows


class Rival(Protocol):
    """One library."""

    @property
    def modules(self) -> Sequence[str]:
        """What it imports before it opens anything."""
        ...

    @property
    def settings(self) -> Sequence[Setting]:
        """From careless to thorough; known once an index is open."""
        ...

    def build(self, base: Base, folder: Path, *, threads: int, memory: int) -> dict[str, Any]:
        """Write an index of all rows to `folder`; what there is to say about it. `memory`: bytes it may take."""
        ...

    def open(self, folder: Path) -> None:
        """Make the index in `folder` ready for its first query."""
        ...

    def search(self, queries: Floats, k: int, *, setting: Setting, threads: int) -> Rows:
        """(q, d) -> (q, k), best first."""
        ...


class Hnswlib:
    """hnswlib, float32. It can only be read whole."""

    modules = ("hnswlib",)
    settings: Sequence[Setting] = EF

    def build(self, base: Base, folder: Path, *, threads: int, memory: int) -> dict[str, Any]:
        """See `Rival.build`; `memory` is not something it can be told."""
        import hnswlib

        index = hnswlib.Index(space="ip", dim=base.dim)
        index.init_index(max_elements=base.count, M=LINKS, ef_construction=EFFORT, random_seed=0)
        for start, rows in base.blocks():
            index.add_items(rows.astype(np.float32), np.arange(start, start + len(rows)), num_threads=threads)
        index.save_index(str(folder / "index.bin"))
        np.save(folder / "dim.npy", base.dim)
        return {}

    def open(self, folder: Path) -> None:
        """See `Rival.open`."""
        import hnswlib

        self._index = hnswlib.Index(space="ip", dim=int(np.load(folder / "dim.npy")))
        self._index.load_index(str(folder / "index.bin"))

    def search(self, queries: Floats, k: int, *, setting: Setting, threads: int) -> Rows:
        """See `Rival.search`."""
        self._index.set_ef(setting)
        return np.asarray(self._index.knn_query(queries, k=k, num_threads=threads)[0], np.int64)


class Usearch:
    """usearch, bfloat16, opened mapped (`view`)."""

    modules = ("usearch.index",)
    settings: Sequence[Setting] = EF

    def build(self, base: Base, folder: Path, *, threads: int, memory: int) -> dict[str, Any]:
        """See `Rival.build`; `memory` is not something it can be told."""
        from usearch.index import Index

        index = Index(ndim=base.dim, metric="ip", dtype="bf16", connectivity=LINKS, expansion_add=EFFORT)
        for start, rows in base.blocks():
            index.add(np.arange(start, start + len(rows)), rows.astype(np.float32), threads=threads)
        index.save(str(folder / "index.usearch"))
        return {"hardware": index.hardware_acceleration}

    def open(self, folder: Path) -> None:
        """See `Rival.open`."""
        from usearch.index import Index

        index = Index.restore(str(folder / "index.usearch"), view=True)
        if index is None:
            raise SystemExit(f"{folder}: usearch cannot open what it saved")
        self._index = index

    def search(self, queries: Floats, k: int, *, setting: Setting, threads: int) -> Rows:
        """See `Rival.search`."""
        self._index.expansion_search = setting  # type: ignore[misc, assignment]
        return np.asarray(self._index.search(queries, k, threads=threads).keys, np.int64).reshape(len(queries), k)


class Voyager:
    """voyager, float32. It can only be read whole."""

    modules = ("voyager",)
    settings: Sequence[Setting] = EF

    def build(self, base: Base, folder: Path, *, threads: int, memory: int) -> dict[str, Any]:
        """See `Rival.build`; `memory` is not something it can be told."""
        import voyager

        index = voyager.Index(
            voyager.Space.Cosine, base.dim, M=LINKS, ef_construction=EFFORT, random_seed=1, max_elements=base.count
        )
        for start, rows in base.blocks():
            ids = np.arange(start, start + len(rows))
            index.add_items(rows.astype(np.float32), ids.tolist(), num_threads=threads)
        index.save(str(folder / "index.voy"))
        return {}

    def open(self, folder: Path) -> None:
        """See `Rival.open`."""
        import voyager

        self._index = voyager.Index.load(str(folder / "index.voy"))

    def search(self, queries: Floats, k: int, *, setting: Setting, threads: int) -> Rows:
        """See `Rival.search`."""
        ef = max(int(setting), k) if isinstance(setting, int) else k
        return np.asarray(self._index.query(queries, k, num_threads=threads, query_ef=ef)[0], np.int64)


class Scann:
    """scann: a tree of about 2 sqrt(n) leaves, hashed two dimensions a block, reordered with float32."""

    modules = ("scann.scann_ops.py.scann_ops_pybind",)
    settings: tuple[Setting, ...] = tuple((leaves, 10 * leaves) for leaves in (4, 8, 12, 16, 24, 32, 48, 64, 96, 128))
    settings += ((192, 1000), (256, 1000), (384, 1000), (512, 1500))

    def build(self, base: Base, folder: Path, *, threads: int, memory: int) -> dict[str, Any]:
        """See `Rival.build`; it takes all rows at once, and `memory` is not something it can be told."""
        from scann.scann_ops.py import scann_ops_pybind

        leaves = max(int(2 * base.count**0.5), 16)
        # 0.2 is the threshold that its authors' guide names for unit rows and inner products.
        searcher = (
            scann_ops_pybind.builder(base.whole(), 10, "dot_product")
            .tree(leaves, leaves // 20, training_sample_size=min(base.count, 250_000))
            .score_ah(2, anisotropic_quantization_threshold=0.2)
            .reorder(100)
            .set_n_training_threads(threads)
            .build()
        )
        searcher.serialize(str(folder), relative_path=True)
        return {"leaves": leaves}

    def open(self, folder: Path) -> None:
        """See `Rival.open`."""
        from scann.scann_ops.py import scann_ops_pybind

        self._searcher = scann_ops_pybind.load_searcher(str(folder))

    def search(self, queries: Floats, k: int, *, setting: Setting, threads: int) -> Rows:
        """See `Rival.search`."""
        if not isinstance(setting, tuple):
            raise TypeError(setting)
        leaves, reorder = setting
        if threads == 1:
            lines = [self._searcher.search(query, k, reorder, leaves)[0] for query in queries]
            return np.asarray(lines, np.int64)
        self._searcher.set_num_threads(threads)
        # Its pool is fed with batches; with one batch a thread both are busy to the end.
        found = self._searcher.search_batched_parallel(queries, k, reorder, leaves, -(-len(queries) // (4 * threads)))
        return np.asarray(found[0], np.int64)


class Autofaiss:
    """autofaiss: kind and search parameters as it chooses for the memory; the same index also with others."""

    modules = ("faiss",)

    def build(self, base: Base, folder: Path, *, threads: int, memory: int) -> dict[str, Any]:
        """See `Rival.build`."""
        import autofaiss

        rows = folder / "rows"  # it takes a folder of files, and all that are in it
        rows.mkdir()
        os.link(base.path, rows / "base.npy")
        _, infos = autofaiss.build_index(
            str(rows),
            index_path=str(folder / "knn.index"),
            index_infos_path=str(folder / "infos.json"),
            max_index_memory_usage=f"{memory / 1e9:.2f}G",
            current_memory_available=f"{max(memory / 1e9 * 2, 8):.2f}G",
            nb_cores=threads,
            verbose=30,
        )
        shutil.rmtree(rows)
        chosen = {name: infos[name] for name in ("index_key", "index_param") if name in infos}
        (folder / "chosen.txt").write_text(str(chosen.get("index_param", "")))
        return chosen

    def open(self, folder: Path) -> None:
        """See `Rival.open`."""
        import faiss

        self._index = faiss.read_index(str(folder / "knn.index"), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        chosen = (folder / "chosen.txt").read_text()
        graph = isinstance(faiss.downcast_index(self._index), faiss.IndexHNSW)
        swept = (f"efSearch={ef}" for ef in EF) if graph else (f"nprobe={n}" for n in (4, 8, 16, 32, 64, 128, 256))
        self.settings: Sequence[Setting] = [*swept, *([chosen] if chosen else [])]

    def search(self, queries: Floats, k: int, *, setting: Setting, threads: int) -> Rows:
        """See `Rival.search`."""
        import faiss

        faiss.omp_set_num_threads(threads)
        faiss.ParameterSpace().set_index_parameters(self._index, str(setting))  # type: ignore[arg-type]
        return np.asarray(self._index.search(queries, k)[1], np.int64)


class Numpy:
    """Brute force: a float32 file, mapped, multiplied block by block. Needs threadpoolctl to keep to its threads."""

    modules = ("threadpoolctl",)
    settings: tuple[Setting, ...] = (0,)

    def build(self, base: Base, folder: Path, *, threads: int, memory: int) -> dict[str, Any]:
        """See `Rival.build`."""
        rows = np.lib.format.open_memmap(folder / "rows.npy", mode="w+", dtype=np.float32, shape=(base.count, base.dim))
        for start, block in base.blocks():
            rows[start : start + len(block)] = block
        return {}

    def open(self, folder: Path) -> None:
        """See `Rival.open`."""
        self._rows: Floats = np.load(folder / "rows.npy", mmap_mode="r")

    def search(self, queries: Floats, k: int, *, setting: Setting, threads: int) -> Rows:
        """See `Rival.search`."""
        from threadpoolctl import threadpool_limits

        with threadpool_limits(threads):
            parts = [self._part(queries, start, k) for start in range(0, len(self._rows), 1 << 15)]
        scores, rows = (np.concatenate([part[i] for part in parts], axis=1) for i in (0, 1))
        order = np.argsort(-scores, axis=1)[:, :k]
        return np.take_along_axis(rows, order, 1).astype(np.int64)

    def _part(self, queries: Floats, start: int, k: int) -> tuple[Floats, Rows]:
        scores = queries @ self._rows[start : start + (1 << 15)].T
        best = np.argpartition(-scores, min(k, scores.shape[1] - 1), axis=1)[:, :k]
        return np.take_along_axis(scores, best, 1), best + start


RIVALS: dict[str, type[Any]] = {
    "hnswlib": Hnswlib,
    "usearch": Usearch,
    "voyager": Voyager,
    "scann": Scann,
    "autofaiss": Autofaiss,
    "numpy": Numpy,
}


def bytes_on_disk(folder: Path) -> int:
    """Of all files below `folder`."""
    return sum(os.path.getsize(os.path.join(at, name)) for at, _, names in os.walk(folder) for name in names)
