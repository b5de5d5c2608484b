"""First-stage lists and a second stage's scores of their best -> ranks, and an evaluation of both directions.

Decisions:
- Only the candidates of a query change places, among themselves: whatever stood below them keeps its first-stage rank.
- Ties are pessimistic here as well: a candidate that scores as high as a relevant one stands before it.
- Pure: which candidates there are and what they score comes in; no model, no files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import UsageError
from mmsearch.evaluate.metrics import Floats, Ints, Ranked
from mmsearch.evaluate.report import Direction, Evaluation, summarise
from mmsearch.similarity import top_k
from mmsearch.types import Embeddings


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The best of q queries: `rows` (q, n) positions, best first, and their `cosines` (q, n) of the first stage.

    `final`: their (q, n) scores of the second stage, higher is better; any scale that is one for all.
    """

    rows: Ints
    cosines: Floats
    final: Floats | None = None


def best_candidates(queries: Embeddings, candidates: Embeddings, n: int, *, block: int = 512) -> Candidates:
    """The n nearest rows of each query by cosine (all of them where there are fewer), a block of queries at a time.

    `queries` (q, d), `candidates` (m, d) unit rows. Memory: (block, m) floats.
    """
    if n < 1:
        raise UsageError("candidates", expected="1 or more", got=str(n))
    parts = [top_k(queries[low : low + block] @ candidates.T, n) for low in range(0, len(queries), block)]
    return Candidates(
        np.concatenate([rows for _, rows in parts]), np.concatenate([scores for scores, _ in parts]).astype(np.float64)
    )


def drawn_apart(apart: NDArray[np.bool_], draw: np.random.Generator) -> Ints:
    """(q, n) which candidates may be drawn -> (q,) the place of one of them, any alike; -1 where there is none."""
    weight = np.where(apart, draw.random(apart.shape), -1.0)
    return np.where(apart.any(axis=1), weight.argmax(axis=1), -1)


def reranked(first: Ranked, candidates: Candidates, *, query_groups: Ints, candidate_groups: Ints) -> Ranked:
    """Ranks after the second stage. `first`: those of the first, of the same queries and groups.

    `query_groups` (q,), `candidate_groups` (m,): a candidate is relevant to the queries of its group.
    Known values: final scores that fall along each list change nothing but ties; a relevant candidate that scores
    highest has rank 1; one that is no candidate keeps its rank.
    """
    if candidates.final is None or candidates.final.shape != candidates.rows.shape:
        got = "none" if candidates.final is None else str(candidates.final.shape)
        raise UsageError("final scores", expected=str(candidates.rows.shape), got=got)
    if len(candidates.rows) != len(first.starts) - 1 or np.isnan(candidates.final).any():
        raise UsageError("final scores", expected=f"numbers for {len(first.starts) - 1} queries", got="others or NaN")
    relevant = candidate_groups[candidates.rows] == query_groups[:, None]  # (q, n)
    depth = candidates.rows.shape[1]
    ranks = first.ranks.copy()
    for query, (own, final) in enumerate(zip(relevant, candidates.final, strict=True)):
        low, high = int(first.starts[query]), int(first.starts[query + 1])
        there = int(own.sum())
        mine = np.sort(final[own])[::-1]
        ahead = (final[~own][None, :] >= mine[:, None]).sum(axis=1)  # (there,)
        ranks[low : low + there] = ahead + np.arange(there) + 1
        rest = np.arange(high - low - there) + depth + 1  # a tie at the border must not bring one up
        ranks[low + there : high] = np.maximum(first.ranks[low + there : high], rest)
    return Ranked(ranks, first.starts)


def evaluate_reranked(
    first: Evaluation, to_image: Candidates, to_text: Candidates, *, groups: tuple[Ints, Ints]
) -> Evaluation:
    """What `first` becomes when its candidates stand in the order of their final scores, both ways.

    `to_image`: pictures for each caption; `to_text`: captions for each picture. `groups`: of captions, of pictures.
    """
    texts, images = groups
    depth = max(to_image.rows.shape[1], to_text.rows.shape[1])
    return Evaluation(
        model=f"{first.model}, top {depth} re-ranked",
        images=first.images,
        texts=first.texts,
        text_to_image=_again(first.text_to_image, to_image, queries=texts, candidates=images),
        image_to_text=_again(first.image_to_text, to_text, queries=images, candidates=texts),
        skipped=first.skipped,
        warnings=first.warnings,
    )


def _again(way: Direction, found: Candidates, *, queries: Ints, candidates: Ints) -> Direction:
    ranked = reranked(way.ranked, found, query_groups=queries, candidate_groups=candidates)
    return summarise(ranked, clusters=way.clusters)
