"""Exact search by FAISS over half-precision rows: the stored index's derived file.

Decisions:
- A flat scalar-quantised index (fp16, inner product) holds the very bytes of vectors.f16: the file is
  its header followed by those bytes, so it is written in bounded memory. The header is made by
  patching the row count into one that FAISS wrote; should FAISS ever write it otherwise, that is
  noticed and the file is made by FAISS as a whole.
- Files are mapped, not read (IO_FLAG_MMAP_IFC). FAISS trusts what it reads: callers check sizes and
  checksums first.
- A single query is one thread's work anyway; a batch of queries uses FAISS's threads.
- faiss is imported inside functions: it takes a fifth of a second that `--help` must not pay.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import IndexDamagedError, UsageError
from mmsearch.index.base import best_first, check_allowed, check_k, padded
from mmsearch.similarity import check_embeddings
from mmsearch.types import Embeddings, Rows, Scores

_COUNT_AT = 8
"""Where a FAISS file has its row count: after the four letters of its type and d."""
_BATCH = 8192


class FaissFlat:
    """All rows, exactly, by FAISS's kernels."""

    kind = "faiss-flat"

    def __init__(self, index: Any) -> None:  # noqa: ANN401 - faiss has no types
        self._index = index
        self._excluded: tuple[Rows, Any] | None = None

    @classmethod
    def build(cls, rows: Embeddings) -> Self:
        """An index of (n, d) rows; `UsageError` unless they are unit rows."""
        checked = check_embeddings(rows, where="index rows")
        index = _empty(checked.shape[1])
        for start in range(0, len(checked), _BATCH):
            index.add(checked[start : start + _BATCH])
        return cls(index)

    @property
    def dim(self) -> int:
        """d."""
        return int(self._index.d)

    @property
    def size(self) -> int:
        """n."""
        return int(self._index.ntotal)

    def search(
        self, queries: Embeddings, k: int, *, allowed: Rows | None = None, excluded: Rows | None = None
    ) -> tuple[Scores, Rows]:
        """See `base.NeighbourIndex.search`. Which of several equal rows are among the k is FAISS's choice."""
        faiss = _faiss()
        queries = check_embeddings(queries, dim=self.dim, where="query")
        check_k(k, len(queries))
        wanted = check_allowed(allowed, self.size)
        if wanted is not None and excluded is not None:
            wanted = wanted[~np.isin(wanted, excluded)]
        gone = 0 if excluded is None else len(excluded)
        m = min(k, self.size - gone if wanted is None else len(wanted))
        if m <= 0 or not len(queries):
            empty = (np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64))
            return padded(*empty, k)
        if wanted is None and not gone:
            scores, rows = self._index.search(queries, m)
        else:
            selector = bitmap(wanted) if wanted is not None else self._all_but(excluded)
            scores, rows = self._index.search(queries, m, params=faiss.SearchParameters(sel=selector))
        order = best_first(scores, rows)
        return padded(np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1), k)

    def _all_but(self, excluded: Rows | None) -> Any:  # noqa: ANN401 - faiss has no types
        """The selector of everything else; kept, as long as the same array is asked for."""
        kept = self._excluded  # read once: another thread may be storing another
        if excluded is not None and (kept is None or kept[0] is not excluded):
            kept = self._excluded = (excluded, all_but(excluded))
        return None if kept is None else kept[1]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write FAISS's own file format."""
        with open(path, "wb") as file:
            file.write(_serialised(self._index))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Map a file. Raises `IndexDamagedError` when FAISS refuses it or it is of another kind."""
        faiss = _faiss()
        where = os.fspath(path)
        try:
            with open(path, "rb") as file:  # FAISS takes no undecodable names; the descriptor has a plain one
                name = where if where.isprintable() else f"/dev/fd/{file.fileno()}"
                index = faiss.read_index(name, faiss.IO_FLAG_MMAP_IFC)
        except (RuntimeError, OSError) as error:
            raise IndexDamagedError(where, expected="a FAISS file", got=_first_line(error)) from error
        flat = isinstance(index, faiss.IndexScalarQuantizer) and index.metric_type == faiss.METRIC_INNER_PRODUCT
        if not flat or index.sq.qtype != faiss.ScalarQuantizer.QT_fp16:
            raise IndexDamagedError(where, expected="a flat fp16 inner-product index", got=type(index).__name__)
        return cls(index)

    @staticmethod
    def chunks(blocks: Iterable[NDArray[np.float16]], *, dim: int, count: int) -> Iterator[bytes]:
        """The bytes of a file with `count` rows that come in blocks of (b, dim) little-endian fp16.

        Rows are not checked: they were when they were stored.
        """
        header = _header(dim, count)
        if header is None:
            yield from _whole(blocks, dim)
            return
        yield header
        seen = 0
        for block in blocks:
            seen += len(block)
            yield np.ascontiguousarray(block, dtype="<f2").tobytes()
        if seen != count:
            raise UsageError("faiss file", expected=f"{count} rows", got=str(seen))


def bitmap(ids: Rows) -> Any:  # noqa: ANN401 - faiss has no types
    """FAISS's selector of these ids (sorted)."""
    bits = np.zeros(int(ids[-1]) + 1 if len(ids) else 1, dtype=np.bool_)
    bits[ids] = True
    packed = np.packbits(bits, bitorder="little")
    selector = _faiss().IDSelectorBitmap(packed)
    selector.held = packed  # FAISS points at it
    return selector


def all_but(ids: Rows) -> Any:  # noqa: ANN401 - faiss has no types
    """FAISS's selector of every id but these (sorted)."""
    inner = bitmap(ids)
    selector = _faiss().IDSelectorNot(inner)
    selector.held = inner
    return selector


def _faiss() -> Any:  # noqa: ANN401 - faiss's own types do not know its Python layer
    import faiss

    return faiss


def _empty(dim: int) -> Any:  # noqa: ANN401 - faiss has no types
    faiss = _faiss()
    return faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)


def _serialised(index: Any) -> bytes:  # noqa: ANN401 - faiss has no types
    return bytes(_faiss().serialize_index(index).tobytes())


def _patched(empty: bytes, dim: int, count: int) -> bytes:
    counted = empty[:_COUNT_AT] + struct.pack("<q", count) + empty[_COUNT_AT + 8 : -8]
    return counted + struct.pack("<Q", count * dim * 2)


def _header(dim: int, count: int) -> bytes | None:
    """What comes before `count` rows in a file; None when this FAISS lays its files out differently."""
    empty, one = _serialised(_empty(dim)), _empty(dim)
    row = np.zeros((1, dim), np.float32)
    row[0, -1] = 1.0
    one.add(row)
    if _patched(empty, dim, 1) + row.astype("<f2").tobytes() != _serialised(one):
        return None
    return _patched(empty, dim, count)


def _whole(blocks: Iterable[NDArray[np.float16]], dim: int) -> Iterator[bytes]:
    index = _empty(dim)
    for block in blocks:
        index.add(np.asarray(block, dtype=np.float32))
    yield _serialised(index)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
