"""How n rows are laid out for searching: the named kinds as FAISS factory strings, and which of them fits.

Decisions:
- "auto" is exact below 50,000 rows: that is a few milliseconds, and nothing has to be trained or tuned. Above it is
  IVF-PQ-FastScan whose candidates are scored again with the stored half-precision rows. Product codes alone are poor
  for text queries, which lie off the distribution of the pictures (VIBE's and BigANN's out-of-distribution tracks);
  with the stored rows behind them they need 1/8 of the memory of full rows and are as fast as the best graphs.
- The number of lists is about 4·sqrt(n), where the guide of FAISS's wiki begins; from 4,096 on the nearest lists are
  found by a graph. One 4-bit code stands for two numbers of what a row's list leaves over ("residual"): with four, or
  with codes of the row itself, text queries needed 4 to 16 times as many candidates (a million rows).
- Candidates are scored again only where codes are coarse; the rows come from vectors.f16, so that costs no memory of
  its own but the pages that are touched.
- A raw FAISS factory string is taken as it is, unless it would not be an index of inner products.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mmsearch.errors import UsageError

SMALL = 50_000
"""Fewer rows are searched exactly when nobody asks for anything else."""
AUTO = "auto"
FLAT = "faiss-flat"
"""What a manifest calls the kind `flat`."""
EXACT = "exact"
EXACT_KINDS = (EXACT, "flat")
"""Kinds without anything to learn or to tune."""
_TRAINING_PER_LIST = 40
"""Rows a list's centroid is learned from; FAISS wants 39 to 256."""
_FEWEST_LISTS = 16
_LINKS = 32
"""Neighbours of a node in a graph (M); twice as many on its lowest level."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What FAISS is to build. `lists` 0: no inverted lists. `rescore`: candidates are scored again with stored rows.

    `row_bytes`: memory a row takes while it is searched, stored rows that are scored again not counted.
    `train_rows`: how many rows it learns from; 0 for nothing to learn.
    """

    kind: str
    factory: str
    lists: int
    train_rows: int
    rescore: bool
    row_bytes: float


def lists_for(n: int) -> int:
    """A power of two near 4·sqrt(n), 16 to 262,144. Known value: 4,096 for a million."""
    return int(2 ** min(18, max(4, round(2 + math.log2(max(n, 1)) / 2))))


def layout_of(kind: str, *, n: int, d: int, memory: int | None = None) -> Layout:
    """The layout of n rows of d numbers for a kind's name, "auto" or a FAISS factory string.

    `memory`: bytes that the index may take while it is searched; "auto" obeys it, of the others it is only checked.
    Raises `UsageError` for an unknown name, or when the budget is too small.
    """
    if kind == AUTO:
        return _automatic(n, d, memory)
    if kind in _RECIPES and kind not in EXACT_KINDS and n < _FEWEST_LISTS * 39:
        kind = "flat"  # too few rows to learn from
    layout = _RECIPES[kind](n, d) if kind in _RECIPES else _raw(kind, n, d)
    if memory is not None and n * layout.row_bytes > memory:
        raise UsageError(
            "memory", expected=f"{math.ceil(n * layout.row_bytes):,} bytes for {n:,} rows as {kind}",
            got=f"{memory:,}", do="Allow more, choose another kind, or 'auto'.",
        )  # fmt: skip
    return layout


def kind_names() -> tuple[str, ...]:
    """Every name that `layout_of` knows, "auto" first."""
    return (AUTO, *_RECIPES)


def _automatic(n: int, d: int, memory: int | None) -> Layout:
    if n < SMALL:
        return _RECIPES["flat"](n, d)
    for share in (2, 4, 8, 16, 32):  # numbers of a row that one 4-bit code stands for
        layout = _fast_scan(n, d, share)
        if memory is None or n * layout.row_bytes <= memory:
            return layout
    raise UsageError(
        "memory", expected=f"at least {math.ceil(n * layout.row_bytes):,} bytes for {n:,} rows", got=f"{memory:,}",
        do="Allow more, or split the collection over several machines.",
    )  # fmt: skip


def _flat(n: int, d: int) -> Layout:
    return Layout(FLAT, "SQfp16", 0, 0, rescore=False, row_bytes=0.0)  # mapped; nothing is held


def _exact(n: int, d: int) -> Layout:
    return Layout(EXACT, "", 0, 0, rescore=False, row_bytes=0.0)


def _sq8(n: int, d: int) -> Layout:
    return Layout("sq8", "SQ8", 0, min(n, 100_000), rescore=True, row_bytes=d)


def _inverted(kind: str, codes: str, *, row_bytes: float, rescore: bool) -> Callable[[int, int], Layout]:
    """`codes`: FAISS's name of what a list holds, {m} standing for the number of sub-quantisers."""

    def recipe(n: int, d: int) -> Layout:
        lists = lists_for(n)
        m = _sub_quantisers(d, 4)
        factory = f"{_coarse(lists)},{codes.format(m=m)}"
        return Layout(
            kind, factory, lists, _training(n, lists), rescore, row_bytes * d + 8 + _coarse_bytes(lists, n, d)
        )

    return recipe


def _opq(n: int, d: int) -> Layout:
    lists, m = lists_for(n), _sub_quantisers(d, 4)
    size = m / 2 + 8 + _coarse_bytes(lists, n, d)
    return Layout("opq", f"OPQ{m}_{d},{_coarse(lists)},PQ{m}x4fsr", lists, _training(n, lists), True, size)


def _fast_scan(n: int, d: int, share: int = 2) -> Layout:
    lists, m = lists_for(n), _sub_quantisers(d, share)
    size = m / 2 + 8 + _coarse_bytes(lists, n, d)
    return Layout("ivf-pq-fs", f"{_coarse(lists)},PQ{m}x4fsr", lists, _training(n, lists), True, size)


def _graph(kind: str, codes: str, *, bytes_per_number: int, rescore: bool) -> Callable[[int, int], Layout]:
    def recipe(n: int, d: int) -> Layout:
        size = bytes_per_number * d + 4 * 2 * _LINKS + 16
        return Layout(kind, f"HNSW{_LINKS},{codes}", 0, min(n, 100_000), rescore, size)

    return recipe


_RECIPES: dict[str, Callable[[int, int], Layout]] = {
    "exact": _exact,
    "flat": _flat,
    "sq8": _sq8,
    "ivf-flat": _inverted("ivf-flat", "SQfp16", row_bytes=2, rescore=False),
    "ivf-sq8": _inverted("ivf-sq8", "SQ8", row_bytes=1, rescore=True),
    "ivf-pq": _inverted("ivf-pq", "PQ{m}", row_bytes=0.25, rescore=True),
    "ivf-pq-fs": _fast_scan,
    "opq": _opq,
    "hnsw": _graph("hnsw", "SQfp16", bytes_per_number=2, rescore=False),
    "hnsw-sq8": _graph("hnsw-sq8", "SQ8", bytes_per_number=1, rescore=True),
    "rabitq": _inverted("rabitq", "RaBitQfs", row_bytes=0.25, rescore=True),
}
"""name -> the layout of n rows of d numbers."""


def _sub_quantisers(d: int, share: int) -> int:
    """The largest divisor of d that is at most d / share (1 when d is smaller)."""
    return max((m for m in range(1, max(1, d // share) + 1) if d % m == 0), default=1)


def _coarse(lists: int) -> str:
    """From 4,096 lists on, the nearest ones are found by a graph: comparing with all of them costs more."""
    return f"IVF{lists}_HNSW{_LINKS}" if lists >= 1 << 12 else f"IVF{lists}"


def _coarse_bytes(lists: int, n: int, d: int) -> float:
    return lists * (4 * d + (8 * _LINKS if lists >= 1 << 12 else 0)) / max(n, 1)


def _training(n: int, lists: int) -> int:
    return min(n, _TRAINING_PER_LIST * lists)


def _raw(factory: str, n: int, d: int) -> Layout:
    """A FAISS factory string, taken when FAISS takes it and what it makes can be searched the way all kinds are."""
    if not factory or not factory[0].isupper():
        raise UsageError(
            "index kind",
            expected=f"{', '.join(kind_names())}, or a FAISS factory string such as IVF1024,SQ8",
            got=factory,
        )
    lists, row_bytes, refused = _looked_at(factory, d)
    if refused:
        raise UsageError("index kind", expected=f"a FAISS factory string for d = {d}", got=f"{factory}: {refused}")
    return Layout(factory, factory, lists, min(n, max(_TRAINING_PER_LIST * lists, 65_536)), True, row_bytes)


def _looked_at(factory: str, d: int) -> tuple[int, float, str]:
    """(inverted lists, bytes a row, "") of what FAISS makes of a string, or (0, 0, why it cannot be used)."""
    import faiss

    try:
        made: Any = faiss.index_factory(d, factory, faiss.METRIC_INNER_PRODUCT)  # owns all that is looked at below
    except RuntimeError:
        return 0, 0.0, "FAISS does not take it"
    outer: Any = faiss.downcast_index(made)
    if isinstance(outer, (faiss.IndexIDMap, faiss.IndexIDMap2)):
        return 0, 0.0, "rows are known by the store's numbers"
    if isinstance(outer, faiss.IndexRefine):
        return 0, 0.0, "candidates are scored again with the stored rows already"
    index: Any = faiss.downcast_index(outer.index) if isinstance(outer, faiss.IndexPreTransform) else outer
    searchable = (faiss.IndexIVF, faiss.IndexHNSW, faiss.IndexFlat, faiss.IndexScalarQuantizer, faiss.IndexPQ)
    if not isinstance(index, searchable) or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        return 0, 0.0, f"{type(index).__name__} leaves no rows out, or knows no inner products"
    if isinstance(index, faiss.IndexIVF):
        return int(index.nlist), float(index.code_size) + 8, ""
    if isinstance(index, faiss.IndexHNSW):
        codes: Any = faiss.downcast_index(index.storage)
        return 0, float(codes.code_size) + 8 * _LINKS + 16, ""
    return 0, float(index.code_size), ""
