"""What a store records about a file that was made of its rows, and what makes one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mmsearch.types import Modality


@dataclass(frozen=True, slots=True)
class Derived:
    """A derived file as the manifest records it.

    `file` is relative to the index directory. It holds one entry for each row of `modality` below
    `rows` in the vector file `vectors`, `count` of them, in row order, dead rows included.
    `xxh3`: of the whole file; `ends`: of its first and last 64 KiB.
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


class DerivedWriter(Protocol):
    """Writes one derived file; `index.faiss.FaissFlat` has one. See `Store.update_derived`."""

    kind: str

    def chunks(self, blocks: Iterable[NDArray[np.float16]], *, dim: int, count: int) -> Iterator[bytes]:
        """The file's bytes, piece by piece, for `count` unit rows that come in `blocks` of (b, dim) fp16."""
        ...
