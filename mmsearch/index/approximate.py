"""Approximate search by FAISS, with candidates scored again with the rows themselves.

Decisions:
- Entries of an index with inverted lists are known by the store's row numbers, those of any other by their position.
- Candidates are scored again by FAISS's own kernels over the mapped vector file: a flat index whose codes are a view of
  it, so nothing is copied or held. Should a FAISS not allow that, numpy does the same, slower.
- Rows that may not be returned are kept out inside the search (`IDSelector`), so deletions need no rebuild.
- Parameters were tuned for ten answers. For more, and where few rows are allowed, more lists are looked at; where an
  answer comes back short although there are rows, again, until all lists have been looked at.
- One query is searched by one thread: FAISS's barriers cost more than they bring. Several use all threads.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import IndexDamagedError
from mmsearch.index.base import best_first, check_allowed, check_k, padded
from mmsearch.index.faiss import all_but, bitmap
from mmsearch.similarity import check_embeddings
from mmsearch.types import Embeddings, Rows, Scores

_INVERTED = b"Iw"
"""How a file with inverted lists begins."""
_FAST_SCAN = b"IwPf"
"""How one begins whose lists FAISS cannot map."""
_PIECE_BYTES = 64 << 20
"""Candidates of so many queries are scored again at once."""
TUNED_FOR = 10
"""k at which parameters were chosen."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """How hard to look. `probes`: inverted lists; `effort`: nodes a graph keeps in view.

    `factor`: candidates an answer.

    0 where the index has no such thing.
    """

    probes: int = 0
    effort: int = 0
    factor: int = 1


class ApproximateIndex:
    """A FAISS index as a `base.NeighbourIndex` over ids: row numbers of the store, or positions (`by_rows` False).

    `stored`: (rows, d) fp16, all rows of the vector file, for scoring candidates again; needs `by_rows`, or else
    `row_of`, (n,) the store's row of each position.
    """

    def __init__(
        self,
        index: Any,  # noqa: ANN401 - faiss has no types
        *,
        kind: str,
        parameters: Parameters,
        stored: NDArray[np.float16] | None = None,
        row_of: Rows | None = None,
    ) -> None:
        self._index, self.kind, self.parameters = index, kind, parameters
        self._lists, self._graph = lists_of(index), has_graph(index)
        self.by_rows = self._lists > 0
        self._stored, self._row_of = stored, row_of
        self._refined = None if stored is None or not self.by_rows else _over(index, stored)
        self._excluded: tuple[Rows, Any] | None = None
        self._asked: tuple[Parameters, Any, tuple[Any, Any]] | None = None

    @property
    def dim(self) -> int:
        """d."""
        return int(self._index.d)

    @property
    def size(self) -> int:
        """n."""
        return int(self._index.ntotal)

    @property
    def faiss(self) -> Any:  # noqa: ANN401 - faiss has no types
        """The FAISS index itself."""
        return self._index

    def rows_of(self, ids: Rows) -> Rows:
        """Rows of the store for ids, any shape; -1 stays."""
        if self.by_rows or self._row_of is None:
            return ids
        return np.where(ids < 0, -1, self._row_of[ids])

    def search(
        self, queries: Embeddings, k: int, *, allowed: Rows | None = None, excluded: Rows | None = None
    ) -> tuple[Scores, Rows]:
        """See `base.NeighbourIndex.search`; ids instead of rows."""
        queries = check_embeddings(queries, dim=self.dim, where="query")
        check_k(k, len(queries))
        wanted = None if allowed is None else check_allowed(allowed, np.iinfo(np.int64).max)
        if wanted is not None and excluded is not None:
            wanted = wanted[~np.isin(wanted, excluded)]
        there = self.size - (0 if excluded is None else len(excluded)) if wanted is None else len(wanted)
        m = min(k, max(there, 0))
        if m == 0 or not len(queries):
            return padded(np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64), k)
        selector = self._selector(wanted, excluded)
        share = 1.0 if wanted is None else max(len(wanted) / max(self.size, 1), 1e-6)
        with _threads(len(queries)):
            scores, ids = self._searched(queries, m, self._widened(m, share), selector)
        order = best_first(scores, ids)
        return padded(np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1), k)

    def _searched(self, queries: Embeddings, m: int, how: Parameters, selector: Any) -> tuple[Scores, Rows]:  # noqa: ANN401
        """(q, m) best first; looks harder while an answer is short and there is more to look at."""
        while True:
            scores, ids = self._once(queries, m, how, selector)
            short = bool((ids < 0).any())
            if not short or not (self._lists or self._graph):
                break
            harder = replace(how, probes=min(how.probes * 4, self._lists), effort=min(how.effort * 4, self.size))
            if harder == how:
                break
            how = harder
        return np.where(ids < 0, -np.inf, scores).astype(np.float32), ids

    def _once(self, queries: Embeddings, m: int, how: Parameters, selector: Any) -> tuple[Scores, Rows]:  # noqa: ANN401
        base, both = self._asked_of_faiss(how, selector)
        wide = min(m * how.factor, self.size)
        if self._refined is not None and wide > m:
            found: tuple[Scores, Rows] = self._refined.search(queries, m, params=both)
            return found
        scores, ids = self._index.search(queries, wide, params=base)
        if self._stored is None:
            return scores[:, :m], ids[:, :m]
        return _rescored(queries, ids, self.rows_of(ids), self._stored, m)

    def _asked_of_faiss(self, how: Parameters, selector: Any) -> tuple[Any, Any]:  # noqa: ANN401
        """FAISS's parameters for the index, and for the index with candidates scored again; the last ones are kept."""
        kept = self._asked
        if kept is None or kept[0] != how or kept[1] is not selector:
            base, both = search_parameters(self._index, how, selector), None
            if self._refined is not None:
                both = _faiss().IndexRefineSearchParameters(k_factor=float(how.factor), base_index_params=base)
            kept = self._asked = (how, selector, (base, both))
        return kept[2]

    def _widened(self, m: int, share: float) -> Parameters:
        """The tuned parameters for m answers of the allowed share of the rows."""
        how, more = self.parameters, max(1.0, m / TUNED_FOR) / share
        wide = m * how.factor
        return Parameters(
            probes=min(self._lists, max(1, round(how.probes * max(1.0, more**0.5)))) if self._lists else 0,
            effort=min(self.size, max(how.effort, wide, round(how.effort / share))) if self._graph else 0,
            factor=max(1, min(how.factor, -(-self.size // m))),
        )

    def _selector(self, allowed: Rows | None, excluded: Rows | None) -> Any:  # noqa: ANN401 - faiss has no types
        if allowed is not None:
            return bitmap(allowed)
        if excluded is None or not len(excluded):
            return None
        kept = self._excluded  # read once: another thread may be storing another
        if kept is None or kept[0] is not excluded:
            kept = self._excluded = (excluded, all_but(excluded))
        return kept[1]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write FAISS's own file format."""
        _faiss().write_index(self._index, os.fspath(path))


def read_file(path: str, *, mapped: bool = True) -> Any:  # noqa: ANN401 - faiss has no types
    """The FAISS index in a file: mapped as far as FAISS can, or (`mapped` False) read to be added to.

    FAISS maps inverted lists one way and graphs and flat codes another; FastScan's lists it reads. Raises
    `IndexDamagedError` for a file that is no index.
    """
    faiss = _faiss()
    ways = [faiss.IO_FLAG_MMAP_IFC, faiss.IO_FLAG_MMAP] if mapped else [0]
    try:
        with open(path, "rb") as file:  # FAISS takes no undecodable names; the descriptor has a plain one
            begins = file.read(4)
            if begins.startswith(_INVERTED):
                ways = ways[-1:]
            if begins == _FAST_SCAN:  # read whole anyway: the disk may begin
                with contextlib.suppress(OSError, AttributeError):  # a hint that not every system takes
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            name = path if path.isprintable() else f"/dev/fd/{file.fileno()}"
            return _first_that_reads(name, ways)
    except (RuntimeError, OSError) as error:
        text = str(error).strip().splitlines()
        raise IndexDamagedError(path, expected="a FAISS file", got=text[0][:200] if text else repr(error)) from error


def _first_that_reads(name: str, ways: Sequence[int]) -> Any:  # noqa: ANN401 - faiss has no types
    for flags in ways[:-1]:
        with contextlib.suppress(RuntimeError):  # lists behind a transformation
            return _faiss().read_index(name, flags)
    index = _faiss().read_index(name, ways[-1])
    _without_prefetching(index)
    return index


def _without_prefetching(index: Any) -> None:  # noqa: ANN401 - faiss has no types
    """FAISS starts up to 32 threads a query to touch mapped lists beforehand: thirty times the work of a search."""
    faiss = _faiss()
    inverted = faiss.try_extract_index_ivf(index)
    lists = None if inverted is None else faiss.downcast_InvertedLists(inverted.invlists)
    if isinstance(lists, faiss.OnDiskInvertedLists):
        lists.prefetch_nthread = 0


def lists_of(index: Any) -> int:  # noqa: ANN401 - faiss has no types
    """How many inverted lists there are; 0 for an index without."""
    lists = _faiss().try_extract_index_ivf(index)
    return 0 if lists is None else int(lists.nlist)


def imbalance_of(index: Any) -> float:  # noqa: ANN401 - faiss has no types
    """How uneven the lists are: 1 for equal ones, m when all rows are in 1/m of them; 1 without lists."""
    lists = _faiss().try_extract_index_ivf(index)
    return 1.0 if lists is None or not index.ntotal else float(lists.invlists.imbalance_factor())


def has_graph(index: Any) -> bool:  # noqa: ANN401 - faiss has no types
    """Whether it is a graph (HNSW), perhaps behind a transformation."""
    return isinstance(_innermost(index), _faiss().IndexHNSW)


def search_parameters(index: Any, how: Parameters, selector: Any) -> Any:  # noqa: ANN401 - faiss has no types
    """FAISS's search parameters for an index and what it is wrapped in."""
    faiss = _faiss()
    index = faiss.downcast_index(index)
    rest = {} if selector is None else {"sel": selector}
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=search_parameters(index.index, how, selector))
    if isinstance(index, (faiss.IndexRefine,)):
        inner = search_parameters(index.base_index, how, selector)
        return faiss.IndexRefineSearchParameters(k_factor=float(how.factor), base_index_params=inner)
    if isinstance(index, faiss.IndexIDMap):
        return search_parameters(index.index, how, selector)
    if isinstance(index, faiss.IndexIVF):
        coarse = faiss.downcast_index(index.quantizer)
        if isinstance(coarse, faiss.IndexHNSW):
            rest["quantizer_params"] = faiss.SearchParametersHNSW(efSearch=max(64, 2 * how.probes))
        return faiss.SearchParametersIVF(nprobe=max(how.probes, 1), **rest)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=max(how.effort, 1), **rest)
    return faiss.SearchParameters(**rest) if rest else None


def _innermost(index: Any) -> Any:  # noqa: ANN401 - faiss has no types
    faiss = _faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, (faiss.IndexPreTransform, faiss.IndexIDMap)):
        return _innermost(index.index)
    return _innermost(index.base_index) if isinstance(index, faiss.IndexRefine) else index


def _over(index: Any, stored: NDArray[np.float16]) -> Any:  # noqa: ANN401 - faiss has no types
    """`index`, its candidates scored again by a flat index that is a view of `stored`; None if FAISS has no views."""
    faiss = _faiss()
    flat = faiss.IndexScalarQuantizer(index.d, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    bytes_of = np.asarray(stored).view(np.uint8).reshape(-1)
    codes = flat.codes
    try:
        pointer = faiss.swig_ptr(bytes_of)
        codes.is_owned, codes.view_data, codes.view_size = False, pointer, bytes_of.size
        codes.c_ptr, codes.c_size = pointer, bytes_of.size
        if flat.codes.size() != bytes_of.size:
            return None
    except (AttributeError, TypeError, ValueError):
        return None
    flat.ntotal = index.ntotal  # FAISS wants them equal; ids are row numbers, and the codes of all rows are there
    refined = faiss.IndexRefine(index, flat)
    flat.ntotal = refined.ntotal = len(stored)
    refined.referenced_objects = [index, flat, bytes_of]  # what FAISS points at lives as long as it does
    return refined


def _rescored(queries: Embeddings, ids: Rows, rows: Rows, stored: NDArray[np.float16], m: int) -> tuple[Scores, Rows]:
    """The m best of the candidates by their stored rows."""
    scores = np.empty(rows.shape, np.float32)
    step = max(1, _PIECE_BYTES // (6 * max(rows.shape[1], 1) * queries.shape[1]))
    for start in range(0, len(queries), step):
        some = slice(start, start + step)
        wide = np.asarray(stored[np.maximum(rows[some], 0)], dtype=np.float32)  # (b, c, d)
        scores[some] = np.where(rows[some] < 0, -np.inf, np.einsum("qcd,qd->qc", wide, queries[some]))
    order = best_first(scores, ids)[:, :m]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)


@contextlib.contextmanager
def _threads(queries: int) -> Iterator[None]:
    """One thread for one query; FAISS's own choice for several."""
    faiss = _faiss()
    before = faiss.omp_get_max_threads()
    try:
        if queries == 1:
            faiss.omp_set_num_threads(1)
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _faiss() -> Any:  # noqa: ANN401 - faiss's own types do not know its Python layer
    import faiss

    return faiss
