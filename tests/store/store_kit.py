"""One-line builders for store tests, and disks that die, fail or lose power at the Nth operation."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from mmsearch.store import Batch, IndexStore, ItemState, Skip, Upsert
from mmsearch.store.derived import NewFile
from mmsearch.store.disk import Disk
from mmsearch.types import Modality, ModelIdentity, Preprocessing, Skipped, SkipReason, Source, Stamp

DIM = 8
ROOT = "/photos"
PREPROCESSING = Preprocessing(size=16)
MODEL = ModelIdentity("tiny", weights="w1", preprocessing=PREPROCESSING.digest(), dim=DIM)
LONG_AGO = 1_500_000_000_000_000_000


def unit(seed: object) -> np.ndarray:
    """A unit row that depends on `seed` only, exact in half precision up to rounding."""
    rng = np.random.default_rng(abs(hash(str(seed))) if not isinstance(seed, int) else seed)
    row = rng.standard_normal(DIM).astype(np.float32)
    return row / np.linalg.norm(row)


def stamp(size: int = 100, *, mtime: int = LONG_AGO, ctime: int = LONG_AGO) -> Stamp:
    return Stamp(size, mtime, ctime)


def source(name: str, *, captions: Iterable[str] = (), at: Stamp | None = None, root: str = ROOT, **metadata) -> Source:
    return Source(root, name, f"{root}/{name}", at or stamp(), tuple(captions), metadata)


def upsert(name: str, seed: int = 0, *, captions: Iterable[str] = (), **kwargs) -> Upsert:
    """A picture whose row is `unit(seed)`, with captions whose rows are `unit(seed + 1000 + i)`."""
    texts = [unit(seed + 1000 + i) for i, _ in enumerate(captions)]
    return Upsert(
        source(name, captions=captions, **kwargs),
        content_hash=seed.to_bytes(16, "little"),
        image_vector=unit(seed),
        text_vectors=np.stack(texts) if texts else None,
    )


def skip(name: str, reason: SkipReason = SkipReason.TRUNCATED, **kwargs) -> Skip:
    at = source(name, **kwargs)
    return Skip(at, Skipped(at.path or "", reason, "half of it"))


def create(path: object, **kwargs) -> IndexStore:
    return IndexStore.create(str(path), model=MODEL, preprocessing=PREPROCESSING, **kwargs)


def make_index(path: object, count: int = 4, *, captions: int = 1) -> str:
    """A finished index of `count` pictures p0, p1, ... with `captions` captions each; returns its path."""
    with create(path) as store:
        store.commit(
            Batch(
                upserts=[
                    upsert(f"p{i}", i, captions=[f"caption {i}.{j}" for j in range(captions)]) for i in range(count)
                ]
            )
        )
        store.update_derived(PlainDerived())
        store.finish()
    return str(path)


def numbers(store: IndexStore) -> dict[str, int]:
    """Item number by name."""
    with store.snapshot() as snapshot:
        return {known.name: known.item for known in snapshot.items(state=None)}


def state_of(path: str) -> dict[str, object]:
    """What a reader of the index finds: by name, the picture's row and the captions with theirs."""
    found: dict[str, object] = {}
    with IndexStore.open(path) as store, store.snapshot() as snapshot:
        for known in snapshot.items(state=None):
            assert known.name not in found, "an item is there twice"
            if known.state is ItemState.SKIPPED:
                found[known.name] = known.reason
                continue
            rows = {m: snapshot.rows_of(known.id, m) for m in Modality}
            located = [one.caption for one in snapshot.locate(rows[Modality.TEXT])]
            found[known.name] = (
                snapshot.vectors(rows[Modality.IMAGE]).round(3).tolist(),
                located,
                snapshot.vectors(rows[Modality.TEXT]).round(3).tolist(),
            )
        alive = sum(len(snapshot.alive_rows(m)) for m in Modality)
        assert alive == sum(snapshot.count(m) for m in Modality)
    return found


class PlainDerived:
    """A derived file that is nothing but the rows, for tests that need no faiss."""

    kind = "plain"

    def make(self, rows, *, there, path):
        if path is not None and there.kind == self.kind and rows.count - there.count <= 0.02 * rows.count:
            return there
        return NewFile(self.kind, self.chunks(rows), need=rows.count * rows.dim * 2, facts={"plain": True})

    def chunks(self, rows):
        yield b"plain %d %d\n" % (rows.dim, rows.count)
        for _, block in rows.blocks():
            yield block.tobytes()


class CountingDisk(Disk):
    """Counts operations; `log` has (operation, file name)."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []

    def step(self, operation: str, path: str) -> None:
        self.log.append((operation, os.path.basename(path)))


class DyingDisk(CountingDisk):
    """Kills its process at operation number `at` (from 1). `torn`: half of a write is still made."""

    def __init__(self, at: int, *, torn: bool = False) -> None:
        super().__init__()
        self._at, self._torn = at, torn

    def step(self, operation: str, path: str) -> None:
        super().step(operation, path)
        if len(self.log) == self._at and not (self._torn and operation == "write"):
            self.die()

    def _write(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        if self._torn and len(self.log) == self._at:
            os.pwrite(descriptor, bytes(data)[: len(data) // 2 + 1], offset)
            self.die()
        return super()._write(descriptor, data, offset)

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class PowerLossDisk(DyingDisk):
    """As a machine that loses power: what was not synced is gone, and so are names not synced."""

    def __init__(self, at: int) -> None:
        super().__init__(at)
        self._lengths: dict[str, int] = {}
        self._undo: dict[str, list[Callable[[], object]]] = {}

    def step(self, operation: str, path: str) -> None:
        if operation == "write":
            self._lengths.setdefault(path, os.path.getsize(path))
        elif operation == "replace":
            old = Path(path).read_bytes() if os.path.exists(path) else None
            undo = (lambda: Path(path).unlink()) if old is None else (lambda: Path(path).write_bytes(old))
            self._undo.setdefault(os.path.dirname(path), []).append(undo)
        super().step(operation, path)
        self._done = (operation, path)

    def _sync(self, descriptor: int) -> None:
        operation, path = self._done
        if operation == "sync":
            self._lengths.pop(path, None)
        elif operation == "sync_dir":
            self._undo.pop(path, None)

    def die(self) -> None:
        for path, length in self._lengths.items():
            if os.path.exists(path):
                os.truncate(path, length)
        operation, path = self.log[-1][0], None
        for undos in self._undo.values():
            for number, undo in enumerate(undos):
                if operation == "replace" and number == len(undos) - 1:
                    continue  # it died before that rename
                undo()
        super().die()


class FailingDisk(CountingDisk):
    """Operation number `at` fails with `code`; those after it work again."""

    def __init__(self, at: int, code: int = errno.ENOSPC) -> None:
        super().__init__()
        self._at, self._code = at, code

    def step(self, operation: str, path: str) -> None:
        super().step(operation, path)
        if len(self.log) == self._at:
            raise OSError(self._code, os.strerror(self._code))


def in_child(job: Callable[[Callable[[object], None]], None]) -> tuple[int, list[str]]:
    """Run `job(tell)` in a forked process: its wait status, and what it told before it ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        code = 1
        try:
            job(lambda what: os.write(writing, f"{what}\n".encode()))
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as told:
        lines = told.read().split()
    return os.waitpid(child, 0)[1], lines
