"""One-line builders for tests of imports and exports, and what an index holds as plain values."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from mmsearch.store import Batch, IndexStore, Upsert
from mmsearch.store.imports import imports_of
from mmsearch.store.records import records
from mmsearch.types import ModelIdentity, Preprocessing, Source

DIM = 8
PREPROCESSING = Preprocessing()
MODEL = ModelIdentity("theirs", weights="w", preprocessing=PREPROCESSING.digest(), dim=DIM)


def unit(n: int, *, d: int = DIM, seed: int = 0) -> np.ndarray:
    """(n, d) unit rows, rounded to half precision as a store would."""
    rows = np.random.default_rng(seed).standard_normal((n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def npy(path: Path, rows: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, rows)
    return path


def clip_folder(
    root: Path,
    shards: Sequence[np.ndarray],
    *,
    texts: Sequence[np.ndarray] | None = None,
    columns: Sequence[dict[str, Any]] | None = None,
) -> Path:
    """clip-retrieval's layout; `columns`: the metadata of each shard."""
    for number, rows in enumerate(shards):
        npy(root / "img_emb" / f"img_emb_{number}.npy", rows)
        if texts is not None:
            npy(root / "text_emb" / f"text_emb_{number}.npy", texts[number])
        if columns is not None:
            (root / "metadata").mkdir(exist_ok=True)
            parquet.write_table(pa.table(columns[number]), root / "metadata" / f"metadata_{number}.parquet")
    return root


def fixed(rows: np.ndarray) -> pa.Array:
    """(n, d) as a column of vectors of one length."""
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])


def arrow_file(path: Path, table: pa.Table, *, stream: bool = False, chunk: int = 1000) -> Path:
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=chunk)
    return path


def item(
    name: str, seed: int, *, captions: Iterable[str] = (), picture: bool = True, path: str | None = None
) -> Upsert:
    """An item of id `name` with the vectors of `unit(..., seed)`: its picture's first, then one of each caption."""
    texts = tuple(captions)
    rows = unit(1 + len(texts), seed=seed)
    source = Source("/made", name, path, None, texts, {"n": seed, "deep": {"a": [1, None, "ü"]}} if seed % 2 else {})
    return Upsert(
        source, width=seed or None, height=7 if seed else None, taken_at="2024-05-06T07:08:09" if seed % 3 else None,
        image_vector=rows[0] if picture else None, text_vectors=rows[1:] if texts else None, id=name,
    )  # fmt: skip


def make_index(path: Path, items: Sequence[Upsert]) -> Path:
    """A finished index of those items, of nobody's model."""
    with IndexStore.create(
        str(path), model=MODEL, preprocessing=PREPROCESSING, settings={"model": "imported:theirs"}
    ) as s:
        s.commit(Batch(upserts=list(items)))
        s.finish()
    return path


def varied(n: int) -> list[Upsert]:
    """Items of every sort: with and without pictures, captions, paths, metadata."""
    return [
        item(
            f"item {i}", i, captions=[f"caption {i}.{j} ä" for j in range(i % 4)], picture=i % 5 != 3 or i % 4 == 0,
            path=__file__ if i % 3 == 0 else None,
        )
        for i in range(n)
    ]  # fmt: skip


def held(path: Path) -> dict[str, dict[str, Any]]:
    """What an index holds, by id; vectors as the bytes of their half floats. The index must be sound."""
    found = {}
    with IndexStore.open(str(path)) as store, store.snapshot() as snapshot:
        assert store.verify() == []
        for page in records(snapshot, page=7):
            for one in page:
                found[one.id] = {
                    "captions": one.captions,
                    "metadata": dict(one.metadata),
                    "path": one.path,
                    "facts": (one.width, one.height, one.taken_at),
                    "image": None if one.image is None else snapshot.take(np.array([one.image])).tobytes(),
                    "texts": {part: snapshot.take(np.array([row])).tobytes() for row, part in one.texts},
                }
    return found


def pictures(path: Path) -> dict[str, bytes]:
    """id -> the bytes of its picture's vector."""
    return {name: one["image"] for name, one in held(path).items()}


def bits(rows: np.ndarray, names: Iterable[object] | None = None) -> dict[str, bytes]:
    """name (default: row number) -> the bytes of a row as half floats."""
    halves = rows.astype(np.float16)
    return {str(name): row.tobytes() for name, row in zip(names or range(len(rows)), halves, strict=True)}


def skipped(path: Path) -> list[str]:
    """Names of the items that are remembered as skipped."""
    with IndexStore.open(str(path)) as store, store.snapshot() as snapshot:
        return [known.name for known in snapshot.items(state=None) if known.reason is not None]


def progress_of(path: Path) -> dict[str, Any]:
    """How far the imports into an index are, by the last part of their root."""
    with IndexStore.open(str(path)) as store, store.snapshot() as snapshot:
        return {os.path.basename(root): entry for root, entry in imports_of(snapshot).items()}


def everything(path: Path) -> tuple[bytes, list[Any]]:
    """The vector file's bytes, and every row of items.sqlite but its clocks: what two equal indexes have in common."""
    db = sqlite3.connect(f"file:{path / 'items.sqlite'}?mode=ro", uri=True)
    try:
        columns = [row[1] for row in db.execute("PRAGMA table_info(items)") if row[1] != "read_ns"]
        tables = [db.execute(f"SELECT {', '.join(columns)} FROM items ORDER BY item").fetchall()]
        tables += [db.execute(f"SELECT * FROM {name} ORDER BY 1").fetchall() for name in ("rows", "dead", "blocks")]
        clocks = ("created_at", "updated_at", "made_by")
        tables.append([row for row in db.execute("SELECT * FROM meta ORDER BY key") if row[0] not in clocks])
    finally:
        db.close()
    return (path / "vectors.f16").read_bytes(), tables
