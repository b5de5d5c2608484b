"""What a store records about a file that was made of its rows, and what makes one.

Decisions:
- The store knows when a file is whole and of which rows; whether it is still good enough, is to be appended to or made
  anew, and how, is its maker's business. The maker's own facts travel as JSON values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mmsearch.types import Embeddings, Modality, Rows


@dataclass(frozen=True, slots=True)
class Derived:
    """A derived file as the manifest records it.

    `file` is relative to the index directory. It holds one entry for each row of `modality` below
    `rows` in the vector file `vectors`, `count` of them, in row order, dead rows included.
    `xxh3`: of the whole file; `ends`: of its first and last 64 KiB. `facts`: its maker's, JSON values.
    """

    file: str
    kind: str
    modality: Modality
    generation: int
    vectors: str
    rows: int
    count: int
    size: int
    xxh3: str
    ends: str
    facts: Mapping[str, Any] = field(default_factory=dict)


class DerivedRows(Protocol):
    """The rows of one modality at one generation, for whoever makes a file of them."""

    @property
    def modality(self) -> Modality:
        """Which rows."""
        ...

    @property
    def dim(self) -> int:
        """d."""
        ...

    @property
    def count(self) -> int:
        """n, dead rows included."""
        ...

    @property
    def stop(self) -> int:
        """Every row number is below this one."""
        ...

    @property
    def dead(self) -> Rows:
        """Sorted rows that are never returned."""
        ...

    @property
    def vectors_path(self) -> str:
        """The file of all rows, d fp16 each; row r begins at byte 2·d·r."""
        ...

    @property
    def work(self) -> str:
        """A folder for what is half made (it need not exist): what a killed maker left there is found again."""
        ...

    def blocks(self, start: int = 0) -> Iterator[tuple[int, NDArray[np.float16]]]:
        """(first row, (b, d)) from row `start` on, each block checked against its checksum."""
        ...

    def vectors(self, rows: Rows) -> Embeddings:
        """(m,) rows of any modality -> (m, d) float32, as they are on the disk."""
        ...

    def sample(self, n: int, *, seed: int) -> Rows:
        """At most n rows that are alive, at random, sorted."""
        ...


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file that is to be put in place. `chunks` are its bytes, about `need` of them.

    `facts` is read after the last chunk.
    """

    kind: str
    chunks: Iterable[bytes]
    need: int
    facts: Mapping[str, Any] = field(default_factory=dict)


class DerivedWriter(Protocol):
    """Makes derived files; see `Store.update_derived`."""

    def make(self, rows: DerivedRows, *, there: Derived | None, path: str | None) -> NewFile | Derived | None:
        """A new file for these rows; `there`, perhaps with other facts, when that is good enough; None for no file.

        `there`: what the manifest records for this modality and vector file; `path`: that file, when it is intact.
        """
        ...
