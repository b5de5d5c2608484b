"""What a source of vectors is to an import: parts that hand out blocks of rows, from any row on.

Decisions:
- Whatever a file is, its rows come as `Block`s of a bounded number of rows: nothing holds a file as a whole.
- A block may begin at any row, so that a killed import goes on where it stopped without reading what is done.
- Rows keep their place: one that cannot be used is told by its number, and never moves the facts of another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mmsearch.store.imports import IMPORTED
from mmsearch.types import NO_METADATA, Metadata

BLOCK_ROWS = 40_000
"""Rows that are read, checked and committed together, at most."""
BLOCK_BYTES = 1 << 26
"""Bytes of float32 that the vectors of a block may take, so that long vectors cost no more memory than short ones."""

TEXT_VECTORS = "text_vectors"
"""A column of lists of vectors, one for each caption that `text_parts` names; written by our own exports."""
TEXT_PARTS = "text_parts"
"""Which captions `text_vectors` are of."""
HAS_IMAGE = "has_image"
"""Whether a row of `img_emb` is a picture's, in our own exports of clip-retrieval's layout."""
TEXT_PART = "text_part"
"""Which caption a row of `text_emb` is of, null for none, in the same."""


@dataclass(slots=True)
class Facts:
    """What a source says of one row beside its vector. `id` None: the row's number stands for it.

    `path`: a picture's file as the source names it, perhaps of another machine.
    """

    id: str | None = None
    path: str | None = None
    captions: tuple[str, ...] = ()
    metadata: Metadata = field(default_factory=lambda: NO_METADATA)
    width: int | None = None
    height: int | None = None
    taken_at: str | None = None


@dataclass(slots=True)
class Block:
    """n consecutive rows. `images` (n, d), any float, as the source has them; rows where `has_image` is False are none.

    `texts` (m, d): row j was made of caption `text_part[j]` of row `text_of[j]` of this block.
    """

    facts: list[Facts]
    images: NDArray[Any] | None = None
    has_image: NDArray[np.bool_] | None = None
    texts: NDArray[Any] | None = None
    text_of: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    text_part: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self.facts)


class Matrix(Protocol):
    """Rows of vectors, any of which can be read."""

    dim: int
    count: int

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows start..stop: (stop - start, d) of some float, a copy."""
        ...


class Table(Protocol):
    """What is known of rows, in their order."""

    count: int

    def facts(self, start: int, size: int) -> Iterator[list[Facts]]:
        """From row `start` on, `size` rows at a time; the last time what is left."""
        ...


class Part(Protocol):
    """Rows of a source that lie together (a file, or files of one number).

    `label` comes before the number of a row without an id; `notes`: what the user should know.
    """

    label: str
    notes: tuple[str, ...]
    dim: int
    count: int

    def blocks(self, start: int, size: int) -> Iterator[Block]:
        """From row `start` on, `size` rows at a time; the last time what is left."""
        ...


@dataclass(frozen=True, slots=True)
class Reading:
    """How sources are to be read, beyond what they say themselves; None leaves it to them.

    `ids`: file with ids or facts for the rows. `modality`: "image" or "text", what the vectors were made of.
    """

    ids: str | None = None
    id_column: str | None = None
    vector_column: str | None = None
    modality: str | None = None


@dataclass(frozen=True, slots=True)
class VectorSource:
    """All rows of one path. `fingerprint` changes when one of its files does, or how they are read.

    `path`: what was named, absolute. `folder`: where paths that are not absolute begin. `notes`: for the user.
    """

    path: str
    folder: str
    parts: Sequence[Part]
    fingerprint: str
    notes: tuple[str, ...] = ()

    @property
    def root(self) -> str:
        """What its items are known under in an index: apart from those that indexing the same path makes."""
        return IMPORTED + self.path

    @property
    def dim(self) -> int:
        """d."""
        return self.parts[0].dim

    @property
    def count(self) -> int:
        """How many rows there are."""
        return sum(part.count for part in self.parts)

    def blocks(self, start: int, size: int) -> Iterator[tuple[str, int, Block]]:
        """(label of the part, number of the first row in it, block), from row `start` of the source on."""
        for part in self.parts:
            if start < part.count:
                first = start
                for block in part.blocks(start, size):
                    count = len(block)
                    yield part.label, first, block
                    del block  # whoever has it now decides how long
                    first += count
            start = max(start - part.count, 0)


def rows_at_once(dim: int) -> int:
    """How many rows of that dimension a block holds."""
    return max(min(BLOCK_ROWS, BLOCK_BYTES // (4 * dim)), 64)


def spans(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of pieces of at most `size`."""
    for first in range(start, stop, size):
        yield first, min(first + size, stop)
