"""Our own index kinds behind the seam of `rivals.py`: an index directory, its derived file, and a search through both.

The rows are put into a store once (`store/` beside base.npy); every kind gets a copy of it whose vector file is a hard
link, which nobody writes to, so that kinds differ by their derived file alone. What building a kind costs is therefore
told without the import, which `facts` names: seconds and peak bytes of the process that did it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from rivals import EF, Base, Floats, Rows, Setting

from mmsearch.store import IndexStore
from mmsearch.store.base import Batch, Upsert
from mmsearch.types import Modality, ModelIdentity, Preprocessing, Source

_COMMIT = 1 << 14
_STORE, _PART = "store", "store.part"


def import_rows(base: Base, path: Path) -> float:
    """Put all rows into a new store at `path` as pictures; seconds."""
    start = time.perf_counter()
    identity = json.loads((base.path.parent / "facts.json").read_text())["model"]
    with IndexStore.create(str(path), model=ModelIdentity(**identity), preprocessing=Preprocessing()) as store:
        for first, rows in base.blocks(_COMMIT):
            sources = (
                Source(root=str(base.path), name=str(first + i), path=None, stamp=None) for i in range(len(rows))
            )
            pairs = zip(sources, rows, strict=True)
            store.commit(Batch(upserts=[Upsert(source, image_vector=row) for source, row in pairs]))
        store.finish()
    return time.perf_counter() - start


def shared_store(base: Base) -> Path:
    """The store of all rows beside base.npy, made when it is not there."""
    path = base.path.parent / _STORE
    if not path.exists():
        fresh = base.path.parent / _PART
        shutil.rmtree(fresh, ignore_errors=True)
        seconds = import_rows(base, fresh)
        (base.path.parent / "store.json").write_text(json.dumps({"import_s": seconds}))
        fresh.rename(path)
    return path


def linked_copy(store: Path, folder: Path) -> None:
    """An index directory of its own that shares the vector file."""
    for entry in store.iterdir():
        if entry.name.startswith("vectors"):
            os.link(entry, folder / entry.name)
        elif entry.is_file() and not entry.name.startswith("lock"):
            shutil.copy(entry, folder / entry.name)


class OwnKind:
    """One kind of `mmsearch.index`. `Rival`'s seam. A setting is (probes, effort, factor), see `index.approximate`."""

    modules = (
        "mmsearch.store",
        "mmsearch.index.derived",
        "mmsearch.index.approximate",
        "mmsearch.index.opening",
        "faiss",
    )

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.settings: tuple[Setting, ...] = ((0, 0, 1),)

    def build(self, base: Base, folder: Path, *, threads: int, memory: int) -> dict[str, Any]:
        """See `Rival.build`. Tuned on the queries that `vectors.py` holds back for it, both kinds."""
        from mmsearch.derived_maker import IndexMaker
        from mmsearch.index.tuning import Questions

        def asks(modality: Modality) -> dict[str, Questions]:
            rows = {name: np.load(base.path.parent / f"tune_{name}.npy") for name in ("text", "image")}
            return {
                name: Questions(found, np.full(len(found), -1, np.int64), "held out") for name, found in rows.items()
            }

        linked_copy(shared_store(base), folder)
        with IndexStore.open(str(folder), write=True) as store:
            store.update_derived(IndexMaker(self.kind, memory=memory if self.kind == "auto" else None, asks=asks))
            store.finish()
        with IndexStore.open(str(folder)) as store, store.snapshot() as snapshot:
            derived = snapshot.derived(Modality.IMAGE)
        facts: dict[str, Any] = json.loads((base.path.parent / "store.json").read_text())
        return facts if derived is None else {**facts, "kind": derived.kind, "file": derived.size, **derived.facts}

    def open(self, folder: Path) -> None:
        """See `Rival.open`."""
        from mmsearch.index.approximate import ApproximateIndex
        from mmsearch.index.derived import StoredIndex, neighbours

        self._snapshot = IndexStore.open(str(folder)).snapshot()
        self._index = neighbours(self._snapshot, Modality.IMAGE)
        inner = self._index._parts[0][1] if isinstance(self._index, StoredIndex) else self._index
        self._inner = inner if isinstance(inner, ApproximateIndex) else None
        if self._inner is not None:
            how = self._inner.parameters
            self.settings = around(how.probes, how.effort, how.factor)

    def search(self, queries: Floats, k: int, *, setting: Setting, threads: int) -> Rows:
        """See `Rival.search`. One query is one thread's, several are for as many as FAISS was told at the start."""
        if self._inner is not None and isinstance(setting, tuple):
            from mmsearch.index.approximate import Parameters

            self._inner.parameters = Parameters(*setting)
        return np.asarray(self._index.search(queries, k)[1], np.int64)


def around(probes: int, effort: int, factor: int) -> tuple[Setting, ...]:
    """The tuned parameters, and others that look less or harder, with half and twice the candidates too.

    A graph keeps at least all candidates in view, whatever its effort: there efforts are those of other libraries.
    """
    factors = {factor} if factor == 1 else {max(1, factor // 2), factor, factor * 2}
    shares = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
    numbers = [max(1, round(probes * share)) for share in shares] if probes else EF if effort else (0,)
    made = {(number if probes else 0, 0 if probes else number, found) for number in numbers for found in factors}
    wide = {one for one in made if not effort or one[1] >= 10 * one[2]}
    return tuple(sorted(wide | {(probes, effort, factor)}, key=lambda one: (one[2], one[0], one[1])))
