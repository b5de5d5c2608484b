"""How rare a candidate is: what it has in common with queries in general counts against it.

Some rows are near to nearly every query (hubs; Radovanović et al. 2010). The mean similarity of a candidate to a bank
of queries, on the scale of the loss that trained the towers, is what the denominator of its softmax would be; taking it
off turns "the candidate likes the query" into "more than others" (querybank normalisation, Bogolin et al. 2022,
arXiv:2112.12777; the inverted softmax of Smith et al. 2017, arXiv:1702.03859).

Decisions:
- The bank holds rows of training captions (for pictures) and of training pictures (for captions), never of the
  collection that is searched or of other queries: an answer does not depend on who else asks.
- It is a part of the score with a weight of its own, fitted on validation lists like the others; no bank, no part.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmsearch.types import Embeddings

SHARPNESS = 20.0
_BLOCK = 256


def rarity(rows: Embeddings, bank: Embeddings, *, sharpness: float = SHARPNESS) -> NDArray[np.float64]:
    """(n, d) unit rows against (m, d) unit rows of the bank -> (n,) in [-1, 1], higher is rarer.

    -log(mean(exp(sharpness · cosines))) / sharpness. Known values: 0 for an empty bank; -c where all cosines are c.
    """
    found = np.zeros(len(rows))
    if not len(bank):
        return found
    for start in range(0, len(rows), _BLOCK):
        cosines = sharpness * (rows[start : start + _BLOCK] @ bank.T)
        highest = cosines.max(axis=1, keepdims=True)
        total = np.exp(cosines - highest).mean(axis=1, dtype=np.float64)
        found[start : start + _BLOCK] = -(highest[:, 0] + np.log(total)) / sharpness
    return found
