"""Shards: what is written is read back, and what is damaged is no shard."""

from __future__ import annotations

import fsspec
import numpy as np
import pytest

from mmsearch.data.images import ImageInfo
from mmsearch.data.loading import Failed
from mmsearch.errors import IndexDamagedError, StoreError
from mmsearch.pictures import Encoded, Request
from mmsearch.types import Skipped, SkipReason, Stamp

pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'mmsearch[ray]'")
from mmsearch.scale.shard_files import WorkFolder

DIM = 4
ODD = "caf\udce9.jpg"


def row(value: float) -> np.ndarray:
    return np.full(DIM, value, np.float32)


def asked(key: int, path: str | None = "/p/a.jpg", **more) -> Request:
    return Request(key, "", path or "row", path, Stamp(5, 6, 7) if path else None, **more)


EVERYTHING = [
    (
        asked(1, ODD),
        Encoded(1, row(0.5), b"h" * 16, ImageInfo(3, 2, "2020-01-02T03:04:05", "PNG", "x"), Stamp(5, 6, 7)),
    ),
    (
        asked(2, texts=("a", "b")),
        Encoded(2, row(0.25), b"i" * 16, ImageInfo(1, 1, None, "JPEG"), Stamp(8, 9, 1), np.stack([row(1), row(0)])),
    ),
    (asked(3, None, texts=("c",)), Encoded(3, None, texts=row(0.125)[None])),
    (asked(4, "/p/b.jpg"), Failed(4, Skipped("/p/b.jpg", SkipReason.TRUNCATED, "ends"), b"j" * 16, Stamp(1, 2, 3))),
    (asked(5, "/p/c.jpg"), Failed(5, Skipped("/p/c.jpg", SkipReason.VANISHED), None, None)),
]


def written(folder, pairs=EVERYTHING):
    return folder.write([request for request, _ in pairs], [outcome for _, outcome in pairs], dim=DIM)


@pytest.fixture(params=["local", "uri"])
def folder(request, tmp_path):
    """A work folder on the disk, and one that is a URI."""
    if request.param == "local":
        yield WorkFolder(str(tmp_path / "work" / "job"))
        return
    yield WorkFolder("memory://work/job")
    memory = fsspec.filesystem("memory")
    if memory.exists("/work"):
        memory.rm("/work", recursive=True)


def same(one, other) -> bool:
    if isinstance(one, Failed):
        return (one.skipped, one.content_hash, one.stamp) == (other.skipped, other.content_hash, other.stamp)
    facts = (one.content_hash, one.info, one.stamp) == (other.content_hash, other.info, other.stamp)
    return facts and all(
        (a is None and b is None) or np.array_equal(a, b)
        for a, b in ((one.vector, other.vector), (one.texts, other.texts))
    )


def test_every_kind_of_outcome_comes_back(folder):
    """Pictures with and without texts, texts alone, failures; odd names; half-precision numbers bit for bit."""
    name = written(folder)
    read = folder.read(name)
    assert [digest for digest, _ in read] == [request.digest() for request, _ in EVERYTHING]
    assert all(same(outcome, back) for (_, outcome), (_, back) in zip(EVERYTHING, read, strict=True))


def test_the_same_batch_twice_is_one_shard(folder):
    """A batch that was delivered again leaves nothing new."""
    assert written(folder) == written(folder)
    assert len(folder.names()) == 1


def test_a_request_is_known_by_everything_but_its_key():
    """Another run gives other keys; another stamp, text or place is another request."""
    assert asked(1).digest() == asked(2).digest()
    others = [asked(1, "/p/b.jpg"), asked(1, texts=("x",)), Request(1, "", "/p/a.jpg", "/p/a.jpg", Stamp(5, 6, 8))]
    assert len({asked(1).digest(), *(one.digest() for one in others)}) == 4


def test_a_damaged_shard_is_refused_and_a_missing_one_is_explained(tmp_path):
    """Its name is the checksum of its bytes; a work folder of another machine holds nothing here."""
    folder = WorkFolder(str(tmp_path))
    name = written(folder)
    with pytest.raises(StoreError, match="a folder that all nodes share"):
        WorkFolder(str(tmp_path / "other")).read(name)
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(IndexDamagedError):
        folder.read(name)


def test_unfinished_files_are_no_shards_and_go_with_the_rest(folder, tmp_path):
    """What a kill left while a shard was written is never read."""
    name = written(folder)
    if not folder.place.startswith("memory"):
        (tmp_path / "work" / "job" / ".draft").write_bytes(b"half")
    assert folder.names() == [name]
    folder.clear()
    assert folder.names() == [] and not (tmp_path / "work").exists()
    folder.remove([name])  # gone already: no matter
