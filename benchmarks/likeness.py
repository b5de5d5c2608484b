"""How like two sets of rows are, as a search sees it: what queries of both modalities find in them.

Cosines of the first, tenth and hundredth neighbour (means over the queries); local intrinsic dimension (Levina and
Bickel 2004, maximum likelihood over 20 neighbours, median); hubness (skewness of how often a row is among the ten
nearest, Radovanovic et al. 2010); mean and spread of all cosines; the gap between the modalities (distance between the
mean text query and the mean row), the length of the mean row, and over how many directions the variance is spread
(participation ratio).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmsearch.types import Embeddings

_BLOCK = 1 << 15
_NEAREST = 100
_SAMPLE = 100_000


@dataclass(frozen=True, slots=True)
class Found:
    """What the queries of one modality find. Cosines but for `dimension` and `hubness`."""

    first: float
    tenth: float
    hundredth: float
    dimension: float
    hubness: float
    mean: float
    spread: float


@dataclass(frozen=True, slots=True)
class Likeness:
    """One set of rows. `text`, `image`: by modality of the query."""

    name: str
    rows: int
    text: Found
    image: Found
    gap: float
    mean_length: float
    directions: float


def likeness(name: str, rows: NDArray[np.floating[Any]], *, text: Embeddings, image: Embeddings) -> Likeness:
    """Measure (n, d) rows, n > 100, read in blocks, with (q, d) queries of both modalities."""
    some = np.asarray(rows[:: max(1, len(rows) // _SAMPLE)], np.float32)
    centre = some.mean(0)
    variances = np.linalg.eigvalsh(np.cov((some - centre).T))
    return Likeness(
        name,
        len(rows),
        text=_found(rows, text),
        image=_found(rows, image),
        gap=float(np.linalg.norm(text.mean(0) - centre)),
        mean_length=float(np.linalg.norm(centre)),
        directions=float(variances.sum() ** 2 / (variances**2).sum()),
    )


def _found(rows: NDArray[np.floating[Any]], queries: Embeddings) -> Found:
    best = np.empty((len(queries), 0), np.float32)
    which = np.empty((len(queries), 0), np.int64)
    total = squares = 0.0
    for start in range(0, len(rows), _BLOCK):
        scores = queries @ np.asarray(rows[start : start + _BLOCK], np.float32).T
        total += float(scores.sum(dtype=np.float64))
        squares += float(np.square(scores).sum(dtype=np.float64))
        near = np.argpartition(-scores, min(_NEAREST, scores.shape[1] - 1), axis=1)[:, :_NEAREST]
        best = np.concatenate([best, np.take_along_axis(scores, near, 1)], axis=1)
        which = np.concatenate([which, near + start], axis=1)
        order = np.argsort(-best, axis=1)[:, :_NEAREST]
        best, which = np.take_along_axis(best, order, 1), np.take_along_axis(which, order, 1)
    mean = total / (len(rows) * len(queries))
    spread = (squares / (len(rows) * len(queries)) - mean**2) ** 0.5
    first, tenth, last = (float(best[:, place].mean()) for place in (0, 9, -1))
    return Found(first, tenth, last, _dimension(best[:, :20]), _hubness(which[:, :10], len(rows)), mean, spread)


def _dimension(cosines: Embeddings) -> float:
    """(q, 20) best first -> the local intrinsic dimension around a query, median over queries."""
    distances = np.sqrt(np.maximum(2 - 2 * cosines.astype(np.float64), 1e-9))
    logs = np.log(distances[:, -1:] / distances[:, :-1]).mean(axis=1)
    return float(np.median(1 / np.maximum(logs, 1e-9)))


def _hubness(which: NDArray[np.int64], rows: int) -> float:
    """Skewness of the occurrences. Depends on how many queries and rows there are: compare at equal numbers."""
    counts = np.bincount(which.ravel(), minlength=rows).astype(np.float64)
    away = counts - counts.mean()
    return float((away**3).mean() / max((away**2).mean() ** 1.5, 1e-12))


def table(lines: Iterable[Likeness]) -> str:
    """Markdown, text / image in one cell."""
    names = [field.name for field in fields(Found)]
    head = ["rows", "number", *(f"{name} (text / image)" for name in names), "gap", "mean length", "directions"]
    text = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for line in lines:
        pairs = [f"{getattr(line.text, name):.3g} / {getattr(line.image, name):.3g}" for name in names]
        cells = [line.name, f"{line.rows:,}", *pairs]
        text.append(
            f"| {' | '.join([*cells, f'{line.gap:.3f}', f'{line.mean_length:.3f}', f'{line.directions:.1f}'])} |"
        )
    return "\n".join(text)
