"""Encoded pictures on their way to the index: files of a few hundred rows in a folder that every node sees.

A shard is one Arrow IPC file whose name is the xxh3_128 of its bytes: what is cut off or damaged is no shard, and one
that was written twice is one. Columns, a row a request:

    request  the digest of what was asked (`Request.digest`), 16 bytes
    root, name, path                whose row it is; bytes as the file system has them
    hash, size, mtime_ns, ctime_ns  content (xxh3_128) and stamp of the file as it was read
    width, height, taken_at, format, note    of the picture
    has_vector, vector              whether there is a row, and it: d half-precision numbers
    texts                           rows of the request's texts, d half-precision numbers each
    reason, detail                  why the picture was skipped; null where it was not

Decisions:
- Half precision is what the index stores: nothing is lost on the way.
- The folder may be a URI of fsspec's, which puts an object in place whole or not at all.
"""

from __future__ import annotations

import importlib
import os
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from mmsearch.data.images import ImageInfo
from mmsearch.data.loading import Failed
from mmsearch.data.remote import filesystem, is_uri
from mmsearch.errors import IndexDamagedError, MissingExtraError, StoreError
from mmsearch.pictures import Encoded, Outcome, Request
from mmsearch.store.disk import Disk, os_fault
from mmsearch.types import Skipped, SkipReason, Stamp

_ENDING = ".arrow"
_NO_KEY = -1
"""Keys belong to one run of one driver; what is read back is known by its request's digest."""


class WorkFolder:
    """The shards of one job. `place`: a local folder (absolute) or a URI; made when first written to."""

    def __init__(self, place: str) -> None:
        self.place = place
        self._disk = Disk()

    def write(self, requests: Sequence[Request], outcomes: Sequence[Outcome], *, dim: int) -> str:
        """Put a shard of (n) requests and their outcomes in place, durably; its name. Raises as `store.disk` does."""
        data = encode_shard(requests, outcomes, dim=dim)
        name = xxhash.xxh3_128_hexdigest(data) + _ENDING
        self._put(name, data)
        return name

    def read(self, name: str) -> list[tuple[bytes, Outcome]]:
        """(digest of the request, outcome) of every row.

        Raises `StoreError` when the shard is not there, `IndexDamagedError` when its bytes are not those of its name.
        """
        data = self._get(name)
        if xxhash.xxh3_128_hexdigest(data) + _ENDING != name:
            where = f"{self.place}/{name}"
            raise IndexDamagedError(where, expected="the bytes of its name", got="others", do="It is made anew.")
        return decode_shard(data)

    def names(self) -> list[str]:
        """All shards that are there, sorted."""
        if is_uri(self.place):
            fs, root = filesystem(self.place)
            fs.invalidate_cache()
            found = [str(path).rsplit("/", 1)[-1] for path in fs.ls(root, detail=False)] if fs.exists(root) else []
        else:
            found = os.listdir(self.place) if os.path.isdir(self.place) else []
        return sorted(name for name in found if name.endswith(_ENDING) and not name.startswith("."))

    def remove(self, names: Iterable[str]) -> None:
        """Remove shards; those that are gone already are no matter."""
        for name in names:
            if is_uri(self.place):
                fs, root = filesystem(self.place)
                if fs.exists(f"{root}/{name}"):
                    fs.rm_file(f"{root}/{name}")
            else:
                self._disk.remove(os.path.join(self.place, name))

    def clear(self) -> None:
        """Remove everything, unfinished files and the folder too."""
        if is_uri(self.place):
            self.remove(self.names())
            return
        if not os.path.isdir(self.place):
            return
        self.remove(os.listdir(self.place))
        for folder in (self.place, os.path.dirname(self.place)):
            try:
                os.rmdir(folder)
            except OSError:
                return  # another job's shards lie beside it

    def _put(self, name: str, data: bytes) -> None:
        if is_uri(self.place):
            fs, root = filesystem(self.place)
            fs.pipe_file(f"{root}/{name}", data)
            return
        self._disk.make_dir(self.place)
        target = os.path.join(self.place, name)
        draft = os.path.join(self.place, f".{uuid.uuid4().hex}")  # two workers may write the same shard at once
        self._disk.append(draft, [data], at=0)
        try:
            os.replace(draft, target)
        except OSError as error:
            raise os_fault(error, target) from error
        self._disk.sync_dir(self.place)

    def _get(self, name: str) -> bytes:
        try:
            if is_uri(self.place):
                fs, root = filesystem(self.place)
                data: bytes = fs.cat_file(f"{root}/{name}")
                return data
            with open(os.path.join(self.place, name), "rb") as file:
                return file.read()
        except FileNotFoundError:
            raise StoreError(
                self.place, expected=f"the shard {name} that a worker wrote", got="no such file here",
                do="--work must name a folder that all nodes share.",
            ) from None  # fmt: skip
        except OSError as error:
            raise os_fault(error, self.place) from error


def encode_shard(requests: Sequence[Request], outcomes: Sequence[Outcome], *, dim: int) -> bytes:
    """(n) requests, (n) outcomes -> the bytes of an Arrow IPC file."""
    pa = _arrow()
    columns = {
        "request": pa.array([one.digest() for one in requests], pa.binary(16)),
        **{
            name: pa.array([_bytes(getattr(one, name)) for one in requests], pa.binary())
            for name in ("root", "name", "path")
        },
        **_facts(pa, outcomes),
        **_rows(pa, outcomes, dim),
    }
    table, sink = pa.table(columns), pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _facts(pa: Any, outcomes: Sequence[Outcome]) -> dict[str, Any]:  # noqa: ANN401 - the module pyarrow
    infos = [one.info if isinstance(one, Encoded) else None for one in outcomes]
    skips = [one.skipped if isinstance(one, Failed) else None for one in outcomes]
    return {
        "hash": pa.array([one.content_hash for one in outcomes], pa.binary(16)),
        **{
            name: pa.array([one.stamp and getattr(one.stamp, name) for one in outcomes], pa.int64())
            for name in ("size", "mtime_ns", "ctime_ns")
        },
        **{
            name: pa.array([info and getattr(info, name) for info in infos], pa.int32()) for name in ("width", "height")
        },
        **{
            name: pa.array([info and _plain(getattr(info, name)) for info in infos], pa.string())
            for name in ("taken_at", "format", "note")
        },
        "reason": pa.array([skip and str(skip.reason) for skip in skips], pa.string()),
        "detail": pa.array([skip and _plain(skip.detail) for skip in skips], pa.string()),
    }


def _rows(pa: Any, outcomes: Sequence[Outcome], dim: int) -> dict[str, Any]:  # noqa: ANN401 - the module pyarrow
    vectors = [one.vector if isinstance(one, Encoded) else None for one in outcomes]
    texts = [one.texts if isinstance(one, Encoded) else None for one in outcomes]
    flat = np.zeros((len(outcomes), dim), np.float16)
    for row, vector in zip(flat, vectors, strict=True):
        if vector is not None:
            row[:] = vector
    counts = [0 if rows is None else len(rows) for rows in texts]
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    some = [np.asarray(rows, np.float16) for rows in texts if rows is not None]
    joined = np.concatenate(some) if some else np.empty((0, dim), np.float16)
    return {
        "has_vector": pa.array([vector is not None for vector in vectors], pa.bool_()),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), dim),
        "texts": pa.ListArray.from_arrays(
            offsets, pa.FixedSizeListArray.from_arrays(pa.array(joined.reshape(-1)), dim)
        ),
    }


def decode_shard(data: bytes) -> list[tuple[bytes, Outcome]]:
    """The bytes of a shard -> (digest of the request, outcome) of every row; vectors come back in float32."""
    pa = _arrow()
    table = pa.ipc.open_file(pa.py_buffer(data)).read_all().combine_chunks()
    wide = ("vector", "texts")
    rows = table.drop_columns(list(wide)).to_pylist()
    if not rows:
        return []
    dim = table.schema.field("vector").type.list_size
    vectors = _numbers(table["vector"].chunk(0).values, dim)
    nested = table["texts"].chunk(0)
    texts, ends = _numbers(nested.values.values, dim), nested.offsets.to_numpy()
    return [(row["request"], _outcome(row, vectors[i], texts[ends[i] : ends[i + 1]])) for i, row in enumerate(rows)]


def _numbers(values: Any, dim: int) -> NDArray[np.float32]:  # noqa: ANN401 - an Arrow array
    rows: NDArray[np.float32] = values.to_numpy(zero_copy_only=False).reshape(-1, dim).astype(np.float32)
    return rows


def _outcome(row: dict[str, Any], vector: NDArray[np.float32], texts: NDArray[np.float32]) -> Outcome:
    stamp = None if row["size"] is None else Stamp(row["size"], row["mtime_ns"], row["ctime_ns"])
    if row["reason"] is not None:
        path = os.fsdecode(row["path"] or row["name"])
        skipped = Skipped(path, SkipReason(row["reason"]), row["detail"] or "")
        return Failed(_NO_KEY, skipped, row["hash"], stamp)
    info = None
    if row["width"] is not None:
        info = ImageInfo(row["width"], row["height"], row["taken_at"], row["format"], row["note"])
    return Encoded(
        _NO_KEY, vector if row["has_vector"] else None, row["hash"], info, stamp, texts if len(texts) else None
    )


def _bytes(path: str | None) -> bytes | None:
    return None if path is None else os.fsencode(path)


def _plain(text: str | None) -> str | None:
    """Without half surrogates, which Arrow's strings cannot hold."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()


def _arrow() -> Any:  # noqa: ANN401 - the module pyarrow
    try:
        importlib.import_module("pyarrow.ipc")
    except ImportError as error:
        raise MissingExtraError("shards", package="pyarrow", extra="ray") from error
    return importlib.import_module("pyarrow")
