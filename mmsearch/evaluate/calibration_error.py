"""How far stated probabilities are from what comes true.

Decisions:
- Bins are equally wide and closed on the right, (0, 1/15], (1/15, 2/15] and so on, as in Guo et al. 2017; a
  probability of exactly 0 belongs to the first.
- A bin without pairs has no mean: the table leaves it out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmsearch.errors import InputError, UsageError

BINS = 15
"""How many bins Guo et al. 2017 use, and most papers after them."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs with a probability in (`low`, `high`]: how many, their mean probability, the share that is true."""

    low: float
    high: float
    count: int
    mean: float
    share: float

    def to_json(self) -> dict[str, Any]:
        """JSON values; probabilities and shares in [0, 1]."""
        return asdict(self)


def reliability(p: ArrayLike, y: ArrayLike, bins: int = BINS) -> tuple[Bin, ...]:
    """Stated against true, bin by bin; bins without pairs are left out.

    `p` (n,): probabilities in [0, 1]. `y` (n,): 0 or 1, what came true. Raises `InputError` for anything else,
    `UsageError` for `bins` below 1.
    """
    stated, true = checked_pairs(p, y)
    which = bin_of(stated, bins)
    counts = np.bincount(which, minlength=bins)
    sums, hits = (np.bincount(which, weights=values, minlength=bins) for values in (stated, true))
    return tuple(
        Bin(i / bins, (i + 1) / bins, int(counts[i]), float(sums[i] / counts[i]), float(hits[i] / counts[i]))
        for i in np.flatnonzero(counts).tolist()
    )


def expected_calibration_error(p: ArrayLike, y: ArrayLike, bins: int = BINS) -> float:
    """Mean over pairs of their bin's |share that is true - mean probability|, in [0, 1] (Guo et al. 2017, equation 3).

    `p`, `y` (n,) as for `reliability`. Known values: 0 for p equal to y; 0.5 where 1 is said of pairs of which half
    are true. It is never negative, so that small samples of an honest probability come out above 0.
    """
    table = reliability(p, y, bins)
    total = sum(one.count for one in table)
    return sum(one.count * abs(one.share - one.mean) for one in table) / total


def bin_of(p: Floats, bins: int) -> Ints:
    """(n,) number of each probability's bin, 0 to bins - 1."""
    if bins < 1:
        raise UsageError("bins", expected="1 or more", got=str(bins))
    which: Ints = np.clip(np.ceil(p * bins) - 1, 0, bins - 1).astype(np.int64)
    return which


def checked_pairs(p: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats]:
    """Both as (n,) float64, n >= 1; `InputError` unless p is in [0, 1] and y is 0 or 1."""
    stated, true = np.asarray(p, np.float64), np.asarray(y, np.float64)
    if stated.ndim != 1 or stated.shape != true.shape or not len(stated):
        raise InputError("probabilities", expected="one for each label", got=f"shapes {stated.shape} and {true.shape}")
    wrong = ~((stated >= 0) & (stated <= 1))  # NaN is neither
    if wrong.any():
        raise InputError("probabilities", expected="numbers from 0 to 1", got=str(stated[wrong][0]))
    if not np.isin(true, (0.0, 1.0)).all():
        raise InputError("labels", expected="0 or 1", got=str(true[~np.isin(true, (0.0, 1.0))][0]))
    return stated, true
