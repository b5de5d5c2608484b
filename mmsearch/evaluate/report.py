"""What an evaluation found: values that a table or JSON shows.

Decisions:
- Shares are between 0 and 1 everywhere; only a table multiplies by 100.
- Ranks start at 1. The median of an even number of ranks is the mean of the two in the middle.
- A direction keeps the ranks it was made of: two models are compared query by query. They are no part of JSON
  and do not count when two evaluations are compared with ==.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
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
    """One direction of retrieval. `values`: metric -> value; `intervals`: share -> its 95 % interval.

    `ranked`: the ranks of each of the q queries; `clusters` (q,): the group that each belongs to.
    """

    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    ranked: Ranked = field(compare=False, repr=False)
    clusters: Ints = field(compare=False, repr=False)

    def cell(self, metric: str) -> str:
        """One metric as a table shows it."""
        value = self.values[metric]
        if metric not in self.intervals:
            return f"{value:.1f}"
        low, high = self.intervals[metric]
        return f"{100 * value:.1f} ± {50 * (high - low):.1f}"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Both directions over `images` pictures and `texts` captions; what was left out is in `skipped`."""

    model: str
    images: int
    texts: int
    text_to_image: Direction
    image_to_text: Direction
    skipped: tuple[Skipped, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def directions(self) -> dict[str, Direction]:
        """Both directions by the names they have in JSON: `text_to_image`, `image_to_text`."""
        return {"text_to_image": self.text_to_image, "image_to_text": self.image_to_text}

    def figures(self) -> dict[str, float]:
        """Every metric of both directions in one flat mapping: `text_to_image/hit@1` and so on."""
        return {
            f"{name}/{metric}": value for name, way in self.directions.items() for metric, value in way.values.items()
        }

    def to_json(self) -> dict[str, Any]:
        """JSON values: counts, both directions, and their 95 % intervals apart under `ci95`."""
        ways = self.directions
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

    def lines(self) -> Iterator[str]:
        """Both directions side by side: shares in per cent, ± half of their 95 % interval, and ranks."""
        yield f"{self.model}: {self.images} images, {self.texts} texts, {self.seconds:.1f} s"
        yield f"{'':<12} {'text -> image':>16} {'image -> text':>16}"
        for metric in self.text_to_image.values:
            cells = (way.cell(metric) for way in self.directions.values())
            yield f"{metric:<12} " + " ".join(f"{cell:>16}" for cell in cells)
        yield "Shares in per cent, ± half of the 95 % interval (bootstrap over images)."


def summarise(ranked: Ranked, *, clusters: Ints) -> Direction:
    """All metrics of one direction. `clusters` (q,): the picture or group each query belongs to."""
    shares = {name: metric(ranked) for name, metric in _SHARES.items()}
    return Direction(
        values={
            **{name: float(values.mean()) for name, values in shares.items()},
            "median_rank": float(np.median(ranked.first)),
            "mean_rank": float(ranked.first.mean()),
        },
        intervals={name: interval(values, clusters) for name, values in shares.items()},
        ranked=ranked,
        clusters=clusters,
    )
