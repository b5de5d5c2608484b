"""Pictures, encoders that leave notes, and what an index holds, for tests of encoding on a cluster.

The nodes import this module too: whoever starts them puts its folder on their PYTHONPATH.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from mmsearch.store import IndexStore
from mmsearch.testing import ColorEncoder
from mmsearch.types import Modality

STORE_BYTES = 80_000_000


class NotingEncoder(ColorEncoder):
    """Leaves a file in `notes` for every batch of pictures: when, by which process, how many. Takes `seconds` each.

    `together`: nobody begins before that many processes are there.
    """

    def __init__(self, notes: Path, *, seconds: float = 0.0, together: int = 1, bucket: Path | None = None) -> None:
        super().__init__()
        self.notes, self.seconds, self.together, self.bucket = notes, seconds, together, bucket

    def __setstate__(self, state) -> None:
        """On a node: s3 is there what it is for the driver."""
        self.__dict__.update(state)
        if self.bucket is not None:
            BucketFileSystem.stand_in_for_s3(self.bucket)

    def encode_pixels(self, pixels, **options):
        (self.notes / f".{os.getpid()}").touch()
        end = time.monotonic() + 40
        while len(os.listdir(self.notes)) < self.together and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(self.seconds)
        found = super().encode_pixels(pixels, **options)
        (self.notes / f"{time.time_ns()}-{os.getpid()}-{len(pixels)}").touch()
        return found


class BucketFileSystem(LocalFileSystem):
    """s3://bucket/... as fsspec's own file system of a folder: objects without directories' ceremony."""

    protocol = "s3"
    cachable = False
    folder = ""

    @classmethod
    def stand_in_for_s3(cls, folder: Path) -> None:
        """From now on, in this process, s3://bucket is that folder."""
        found = type("Bucket", (cls,), {"folder": str(folder)})
        fsspec.register_implementation("s3", found, clobber=True)

    def __init__(self, **options) -> None:
        super().__init__(auto_mkdir=True, **options)

    @classmethod
    def _strip_protocol(cls, path):
        return str(path).replace("s3://bucket", cls.folder).rstrip("/")


def encoded(notes: Path) -> int:
    """How many pictures went through all `NotingEncoder`s of a folder."""
    return sum(int(name.rsplit("-", 1)[1]) for name in os.listdir(notes) if name[0] != ".")


def readers(notes: Path) -> set[int]:
    """The processes that have read pictures."""
    return {int(name.split("-")[1]) for name in os.listdir(notes) if name[0] != "."}


def photos(folder: Path, count: int) -> Path:
    """`count` pictures of one colour each, no two alike."""
    folder.mkdir(parents=True)
    colours = np.random.default_rng(0).choice(1 << 24, count, replace=False)
    for number, colour in enumerate(colours.tolist()):
        rgb = (colour >> 16, colour >> 8 & 255, colour & 255)
        Image.new("RGB", (20, 14), rgb).save(folder / f"{number:04d}.png")
    return folder


def contents(index: Path) -> dict[str, tuple]:
    """id -> path, captions, size, vectors of every item; fails when one is there twice or the index is not whole."""
    found: dict[str, list] = {}
    with IndexStore.open(str(index)) as store:
        assert store.verify() == []
        with store.snapshot() as snapshot:
            for modality in Modality:
                rows = snapshot.alive_rows(modality)
                vectors = snapshot.vectors(rows)
                for one, vector in zip(snapshot.locate(rows), vectors, strict=True):
                    item = one.item
                    entry = found.setdefault(item.id, [(item.path, item.captions, str(dict(item.metadata)))])
                    entry.append((modality, one.caption, item.width, item.height, item.taken_at, vector.tobytes()))
            ids = [one.id for one in snapshot.items()]
    assert len(ids) == len(set(ids)) and set(ids) == set(found)
    assert all(len(rows) == len(set(rows)) for rows in found.values()), "a row is there twice"
    return {key: tuple(rows) for key, rows in found.items()}
