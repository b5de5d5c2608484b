"""Plain FAISS files as other programs write them: their rows taken out, and files written that any FAISS reads.

Decisions:
- A file is mapped where FAISS can map it, and rows are taken out block by block. What is held beside them is 8 bytes a
  row for ids (where the file has some), and for inverted lists FAISS's map of where each row is.
- Rows are in the order they were added, or in that of their ids where inverted lists have ids of their own.
- Inverted lists in FastScan layout are refused: FAISS 1.15 crashes when it is asked for their rows.
- What is compressed (PQ, SQ, RaBitQ) comes out as FAISS approximates it, and `exact` says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import InputError, ResourceError

_EXACT = ("Flat", "Flat1D", "FlatIP", "FlatL2", "HNSWFlat", "IVFFlat", "IVFFlatDedup", "NSGFlat", "RefineFlat")
_OTHER_DO = "Export its vectors as .npy with the program that made it."


class FaissFile:
    """The rows of a FAISS file. `ids`: (n,) int64 where the file has ids of its own, else None (row numbers are)."""

    def __init__(self, path: str, index: Any) -> None:  # noqa: ANN401 - faiss has no types
        faiss = _faiss()
        self._path = path
        self.ids: NDArray[np.int64] | None = None
        if isinstance(index, faiss.IndexIDMap):  # IDMap2 is one as well
            self.ids = faiss.vector_to_array(index.id_map)
            self._outer, index = index, faiss.downcast_index(index.index)
        self._index, self._by_id = index, False
        self.dim, self.count = int(index.d), int(index.ntotal)
        self.kind = type(index).__name__
        self.exact = self.kind.removeprefix("Index") in _EXACT or _is_half(faiss, index)
        self._prepare()

    @classmethod
    def open(cls, path: str) -> Self:
        """Open the file at `path`. Raises `InputError` when it is none, or one whose rows cannot be taken out."""
        faiss = _faiss()
        try:
            with open(path, "rb") as file:  # FAISS takes no undecodable names; the descriptor has a plain one
                name = path if path.isprintable() else f"/dev/fd/{file.fileno()}"
                index = _read(faiss, name)
            return cls(path, index)
        except OSError as error:
            raise InputError(path, expected="a readable file", got=error.strerror or str(error)) from error
        except MemoryError as error:
            raise ResourceError(path, expected="memory for this FAISS index", got="none left") from error
        except RuntimeError as error:
            raise InputError(path, expected="a FAISS index of float vectors", got=_first_line(error)) from error

    def _prepare(self) -> None:
        """Make sure that rows can be taken out by position, or find out by which ids."""
        faiss = _faiss()
        ivf = None if isinstance(self._index, faiss.IndexRefine) else faiss.try_extract_index_ivf(self._index)
        kind = "" if ivf is None else type(faiss.downcast_index(ivf)).__name__
        if "FastScan" in kind:
            raise InputError(self._path, expected="an index whose rows can be taken out", got=kind, do=_OTHER_DO)
        if ivf is not None and self.count:
            own = _ids_of(faiss, ivf)
            if np.array_equal(own, np.arange(self.count)):
                ivf.make_direct_map(True)
            else:
                ivf.set_direct_map_type(faiss.DirectMap.Hashtable)
                self.ids, self._by_id = own, True
        if self.ids is not None and len(self.ids) != self.count:
            raise InputError(self._path, expected=f"{self.count} ids", got=str(len(self.ids)))
        if self.count:
            self.rows(0, 1)

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start..stop, as they were added: (stop - start, d) float32. Raises `InputError` when FAISS cannot."""
        try:
            if self._by_id and self.ids is not None:
                found = self._index.reconstruct_batch(self.ids[start:stop])
            else:
                found = self._index.reconstruct_n(start, stop - start)
        except RuntimeError as error:
            raise InputError(
                self._path, expected="an index whose rows can be taken out", got=f"{self.kind} ({_first_line(error)})",
                do=_OTHER_DO,
            ) from error  # fmt: skip
        rows: NDArray[np.float32] = found
        return rows


def flat_file(blocks: Iterable[NDArray[np.float16]], *, dim: int, count: int) -> Iterator[bytes]:
    """The bytes of a flat half-precision inner-product FAISS file of `count` rows, (b, dim) a block, bounded memory."""
    from mmsearch.index.faiss import FaissFlat

    return FaissFlat.chunks(blocks, dim=dim, count=count)


def _ids_of(faiss: Any, ivf: Any) -> NDArray[np.int64]:  # noqa: ANN401 - faiss has no types
    """The ids in all inverted lists, sorted."""
    lists, found = ivf.invlists, [np.empty(0, np.int64)]
    for number in range(lists.nlist):
        size = lists.list_size(number)
        if size:
            ids = lists.get_ids(number)
            found.append(faiss.rev_swig_ptr(ids, size).astype(np.int64))
            lists.release_ids(number, ids)
    return np.sort(np.concatenate(found))


def _is_half(faiss: Any, index: Any) -> bool:  # noqa: ANN401 - faiss has no types
    """Whether rows are kept as half floats, which is what an index of ours keeps as well."""
    flat = isinstance(index, faiss.IndexScalarQuantizer | faiss.IndexIVFScalarQuantizer)
    return flat and index.sq.qtype == faiss.ScalarQuantizer.QT_fp16


def _read(faiss: Any, name: str) -> Any:  # noqa: ANN401 - faiss has no types
    try:
        return faiss.read_index(name, faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError:
        return faiss.read_index(name)  # some kinds cannot be mapped; what is no index fails again


def _faiss() -> Any:  # noqa: ANN401 - faiss's own types do not know its Python layer
    import faiss

    return faiss


def _first_line(error: Exception) -> str:
    """FAISS's message without the function and the line of its own source."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split("Error: ")[-1][:200]


def is_faiss(magic: bytes) -> bool:
    """Whether a file that begins with those four bytes may be a FAISS index."""
    return len(magic) == 4 and magic[:1] == b"I" and magic.isalnum()
