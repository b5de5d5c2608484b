"""Makes indexes/tiny, the golden index of the current format: python tests/make_golden.py [FOLDER]

Six items made of colours, d = 8, no model: rows are what a formula gives, so that a test can tell whether
they were read right. Made once for each format and then kept: it must open for ever.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np

from mmsearch.derived_maker import IndexMaker
from mmsearch.store import Batch, IndexStore, Skip, Upsert
from mmsearch.types import ModelIdentity, Preprocessing, Skipped, SkipReason, Source, Stamp

COLOURS = ["red", "green", "blue", "yellow", "grün", "violet"]
DIM = 8
TINY = Path(__file__).resolve().parents[1] / "indexes" / "tiny"
DATED = 1_700_000_000_000_000_000


def row(number: int) -> np.ndarray:
    """The unit row with number `number`: (d,)."""
    values = np.cos(np.arange(1, DIM + 1, dtype=np.float32) * (number + 1))
    return values / np.linalg.norm(values)


def upsert(number: int, colour: str) -> Upsert:
    """Picture `number`, with a caption for the even ones."""
    captions = (f"a {colour} square",) if number % 2 == 0 else ()
    name = f"{colour}.png"
    at = Stamp(100 + number, DATED, DATED)
    return Upsert(
        Source("/golden", name, f"/golden/{name}", at, captions, {"number": number}),
        content_hash=number.to_bytes(16, "big"),
        width=4,
        height=3,
        image_vector=row(number),
        text_vectors=row(100 + number)[None] if captions else None,
    )


def make(folder: Path) -> None:
    """Write the index: two batches, one replaced picture, one removed item, one file that was skipped."""
    preprocessing = Preprocessing(size=32)
    model = ModelIdentity("golden", weights="0" * 16, preprocessing=preprocessing.digest(), dim=DIM)
    settings = {"model": "golden"}
    with IndexStore.create(str(folder), model=model, preprocessing=preprocessing, settings=settings) as store:
        store.begin_scan()
        store.commit(Batch(upserts=[upsert(i, colour) for i, colour in enumerate(COLOURS[:5])]))
        broken = Source("/golden", "broken.png", "/golden/broken.png", Stamp(3, DATED, DATED))
        violet = store.find("/golden", "yellow.png")
        assert violet is not None
        store.commit(
            Batch(
                removals=[violet.item],
                upserts=[upsert(5, "violet"), upsert(1, "green")],
                skips=[Skip(broken, Skipped("/golden/broken.png", SkipReason.TRUNCATED, "3 bytes"))],
            )
        )
        store.update_derived(IndexMaker("flat"))
        store.finish()
    for name in ("lock", "lock.json"):
        (folder / name).unlink(missing_ok=True)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else TINY
    shutil.rmtree(target, ignore_errors=True)
    make(target)
