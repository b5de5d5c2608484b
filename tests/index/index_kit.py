"""Rows, queries and stand-ins for a store's rows: one-line builders for tests of approximate search."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmsearch.similarity import normalise
from mmsearch.types import Modality


def clustered(n: int, d: int = 32, *, seed: int = 0, of: int = 40) -> np.ndarray:
    """Unit rows around a few centres, as half precision holds them: what embeddings look like."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((of, d))
    rows = centres[rng.integers(0, of, n)] + 0.6 * rng.standard_normal((n, d))
    return normalise(rows.astype(np.float32)).astype(np.float16).astype(np.float32)


def off(n: int, d: int = 32, *, seed: int = 1) -> np.ndarray:
    """Queries off the rows' distribution, as texts are."""
    rng = np.random.default_rng(seed)
    return normalise(clustered(n, d, seed=seed) + 0.25 * rng.standard_normal((n, d)).astype(np.float32) + 0.1)


class RowsOfFile:
    """`DerivedRows` over a vector file that holds other rows too: every modality's row r lies where `spans` say."""

    modality = Modality.IMAGE

    def __init__(self, folder: Path, rows: np.ndarray, *, spans=None, dead=()):
        self.spans = spans or [(0, len(rows))]
        self.stop, self.dim = max(stop for _, stop in self.spans), rows.shape[1]
        self.count = sum(stop - start for start, stop in self.spans)
        self.dead, self.work = np.array(dead, np.int64), str(folder / "work")
        self.numbers = np.concatenate([np.arange(a, b) for a, b in self.spans])
        self.all = np.zeros((self.stop, self.dim), "<f2")
        self.all[:, 0] = 1.0
        self.all[self.numbers] = rows[: self.count]
        self.vectors_path = str(folder / "vectors.f16")
        self.all.tofile(self.vectors_path)

    def blocks(self, start=0):
        for first, stop in self.spans:
            for a in range(max(first, start), stop, 1000):
                yield a, self.all[a : min(a + 1000, stop)]

    def vectors(self, rows):
        return self.all[rows].astype(np.float32)

    def sample(self, n, *, seed):
        rows = np.setdiff1d(self.numbers, self.dead)
        chosen = np.random.default_rng(seed).choice(len(rows), size=min(n, len(rows)), replace=False)
        return rows[np.sort(chosen)]


class Told:
    """A `Progress` that remembers what it was told."""

    def __init__(self):
        self.notes, self.parts, self.advanced = [], [], 0

    def start(self, total, *, what="", unit=""):
        self.parts.append(what)

    def advance(self, n, *, note=""):
        self.advanced += n

    def note(self, text):
        self.notes.append(text)
