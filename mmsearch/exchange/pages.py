"""What an index holds, a bounded number of items at a time, with their vectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmsearch.store.records import ItemRecord, records
from mmsearch.store.snapshot import DirectorySnapshot


@dataclass(frozen=True, slots=True)
class Page:
    """n items. `images` (n, d) fp16, zeros where `has_image` is False.

    `texts` (m, d) fp16: row j was made of caption `text_part[j]` of item `text_of[j]` of this page; ordered by both.
    """

    records: list[ItemRecord]
    images: NDArray[np.float16]
    has_image: NDArray[np.bool_]
    texts: NDArray[np.float16]
    text_of: NDArray[np.int64]
    text_part: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.records)

    def piece(self, start: int, stop: int) -> Page:
        """Items start..stop."""
        first, last = np.searchsorted(self.text_of, [start, stop])
        return Page(
            self.records[start:stop],
            self.images[start:stop],
            self.has_image[start:stop],
            self.texts[first:last],
            self.text_of[first:last] - start,
            self.text_part[first:last],
        )


def pages(snapshot: DirectorySnapshot, *, size: int, images: bool, texts: bool) -> Iterator[Page]:
    """The items that have a picture's vector (`images`) or one of a text (`texts`), `size` at a time, in the order they
    came; vectors of the other kind are left out."""
    for found in records(snapshot, page=size):
        kept = [one for one in found if (images and one.image is not None) or (texts and one.texts)]
        if kept:
            yield _page(snapshot, kept, images=images, texts=texts)


def _page(snapshot: DirectorySnapshot, kept: list[ItemRecord], *, images: bool, texts: bool) -> Page:
    has_image = np.array([images and one.image is not None for one in kept], bool)
    rows = np.array([one.image for one in kept if images and one.image is not None], np.int64)
    pictures = np.zeros((len(kept), snapshot.dim), np.float16)
    pictures[has_image] = snapshot.read(rows)
    lines = [(place, row, part) for place, one in enumerate(kept) if texts for row, part in one.texts]
    of, which, parts = np.array(lines, np.int64).reshape(-1, 3).T
    return Page(kept, pictures, has_image, snapshot.read(which), of, parts)
