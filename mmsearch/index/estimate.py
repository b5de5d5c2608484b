"""What a layout will take: memory, disk and minutes, said before a long build begins.

Decisions:
- Minutes come from what this machine does now: one small product of matrices is timed, and the work of training and of
  assigning rows to lists is counted in such products. Graphs are counted in distances, which are that much slower.
- It is an estimate, within a factor of two; `mmsearch info` has what a build really took.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from mmsearch.index import centroids
from mmsearch.index.layouts import Layout

_ITERATIONS = 10
_CODE_BOOK = 16
_CODE_ITERATIONS = 25
_GRAPH_DISTANCES = 9_000
"""Distances that inserting one node into a graph of a million takes (efConstruction 40, M 32), measured."""
_SLOWER_DISTANCES = 6.0
"""A distance outside a product of matrices against one inside, measured."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """`resident`: bytes held while searching. `disk`: bytes of the file. `seconds`: to build it."""

    resident: int
    disk: int
    seconds: float

    def __str__(self) -> str:
        minutes = f"{self.seconds / 60:.0f} minutes" if self.seconds >= 90 else f"{self.seconds:.0f} s"
        memory, disk = f"{self.resident / 1e6:,.0f} MB", f"{self.disk / 1e6:,.0f} MB"
        return f"{memory} in memory while searching, {disk} on disk, about {minutes}"


def estimate(layout: Layout, *, n: int, d: int, flops: float | None = None) -> Estimate:
    """What n rows of d numbers will take. `flops`: multiply-adds a second of this machine, measured when not given."""
    speed = flops or measured_flops(d)
    each = layout.lists if layout.lists < centroids.FROM else 2.0 * layout.lists**0.5  # what a row is compared with
    train = layout.train_rows * each * d * _ITERATIONS
    codes = layout.train_rows * d * _CODE_BOOK * _CODE_ITERATIONS * _SLOWER_DISTANCES if "PQ" in layout.factory else 0.0
    coarse = n * d * (min(layout.lists, 1 << 14) if layout.lists else 0)
    encode = n * d * _CODE_BOOK * _SLOWER_DISTANCES if "PQ" in layout.factory else n * d * _SLOWER_DISTANCES
    graph = n * d * _GRAPH_DISTANCES * _SLOWER_DISTANCES if layout.factory.startswith("HNSW") else 0.0
    resident = int(n * layout.row_bytes)
    disk = resident if resident else 2 * n * d
    return Estimate(resident, disk, (train + codes + coarse + encode + graph) / speed)


def measured_flops(d: int) -> float:
    """Multiply-adds a second of a product like those of a build; takes about a tenth of a second."""
    a, b = np.ones((4096, d), np.float32), np.ones((d, 1024), np.float32)
    a @ b
    rounds = []
    for _ in range(3):
        began = time.perf_counter()
        a @ b
        rounds.append(time.perf_counter() - began)
    return a.shape[0] * d * b.shape[1] / min(rounds)
