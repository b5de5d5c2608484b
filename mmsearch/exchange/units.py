"""Rows from outside as unit rows, and which of them have no direction."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmsearch.types import Embeddings

AS_UNIT = 1e-3
"""A row whose length is this near to 1 is taken as it is: rounding to half precision moves it by less, and rows that
were exported come back bit by bit."""
_SAFE = (1e-12, 1e15)
"""Lengths that float32 squares can tell; beyond them the row is looked at again in float64."""


def unit_rows(rows: NDArray[Any]) -> tuple[Embeddings, NDArray[np.bool_], int]:
    """(n, d) of any float -> ((n, d) float32, (n,) which are unit rows now, how many were scaled to be).

    A row that is zero or holds NaN or infinity has no direction: it becomes zeros, and False.
    Known values: [3, 4] -> [0.6, 0.8]; [0, 0] -> False.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        unit = np.array(rows, dtype=np.float32, order="C")
        norms = np.sqrt(np.einsum("nd,nd->n", unit, unit, dtype=np.float32))  # (n,)
        odd = ~((norms > _SAFE[0]) & (norms < _SAFE[1]))  # also NaN
        ok = ~odd
        scale = ok & (np.abs(norms - 1.0) > AS_UNIT)
        unit[scale] /= norms[scale, None]
        for number in np.flatnonzero(odd):
            found = _unit(np.asarray(rows[number], dtype=np.float64))
            unit[number] = 0.0 if found is None else found
            ok[number] = found is not None
    return unit, ok, int(scale.sum() + (ok & odd).sum())


def _unit(row: NDArray[np.float64]) -> NDArray[np.float64] | None:
    largest = np.abs(row).max(initial=0.0)
    if not np.isfinite(largest) or largest == 0.0:
        return None
    scaled: NDArray[np.float64] = row / largest
    return scaled / np.linalg.norm(scaled)
