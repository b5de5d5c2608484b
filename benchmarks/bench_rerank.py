"""Where the time of a warm, re-ranked query goes. A table and one JSON line.

    python benchmarks/bench_rerank.py indexes/photos                  # made with `mmsearch index --tokens`
    python benchmarks/bench_rerank.py indexes/photos --depth 256 --model checkpoints/mine

Milliseconds over 30 texts, model and graphs loaded and everything asked once before: `words` of the text, `tokens` of
the candidates from the index's cache (read, checked, unpacked), `match` (logits of all candidates), `rarity`. `first`
is the search without a second stage (the text's row included), `total` the whole re-ranked search as a user has it.
Bytes a picture are those of its stored tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from mmsearch.rerank.commonness import rarity
from mmsearch.rerank.reranker import Reranker
from mmsearch.rerank.tokens import Patches, unpack
from mmsearch.searcher import Searcher
from mmsearch.store import IndexStore
from mmsearch.store.tokens import TokenStore
from mmsearch.types import Modality

TEXTS = [
    f"{who} {what} {where}"
    for who in ("two dogs", "a woman in a red coat", "an old man", "children", "a white cat")
    for what in ("running over", "sitting on")
    for where in ("a wet beach", "a bench in a park", "the stairs of a house at night")
]
PARTS = ("words", "tokens", "match", "rarity", "first", "total")
T = TypeVar("T")


def timed(times: dict[str, list[float]], part: str, work: Callable[[], T]) -> T:
    """What `work` gives; its milliseconds go to `times`."""
    start = time.perf_counter()
    found = work()
    times[part].append((time.perf_counter() - start) * 1e3)
    return found


class Parts:
    """One index, its re-ranker and its token cache, open and asked part by part."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.depth = options.depth
        self.searcher = Searcher.open(options.index, reranker=options.model)
        found = self.searcher.reranker
        if not isinstance(found, Reranker):
            raise SystemExit("bench_rerank needs a re-ranker in a model directory")
        self.reranker = found
        self.tokens = TokenStore.open(options.index, identity=found.tokens_identity)
        self.snapshot = IndexStore.open(options.index).snapshot()

    def ask(self, text: str) -> dict[str, list[float]]:
        """Milliseconds by part, one each."""
        times: dict[str, list[float]] = {part: [] for part in PARTS}
        reranker = self.reranker
        hits = timed(times, "first", lambda: self.searcher.search_text(text, k=self.depth))
        timed(times, "total", lambda: self.searcher.search_text(text, k=10, rerank=self.depth))
        rows = np.array([self.snapshot.rows_of(hit.item.id, Modality.IMAGE)[0] for hit in hits], np.int64)
        row, vectors = self.searcher.encoder.encode_texts([text]), self.snapshot.vectors(rows)
        words = timed(times, "words", lambda: reranker.read_texts([text]))
        patches = timed(times, "tokens", lambda: self.patches(rows.tolist())) if reranker.reads_tokens else None
        pairs = np.stack([np.zeros(len(rows), np.int64), np.arange(len(rows))], axis=1)
        timed(times, "match", lambda: reranker.logits(words, row, patches, vectors, pairs=pairs))
        timed(times, "rarity", lambda: rarity(vectors, reranker.caption_bank))
        return times

    def patches(self, rows: list[int]) -> Patches:
        """The stored tokens of those pictures."""
        hashes = self.snapshot.content_hashes(rows)
        blobs, config = self.tokens.get(hashes), self.reranker.config
        missing = sum(one not in blobs for one in hashes)
        if missing:
            raise SystemExit(f"{missing} of {len(rows)} candidates have no stored tokens: run mmsearch index --tokens")
        return Patches.concatenate(
            [unpack(blobs[one], p=config.patches, c=config.patch_dim) for one in hashes if one is not None]
        )


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    cpu = platform.processor() or platform.machine()
    return {"cpu": cpu, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "commit": commit}


def main() -> None:
    """Parse, ask every text, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", help="an index directory with stored tokens")
    parser.add_argument("--depth", type=int, default=64, help="candidates that are re-ranked")
    parser.add_argument("--model", help="a model directory with the re-ranker; the index's own without it")
    options = parser.parse_args()
    parts = Parts(options)
    parts.ask("a dog")  # loads what is loaded once
    asked = [parts.ask(text) for text in TEXTS]
    print(f"{'ms':<8}{'p50':>8}{'p95':>8}")
    spread = {}
    for part in PARTS:
        times = [one for found in asked for one in found[part]]
        if times:
            spread[part] = [round(float(np.percentile(times, q)), 2) for q in (50, 95)]
            print(f"{part:<8}" + "".join(f"{one:>8.1f}" for one in spread[part]))
    count = parts.tokens.count
    each = parts.tokens.bytes // count if count else 0
    print(f"{count} pictures with tokens, {each} bytes each")
    facts = {"fusion": parts.reranker.config.fusion, "pictures": count, "bytes_per_picture": each}
    print(json.dumps({"bench": "rerank", "depth": options.depth, **facts, "ms": spread, **machine()}))


if __name__ == "__main__":
    main()
