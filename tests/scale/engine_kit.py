"""One-line builders for tests of engines, and a plain Python model of what any engine must answer."""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmsearch.scale.engine import Collection, Entry, open_engine
from mmsearch.scale.local_engine import LocalEngine
from mmsearch.store.directory import IndexStore
from mmsearch.types import Item, Modality, ModelIdentity, Preprocessing
from mmsearch.where import facts_of, fulfils

DIM = 16
PREPROCESSING = Preprocessing(size=16)
MODEL = ModelIdentity("tiny", weights="aaaa1111", preprocessing=PREPROCESSING.digest(), dim=DIM)
OTHER = ModelIdentity("other", weights="bbbb2222", preprocessing=PREPROCESSING.digest(), dim=DIM)
COLLECTION = Collection(MODEL, PREPROCESSING, {"model": None})


def unit(seed: int, count: int = 1) -> np.ndarray:
    """(count, DIM) unit rows that are exact in half precision up to rounding."""
    rows = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float16).astype(np.float32)


def entry(name: str, seed: int, *, captions=("one", "two"), path: str | None = "", **metadata) -> Entry:
    """An item with a picture and captions, all rows from `seed`."""
    rows = unit(seed, 1 + len(captions))
    item = Item(name, f"/photos/{name}.jpg" if path == "" else path, tuple(captions), metadata, width=seed, height=10)
    return Entry(item, rows[0], rows[1:], tuple(range(len(captions))))


CITIES = ("Bern", "Basel", "Zürich", "O'Hare", 'the "Old" town \\ 100%')


def entries(count: int = 60) -> list[Entry]:
    """Items e000, e001, ... with year, city, day, a flag and a rating; every fifth has no metadata at all."""
    made = []
    for i in range(count):
        facts = {
            "year": str(1990 + i) if i % 2 else 1990 + i,
            "city": CITIES[i % len(CITIES)],
            "day": f"2024-05-{1 + i % 28:02d}",
            "flag": i % 3 == 0,
            "rating": i / 10,
            "tags": ["a", "b"],
        }
        made.append(entry(f"e{i:03d}", i, **({} if i % 5 == 4 else facts)))
    return made


def expected(have: list[Entry], query: np.ndarray, k: int, *, modality: Modality, where=()) -> list[tuple]:
    """(score, id, part) of the k best, by looking at every row."""
    found = [
        (float(row @ query), one.item.id, part)
        for one in have
        if fulfils(facts_of(one.item), where)
        for kind, part, row in one.rows()
        if kind is modality
    ]
    return sorted(found, key=lambda hit: (-hit[0], hit[1], hit[2]))[:k]


def same_hits(answer, number: int, wanted: list[tuple], *, tolerance: float = 2e-3) -> None:
    """The answer to query `number` is what was expected; where scores tie, any order will do."""
    scores = answer.scores[number]
    got = list(zip(answer.ids[number], answer.parts[number], strict=True))
    assert len(got) == len(wanted)
    assert len(set(got)) == len(got)
    np.testing.assert_allclose(scores[: len(wanted)], [score for score, _, _ in wanted], atol=tolerance)
    assert np.isneginf(scores[len(wanted) :]).all()
    truth = {(name, part): score for score, name, part in wanted}
    last = wanted[-1][0] if wanted else 0.0
    for key, score in zip(got, scores, strict=False):
        if key in truth:
            assert abs(truth[key] - score) <= tolerance
        else:
            assert abs(score - last) <= tolerance


@contextlib.contextmanager
def postgres(package: str):
    """The address of a PostgreSQL server with pgvector on a socket of its own; stopped and removed at the end.

    Not below pytest's folder: started by root the server runs as another user, and every pytest that begins closes
    that folder to others.
    """
    with tempfile.TemporaryDirectory(prefix="mmsearch-pg-") as folder:
        os.chmod(folder, 0o755)
        server = importlib.import_module(package).get_server(Path(folder, "data"), cleanup_mode="delete")
        try:
            uri = server.get_uri()
            yield uri if "?" in uri else f"{uri}?"
        finally:
            server.cleanup()


@contextlib.contextmanager
def small_ray():
    """A Ray of this process's own, two CPUs wide.

    On a busy machine its first process now and then does not say its port within Ray's half a minute: it is begun anew.
    """
    import ray

    for left in (2, 1, 0):
        try:
            ray.init(
                address="local", num_cpus=2, object_store_memory=80 << 20, include_dashboard=False,
                log_to_driver=False, logging_level="ERROR",
            )  # fmt: skip
            break
        except Exception:  # Ray raises RuntimeError, or Exception itself when the node is late
            ray.shutdown()
            if not left:
                raise
    try:
        yield ray
    finally:
        ray.shutdown()


@contextlib.contextmanager
def opened(uri: str):
    """The engine at an address, closed afterwards."""
    engine = open_engine(uri)
    try:
        yield engine
    finally:
        engine.close()


def with_settings(path: str, **settings) -> str:
    """The index at that path, with more settings."""
    with IndexStore.open(path, write=True) as store:
        store.note_settings({**store.settings, **settings})
        store.finish()
    return path


def empty_indexes(folder, count: int, collection: Collection = COLLECTION) -> list[str]:
    """The paths of so many new index directories."""
    paths = [str(folder / f"shard{number}") for number in range(count)]
    for path in paths:
        IndexStore.create(path, model=collection.model, preprocessing=collection.preprocessing).close()
    return paths


def make_index(path, have: list[Entry], *, collection: Collection = COLLECTION) -> str:
    """A finished index directory of these items; returns its path."""
    IndexStore.create(str(path), model=collection.model, preprocessing=collection.preprocessing).close()
    change_index(str(path), have)
    return str(path)


def change_index(path: str, have: list[Entry], *, remove: Sequence[str] = ()) -> None:
    """Put items in, or replace them, and remove some."""
    engine = LocalEngine(path)
    engine.upsert(have)
    engine.delete(remove)
    engine.finish()
    engine.close()
