"""What an evaluation found: values that a table or JSON shows.

Decisions:
- Shares are between 0 and 1 everywhere; only a table multiplies by 100.
- Ranks start at 1. The median of an even number of ranks is the mean of the two in the middle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mmsearch.evaluate.metrics import (
    Floats,
    Ints,
    Ranked,
    hit_at,
    interval,
    ndcg_at,
    recall_at,
    reciprocal_rank_at,
)
from mmsearch.types import Skipped

DEPTHS = (1, 5, 10)
"""The k of hit@k and recall@k."""

_SHARES: Mapping[str, Callable[[Ranked], Floats]] = {
    **{f"hit@{k}": partial(hit_at, k=k) for k in DEPTHS},
    **{f"recall@{k}": partial(recall_at, k=k) for k in DEPTHS},
    "mrr@10": partial(reciprocal_rank_at, k=10),
    "ndcg@10": partial(ndcg_at, k=10),
}


@dataclass(frozen=True, slots=True)
class Direction:
    """One direction of retrieval. `values`: metric -> value; `intervals`: share -> its 95 % interval."""

    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Both directions over `images` pictures and `texts` captions; what was left out is in `skipped`."""

    model: str
    images: int
    texts: int
    text_to_image: Direction
    image_to_text: Direction
    skipped: tuple[Skipped, ...] = ()
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """JSON values: counts, both directions, and their 95 % intervals apart under `ci95`."""
        ways = {"text_to_image": self.text_to_image, "image_to_text": self.image_to_text}
        return {
            "model": self.model,
            "images": self.images,
            "texts": self.texts,
            "skipped": len(self.skipped),
            **{name: dict(way.values) for name, way in ways.items()},
            "ci95": {
                name: {metric: list(ends) for metric, ends in way.intervals.items()} for name, way in ways.items()
            },
        }


def summarise(ranked: Ranked, *, clusters: Ints) -> Direction:
    """All metrics of one direction. `clusters` (q,): the image each query belongs to."""
    shares = {name: metric(ranked) for name, metric in _SHARES.items()}
    return Direction(
        values={
            **{name: float(values.mean()) for name, values in shares.items()},
            "median_rank": float(np.median(ranked.first)),
            "mean_rank": float(ranked.first.mean()),
        },
        intervals={name: interval(values, clusters) for name, values in shares.items()},
    )
