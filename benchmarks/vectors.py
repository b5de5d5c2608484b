"""Rows with the shape of real image vectors, as many as wanted, and real queries of both kinds to search them with.

    mmsearch index DATA/captions.jsonl --out indexes/real   # any photos with captions; the bundled model encodes both
    python benchmarks/vectors.py --real indexes/real --rows 1000000 --out /tmp/vectors-1m

Held out of the index at random: `--queries` photos whose row and whose first caption's row become the image and the
text queries (same contents, two modalities), and as many others for tuning. The rows of all other photos are the base;
when more rows are wanted it is extended by mixing:

    row = unit( (1 - w) a + w (u b1 + (1 - u) b2) + s (c - d) )       w, u uniform in [0, 1]

a is a random photo, b1 and b2 are of its 16 nearest photos, c is of its 32 nearest and d of c's 32 nearest: a
difference between photos that are alike, taken where the new row is, so that the noise has the covariance of the real
residuals there. s is fitted so that held-out photos find their tenth neighbour as near among mixed rows as among as
many real ones. Text rows are never mixed, nor used for anything here: queries of text stay what they are in life.
What came of it is measured (`likeness.py`), printed and kept in `facts.json`.

Writes base.npy (n, d) fp16, text_queries.npy, image_queries.npy, tune_text.npy, tune_image.npy (q, d) float32, and for
both query files the exact answers, truth_text.npz, truth_image.npz: `rows` (q, 100) int64, `scores`, best first. Memory
does not grow with `--rows`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from likeness import Likeness, likeness, table
from numpy.typing import NDArray

from mmsearch.store import IndexStore
from mmsearch.types import Embeddings, Modality, ModelIdentity, Rows, Scores

Half = NDArray[np.float16]
BLOCK = 1 << 15
TRUTH = 100
NEAR, WIDE = 16, 32
"""Of how many nearest photos partners, and differences, are drawn."""


@dataclass(frozen=True, slots=True, eq=False)
class Real:
    """What a real index gives. `base` (n, d); the others (q, d), row i of text and image of one held-out photo."""

    base: Embeddings
    text: Embeddings
    image: Embeddings
    tune_text: Embeddings
    tune_image: Embeddings
    model: ModelIdentity


def read_real(path: str, *, queries: int, seed: int) -> Real:
    """Rows of the index at `path`, split at random into base, queries and tuning queries. It may still be growing."""
    rng = np.random.default_rng(seed)
    with IndexStore.open(path) as store, store.snapshot() as snapshot:
        rows = snapshot.alive_rows(Modality.IMAGE)
        chosen: list[int] = []
        texts: list[int] = []
        for located in snapshot.locate(rng.permutation(rows)[: 3 * queries]):
            captions = snapshot.rows_of(located.item.id, Modality.TEXT)
            if len(captions) and len(chosen) < 2 * queries:
                chosen.append(located.row)
                texts.append(int(captions[0]))
        if len(chosen) < 2 * queries or len(rows) < 4 * queries:
            raise SystemExit(f"{path}: expected {4 * queries} photos, most with captions, got {len(rows)}.")
        base = snapshot.vectors(np.setdiff1d(rows, np.array(chosen, np.int64)))
        text, image = snapshot.vectors(np.array(texts)), snapshot.vectors(np.array(chosen))
        return Real(base, text[:queries], image[:queries], text[queries:], image[queries:], snapshot.model)


def nearest(rows: Embeddings, k: int) -> NDArray[np.int32]:
    """The k nearest other rows of each row, best first: (n, d) -> (n, k)."""
    found = np.empty((len(rows), k), np.int32)
    for start in range(0, len(rows), 1024):
        scores = rows[start : start + 1024] @ rows.T
        lines = np.arange(len(scores))
        scores[lines, start + lines] = -2.0
        best = np.argpartition(-scores, k, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1)
        found[start : start + 1024] = np.take_along_axis(best, order, 1)
    return found


class Mixer:
    """Makes rows out of rows; see the module's docstring."""

    def __init__(self, rows: Embeddings, *, scale: float = 0.5) -> None:
        self.rows, self.scale = rows, scale
        self.near = nearest(rows, WIDE)

    def make(self, count: int, rng: np.random.Generator) -> Embeddings:
        """(count, d) unit rows."""
        a = rng.integers(0, len(self.rows), count)
        w, u = (rng.random((count, 1), np.float32) for _ in range(2))
        made = (1 - w) * self.rows[a]
        made += w * u * self.rows[self.near[a, rng.integers(0, NEAR, count)]]
        made += w * (1 - u) * self.rows[self.near[a, rng.integers(0, NEAR, count)]]
        c = self.near[a, rng.integers(0, WIDE, count)]
        d = self.near[c, rng.integers(0, WIDE, count)]
        made += np.float32(self.scale) * (self.rows[c] - self.rows[d])
        made /= np.linalg.norm(made, axis=1, keepdims=True)
        return made

    def fit(self, queries: Embeddings, *, seed: int) -> None:
        """Set `scale` by bisection: the mean tenth cosine of `queries` is that among the real rows."""
        wanted = _tenth(queries, self.rows)
        low, high = 0.0, 1.5
        for _ in range(8):
            self.scale = (low + high) / 2
            found = _tenth(queries, self.make(len(self.rows), np.random.default_rng(seed)))
            low, high = (self.scale, high) if found > wanted else (low, self.scale)


def _tenth(queries: Embeddings, rows: Embeddings) -> float:
    return float(np.partition(queries @ rows.T, -10, axis=1)[:, -10].mean())


def blocks(mixer: Mixer, count: int, *, seed: int) -> Iterator[tuple[int, Embeddings]]:
    """(first row, rows) of the base, the real rows at random places among the mixed ones."""
    rng = np.random.default_rng(seed)
    real = mixer.rows if count >= len(mixer.rows) else mixer.rows[:count]
    places = np.sort(rng.choice(count, len(real), replace=False))
    real = real[rng.permutation(len(real))]
    for start in range(0, count, BLOCK):
        rows = mixer.make(min(BLOCK, count - start), rng)
        first, last = np.searchsorted(places, (start, start + len(rows)))
        rows[places[first:last] - start] = real[first:last]
        yield start, rows


def write_base(path: Path, mixer: Mixer, count: int, *, seed: int) -> None:
    """base.npy, block by block."""
    base = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(count, mixer.rows.shape[1]))
    for start, rows in blocks(mixer, count, seed=seed):
        base[start : start + len(rows)] = rows
    base.flush()


def exact(base: Half, queries: Embeddings, *, k: int = TRUTH) -> tuple[Scores, Rows]:
    """The k nearest rows of each query, best first, equal scores by row: (n, d) fp16, (q, d) -> (q, k), (q, k)."""
    scores = np.empty((len(queries), 0), np.float32)
    found = np.empty((len(queries), 0), np.int64)
    for start in range(0, len(base), BLOCK):
        rows = base[start : start + BLOCK].astype(np.float32)
        here = queries @ rows.T
        best = np.argpartition(-here, min(k, len(rows) - 1), axis=1)[:, :k]
        scores = np.concatenate([scores, np.take_along_axis(here, best, 1)], axis=1)
        found = np.concatenate([found, best + start], axis=1)
        order = np.lexsort((found, -scores), axis=1)[:, :k]
        scores, found = np.take_along_axis(scores, order, 1), np.take_along_axis(found, order, 1)
    return scores, found


def check(real: Real, mixer: Mixer, base: Half, *, seed: int) -> list[Likeness]:
    """Real rows beside mixed ones at equal sizes; as many made of a thirtieth of the photos; and the whole base."""
    rng = np.random.default_rng(seed + 1)
    n = len(real.base)
    mixed = mixer.make(n, rng)
    grown = Mixer(real.base[rng.permutation(n)[: max(n // 30, 2 * WIDE)]], scale=mixer.scale).make(n, rng)
    few = rng.permutation(n)[: n // 8]

    def line(name: str, rows: Embeddings | Half) -> Likeness:
        return likeness(name, rows, text=real.text, image=real.image)

    lines = [line("real", real.base[few]), line("mixed", mixed[few]), line("real", real.base), line("mixed", mixed)]
    lines.append(line("mixed from 1/30", grown))
    size = 8 * n
    while size < len(base):
        lines.append(line("base", base[:size]))
        size *= 8
    lines.append(line("base, whole", base))
    return lines


def write(out: Path, real: Real, *, rows: int, seed: int, truth: bool) -> list[Likeness]:
    """All files of one set; returns the check."""
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    mixer = Mixer(real.base)
    mixer.fit(real.tune_image, seed=seed)
    write_base(out / "base.npy", mixer, rows, seed=seed)
    base = np.load(out / "base.npy", mmap_mode="r")
    queries = {"text": real.text, "image": real.image}
    for name, found in queries.items():
        np.save(out / f"{name}_queries.npy", found)
        if truth:
            scores, best = exact(base, found)
            np.savez(out / f"truth_{name}.npz", scores=scores, rows=best)
    np.save(out / "tune_text.npy", real.tune_text)
    np.save(out / "tune_image.npy", real.tune_image)
    lines = check(real, mixer, base, seed=seed)
    facts = {
        "rows": rows,
        "dim": base.shape[1],
        "seed": seed,
        "real_rows": len(real.base),
        "queries": len(real.text),
        "model": asdict(real.model),
        "scale": mixer.scale,
        "seconds": round(time.perf_counter() - start, 1),
        "check": [asdict(line) for line in lines],
    }
    (out / "facts.json").write_text(json.dumps(facts, indent=1))
    return lines


def main() -> None:
    """Make one set and print the check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--real", required=True, help="index of photos with captions")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--queries", type=int, default=1000, help="of each kind, and as many for tuning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-truth", action="store_true", help="leave the exact answers out")
    args = parser.parse_args()
    real = read_real(args.real, queries=args.queries, seed=args.seed)
    print(table(write(args.out, real, rows=args.rows, seed=args.seed, truth=not args.no_truth)))


if __name__ == "__main__":
    main()
