"""Pairs -> both stages -> what the second one changes, in both directions.

Decisions:
- The same pictures and captions go through both stages, so that the gain is paired, query by query (`comparison`).
- A caption and a picture that are candidates of each other are read together once, whichever way they were found.
- Patches are kept as they would be in an index, int8; words are held for one block of captions.
- What is measured are pictures and captions alone: no item has both, so the final score is that of a picture.
- Yes and no, and the cut-off, are measured on the pairs that are read anyway (`stages`): on a split that nothing was
  fitted on, when the user names one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmsearch.data.loading import Loader
from mmsearch.data.pairs import read_pairs
from mmsearch.errors import InputError, UsageError
from mmsearch.evaluate.comparison import compare
from mmsearch.evaluate.evaluator import Encoded, encode_pairs
from mmsearch.evaluate.reranked import Candidates, best_candidates, evaluate_reranked
from mmsearch.evaluate.rows import evaluate_rows
from mmsearch.evaluate.stages import Stages, cut_off, hard_rivals, matched
from mmsearch.progress import Progress, SilentProgress
from mmsearch.rerank.calibration import probability_of
from mmsearch.rerank.commonness import rarity as rarity_of
from mmsearch.rerank.request import MAX_DEPTH
from mmsearch.rerank.scores import Evidence
from mmsearch.rerank.tokens import Patches
from mmsearch.types import Embeddings, Pixels, Skipped

if TYPE_CHECKING:
    from mmsearch.encoder import Encodes
    from mmsearch.evidence import Reranks

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

MOST_STRANGERS = 1000
TEXTS_AT_ONCE = 32
"""Captions whose words are held at a time."""


def evaluate_stages(
    path: str | Path,
    *,
    load: Callable[[], tuple[Encodes, Reranks]],
    depth: int,
    split: str | None = None,
    absent: str | Path | None = None,
    workers: int | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
    **options: Any,  # noqa: ANN401 - as `encode_pairs` has them
) -> Stages:
    """Evaluate one model on the pairs in `path` without and with its second stage, which re-orders the best `depth`.

    `load` gives encoder and re-ranker. `absent`: pairs of another collection, whose captions are asked of this one's
    pictures, where none may answer (the first caption of 1,000 of them, drawn by a fixed seed).
    Raises as `evaluator.evaluate_file`, `UsageError` for a depth outside 1..1000.
    """
    if not 1 <= depth <= MAX_DEPTH:
        raise UsageError("--rerank", expected=f"1 to {MAX_DEPTH}", got=str(depth))
    began, told = time.monotonic(), progress or SilentProgress()
    strangers = None if absent is None else _captions_of(absent)  # a wrong name is said before hours of encoding
    encoder, reranker = load()
    skipped: list[Skipped] = []
    pairs = read_pairs(str(path), split=split, on_skip=skipped.append)
    watching = _Watching(encoder, reranker)
    with Loader(preprocessing=encoder.preprocessing, workers=workers) as loader:
        encoded = encode_pairs(pairs, encoder=watching, loader=loader, batch_size=batch_size, progress=told, **options)
    first = evaluate_rows(
        encoded.text_rows,
        encoded.image_rows,
        text_groups=encoded.text_groups,
        image_groups=encoded.image_groups,
        model=encoder.identity.name,
    )
    first = replace(first, skipped=(*skipped, *encoded.skipped), seconds=time.monotonic() - began)
    patches = watching.patches()
    found = scored(encoded, patches, reranker=reranker, depth=depth, progress=told)
    strange = None
    if strangers is not None:
        nobody = np.full(len(strangers), -1)
        rows = encoder.encode_texts(strangers)
        asked = replace(encoded, texts=strangers, text_rows=rows, text_groups=nobody, owners=nobody)
        strange = _answers(asked, patches, reranker=reranker, depth=depth, progress=told)
    groups = {"text_groups": encoded.text_groups, "image_groups": encoded.image_groups}
    second = evaluate_reranked(first, found.to_image, found.to_text, groups=(encoded.text_groups, encoded.image_groups))
    both = compare(first, replace(second, seconds=time.monotonic() - began))
    return Stages(
        both.before,
        both.after,
        both.differences,
        matched(found.true, _probabilities(found, **groups), owners=encoded.owners, model=second.model),
        cut_off(reranker.scoring.cutoff, found.to_image, owners=encoded.owners, strangers=strange, **groups),
    )


def _captions_of(path: str | Path) -> tuple[str, ...]:
    """The first caption of some of the pairs."""
    captions = [pair.captions[0] for pair in read_pairs(str(path), on_skip=lambda skipped: None) if pair.captions]
    if not captions:
        raise InputError(str(path), expected="pairs with captions", got="none", do="Name another table.")
    drawn = np.sort(np.random.default_rng(0).permutation(len(captions))[:MOST_STRANGERS])
    return tuple(captions[place] for place in drawn)


def _answers(asked: Encoded, patches: Patches | None, *, reranker: Reranks, depth: int, progress: Progress) -> Floats:
    """(m, depth) final scores of the best pictures of each caption."""
    found = best_candidates(asked.text_rows, asked.image_rows, depth)
    numbers = _numbers(found.rows, len(asked.image_rows), queries_are_texts=True)
    every = np.unique(numbers)
    progress.start(len(every), what="asking strange captions", unit="pairs")
    logits = _logits(every, asked, patches, reranker=reranker, progress=progress)
    rarity = rarity_of(asked.image_rows, reranker.caption_bank)
    final = partial(_final, every=every, logits=logits, reranker=reranker)
    return final(numbers.ravel(), found.cosines.ravel(), rarity[found.rows.ravel()]).reshape(numbers.shape)


def _final(
    numbers: Ints, cosines: Floats, rarity: Floats, *, every: Ints, logits: NDArray[np.float32], reranker: Reranks
) -> Floats:
    """(m,) final scores of pairs by their numbers; `logits` (n,) are those of the sorted numbers `every`."""
    own = logits[np.searchsorted(every, numbers)]
    return reranker.scoring.final(Evidence.of(cosine=np.clip(cosines, -1, 1), logit=own, rarity=rarity))


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """Pictures for each caption and captions for each picture with their final scores; `true` (m,): the probability of
    each caption with its own picture.
    """

    to_image: Candidates
    to_text: Candidates
    true: Floats


def _probabilities(found: Scored, *, text_groups: Ints, image_groups: Ints) -> Floats:
    """(m,) of each caption with one hard rival of its picture; NaN where it has none."""
    places = hard_rivals(found.to_image, text_groups=text_groups, image_groups=image_groups)
    final = np.asarray(found.to_image.final)[np.arange(len(places)), places]
    return np.where(places < 0, np.nan, probability_of(final))


def scored(encoded: Encoded, patches: Patches | None, *, reranker: Reranks, depth: int, progress: Progress) -> Scored:
    """The best `depth` of each list, and the true pairs, read together."""
    to_image = best_candidates(encoded.text_rows, encoded.image_rows, depth)
    to_text = best_candidates(encoded.image_rows, encoded.text_rows, depth)
    count = len(encoded.image_rows)
    numbers = (_numbers(to_image.rows, count, queries_are_texts=True), _numbers(to_text.rows, count))
    true = np.arange(len(encoded.owners), dtype=np.int64) * count + encoded.owners
    every = np.unique(np.concatenate([true, *(one.ravel() for one in numbers)]))  # caption after caption
    progress.start(len(every), what="re-ranking", unit="pairs")
    logits = _logits(every, encoded, patches, reranker=reranker, progress=progress)

    final = partial(_final, every=every, logits=logits, reranker=reranker)

    def with_final(found: Candidates, number: Ints, rarity: Floats) -> Candidates:
        own = final(number.ravel(), found.cosines.ravel(), rarity[found.rows.ravel()])
        return replace(found, final=own.reshape(number.shape))

    of_pictures = rarity_of(encoded.image_rows, reranker.caption_bank)
    cosines = np.einsum("md,md->m", encoded.text_rows, encoded.image_rows[encoded.owners]).astype(np.float64)
    return Scored(
        with_final(to_image, numbers[0], of_pictures),
        with_final(to_text, numbers[1], rarity_of(encoded.text_rows, reranker.picture_bank)),
        probability_of(final(true, cosines, of_pictures[encoded.owners])),
    )


def _numbers(rows: Ints, pictures: int, *, queries_are_texts: bool = False) -> Ints:
    """(q, n) candidates -> one number for each pair of a caption and a picture: caption · pictures + picture."""
    queries = np.arange(len(rows), dtype=np.int64)[:, None]
    return queries * pictures + rows if queries_are_texts else rows * pictures + queries


def _logits(
    every: Ints, encoded: Encoded, patches: Patches | None, *, reranker: Reranks, progress: Progress
) -> NDArray[np.float32]:
    """(m,) sorted numbers of pairs -> (m,) logits, a block of captions at a time."""
    pictures = len(encoded.image_rows)
    found = np.empty(len(every), np.float32)
    for low in range(0, len(encoded.texts), TEXTS_AT_ONCE):
        high = min(low + TEXTS_AT_ONCE, len(encoded.texts))
        part = slice(*np.searchsorted(every, [low * pictures, high * pictures]).tolist())
        own = np.stack([every[part] // pictures - low, every[part] % pictures], axis=1)
        there, which = np.unique(own[:, 1], return_inverse=True)
        found[part] = reranker.logits(
            reranker.read_texts(encoded.texts[low:high]) if reranker.reads_tokens else None,
            encoded.text_rows[low:high],
            None if patches is None else patches.take(there),
            encoded.image_rows[there],
            pairs=np.stack([own[:, 0], which], axis=1),
        )
        progress.advance(len(own))
    return found


class _Watching:
    """An encoder that has the re-ranker read every batch of pictures as well, while their pixels are there."""

    def __init__(self, encoder: Encodes, reranker: Reranks) -> None:
        self._encoder, self._reranker = encoder, reranker
        self.identity, self.preprocessing = encoder.identity, encoder.preprocessing
        self.max_tokens, self.source = encoder.max_tokens, encoder.source
        self._parts: list[Patches] = []

    @property
    def dim(self) -> int:
        return self._encoder.dim

    def encode_texts(self, texts: Sequence[str], *, batch_size: int = 64) -> Embeddings:
        return self._encoder.encode_texts(texts, batch_size=batch_size)

    def encode_images(self, images: Sequence[Any], *, batch_size: int = 32) -> Embeddings:
        return self._encoder.encode_images(images, batch_size=batch_size)

    def truncated(self, texts: Sequence[str]) -> list[bool]:
        return self._encoder.truncated(texts)

    def encode_pixels(self, pixels: Pixels, *, batch_size: int = 32) -> tuple[Embeddings, NDArray[np.bool_]]:
        """A picture without finite patches counts as one without a direction: it is skipped and listed."""
        rows, usable = self._encoder.encode_pixels(pixels, batch_size=batch_size)
        if self._reranker.reads_tokens:
            patches = self._reranker.read_pixels(pixels, batch_size=batch_size)
            usable = usable & patches.intact()
            self._parts.append(patches.take(usable))
        return rows, usable

    def patches(self) -> Patches | None:
        """Of all pictures that could be used, in the order they came; None for a re-ranker that reads none."""
        return Patches.concatenate(self._parts) if self._reranker.reads_tokens else None
