"""The second stage of one search: candidates of the first stage in the order of what a re-ranker makes of them.

Decisions:
- Only the candidates down to the depth compete, and all hits that are shown have competed: one list has one kind of
  score. Whoever asks for more hits than the depth gets a greater depth.
- Candidates are ordered by their final score, calibrated log-odds, which can be compared between items with a picture,
  with texts, or with both; ties keep the first stage's order. The score that is shown is the probability.
- "auto" never opens a picture: it re-ranks where at least 90 % of the pictures have stored tokens, and the others are
  judged by their cosine. A depth that was named reads files where tokens are missing.
- `budget_ms` is the time of the second stage alone, of a re-ranker that has been `warmed`. The first 8 candidates are
  read and timed; then as many follow as fit into what is left at that pace. At least 8 and at least as many as are to
  be shown are read, whatever they cost.
- Candidates that no fitted case of the scoring covers come last, with their cosine as score and without a probability;
  a note says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import ModelError
from mmsearch.evidence import Gathers, HoldsTokens, Means, Question, Reranks, gathering
from mmsearch.rerank.calibration import probability_of
from mmsearch.rerank.commonness import rarity
from mmsearch.rerank.request import STORE_TOKENS, Rerank, no_probabilities
from mmsearch.rerank.scores import PARTS, Evidence, Scoring
from mmsearch.types import Hit

if TYPE_CHECKING:
    from mmsearch.encoder import Encodes
    from mmsearch.store.base import Snapshot

TRIAL = 8
"""Candidates that are read before it is known how many fit into a budget."""
AT_ONCE = 64
"""Candidates in one step: patch tokens of so many are in memory, some KB each."""
ENOUGH_STORED = 0.9

NOTHING = "nothing in this index matches"
CAPTIONS_INSTEAD = "Captions for a picture can be re-ranked: --to text."

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Reordered:
    """Hits of the second stage, the best first, and what the user should know about them."""

    hits: tuple[Hit, ...]
    notes: tuple[str, ...] = ()


def warmed(reranker: Reranks, *, of_text: bool) -> Reranks:
    """The same, after two pairs of nothing: graphs and banks are there, and the first candidates are timed as others.

    `of_text`: one text and pictures, else one picture and captions.
    """
    size = reranker.preprocessing.size
    rows = np.zeros((2, reranker.towers.dim), np.float32)
    patches = reranker.read_pixels(np.zeros((2, size, size, 3), np.uint8)) if reranker.reads_tokens else None
    pairs = np.array([[0, 0], [0, 1]] if of_text else [[0, 0], [1, 0]], np.int64)
    reranker.logits(reranker.read_texts(["a", "b"]), rows, patches, rows, pairs=pairs)
    rarity(rows[:1], reranker.caption_bank if of_text else reranker.picture_bank)
    return reranker


class SecondStage:
    """Re-orders candidates of single queries. `tokens`: stored patch tokens of the index, None when it has none.

    `clock` gives seconds. Thread-safe as far as re-ranker, encoder and tokens are.
    """

    def __init__(
        self,
        reranker: Reranks,
        encoder: Encodes,
        tokens: HoldsTokens | None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._reranker, self._encoder, self._tokens, self._clock = reranker, encoder, tokens, clock

    def reorder(
        self, question: Question, hits: Sequence[Hit], *, snapshot: Snapshot, to: str, k: int, asked: Rerank
    ) -> Reordered | None:
        """The best k of `hits`, candidates in first-stage order; None: "auto" leaves them as they are.

        `to`: what was searched, "image", "text" or "any". Raises `UsageError` where probabilities are asked for and
        there is nothing to read together, `ModelError` for `cut` with a re-ranker that has no cut-off.
        """
        began = self._clock()
        if asked.is_auto and to == "text" and question.text is not None and not asked.needs_probabilities:
            return None  # texts for a text: nothing would change places
        means = Means(self._reranker, self._encoder, snapshot, self._tokens, decode=not asked.is_auto)
        gather = gathering(question, hits[: asked.competing(k)], to=to, means=means)
        if gather is None:
            if asked.needs_probabilities:
                raise no_probabilities("pictures like a picture, which no words describe", do=CAPTIONS_INSTEAD)
            note = f"not re-ranked: pictures like a picture have no words to be read with. {CAPTIONS_INSTEAD}"
            return None if asked.is_auto else Reordered(tuple(hits[:k]), (note,))
        if asked.is_auto and gather.stored < ENOUGH_STORED:
            if asked.needs_probabilities:
                raise no_probabilities(f"stored tokens of {gather.stored:.0%} of the candidates", do=STORE_TOKENS)
            return None
        hits = hits[: asked.competing(k)]
        if not hits:
            return Reordered((), (NOTHING,) if asked.needs_probabilities else ())
        evidence = self._gathered(gather, len(hits), k=k, budget_ms=asked.budget_ms, began=began)
        notes = list(_notes(gather, read=len(evidence), of=len(hits), asked=asked))
        return _ranked(hits[: len(evidence)], evidence, self._reranker.scoring, k=k, asked=asked, notes=notes)

    def _gathered(self, gather: Gathers, count: int, *, k: int, budget_ms: float | None, began: float) -> Evidence:
        """Evidence on the first of `count` candidates: all of them, or as many as fit into the budget."""
        first = min(TRIAL if budget_ms is not None else AT_ONCE, count)
        started = self._clock()
        parts = [gather.evidence(slice(0, first))]
        depth = count
        if budget_ms is not None:
            now = self._clock()
            pace, left = (now - started) / first, budget_ms / 1000 - (now - began)
            more = count if pace <= 0 else int(max(left, 0.0) / pace)
            depth = min(count, max(first + more, TRIAL, k))
        parts += [gather.evidence(slice(low, min(low + AT_ONCE, depth))) for low in range(first, depth, AT_ONCE)]
        return Evidence(*(np.concatenate([getattr(part, name) for part in parts]) for name in PARTS))


def _notes(gather: Gathers, *, read: int, of: int, asked: Rerank) -> Sequence[str]:
    notes = []
    if gather.unread and not asked.is_auto:
        several = "pictures" if gather.unread > 1 else "picture"
        notes.append(f"{gather.unread} {several} could not be read and keep the evidence of the first stage")
    if read < of:
        notes.append(f"{read} of {of} candidates were re-ranked: the budget is {asked.budget_ms:g} ms")
    return notes


def _ranked(
    hits: Sequence[Hit], evidence: Evidence, scoring: Scoring, *, k: int, asked: Rerank, notes: list[str]
) -> Reordered:
    covered = scoring.covers(evidence)
    final = np.full(len(hits), -np.inf)
    final[covered] = scoring.final(evidence.take(covered))
    order = np.argsort(-final, kind="stable")
    kept = [int(place) for place in order[: _cut(final[order], scoring, asked, notes)]]
    parts = shown_parts(evidence, scoring)
    if not covered[kept[:k]].all():
        notes.append("some hits are of a kind that this re-ranker does not judge: they come last, by their cosine")
    chosen = [
        _judged(replace(hits[place], rank=rank), float(final[place]), parts[place])
        for rank, place in enumerate(kept[:k], 1)
    ]
    return Reordered(tuple(chosen), tuple(notes))


def _judged(hit: Hit, final: float, parts: Mapping[str, float]) -> Hit:
    if final == -np.inf:
        return hit
    probability = float(probability_of(final))
    return replace(hit, score=probability, probability=probability, parts=parts)


def _cut(ranked: Floats, scoring: Scoring, asked: Rerank, notes: list[str]) -> int:
    """How many of the (m,) final scores, best first, are let through."""
    known = ranked[ranked > -np.inf]
    keep = len(ranked)
    if asked.cut is not None:
        if scoring.cutoff is None:
            raise ModelError("re-ranker", expected="a cut-off", got="none", do="Use a least probability instead.")
        keep = scoring.cutoff.decide(known) if len(known) else 0
        if not keep:
            notes.append(NOTHING)
    if asked.min_probability is not None and keep:
        probable = int((probability_of(known) >= asked.min_probability).sum())
        if not probable:
            notes.append(f"{NOTHING} with a probability of {asked.min_probability:g} or more")
        keep = min(keep, probable)
    return keep


def shown_parts(evidence: Evidence, scoring: Scoring) -> list[dict[str, float]]:
    """What every final score is made of: the evidence by name, what each `from_...` gave, and their sum, `log_odds`.

    Empty for candidates that the scoring does not cover.
    """
    found: list[dict[str, float]] = [{} for _ in range(len(evidence))]
    covered = np.flatnonzero(scoring.covers(evidence))
    judged = evidence.take(covered)
    given, final = scoring.parts(judged), scoring.final(judged)
    for row, place in enumerate(covered.tolist()):
        shares = {name: float(values[row]) for name, values in given.items() if not np.isnan(values[row])}
        raw = {name: float(getattr(judged, name)[row]) for name in PARTS if name in shares}
        gave = {f"from_{name}": value for name, value in shares.items()}
        found[place] = {**raw, **gave, "log_odds": float(final[row])}
    return found


__all__ = ["Question", "Reordered", "Rerank", "Reranks", "SecondStage", "shown_parts"]
