"""Pairs -> both encoders -> ranks in both directions.

Decisions:
- A picture that cannot be read takes its captions with it and is counted in the report: numbers over a
  smaller gallery are easier, so they must not look like the whole. No caption ever meets another's picture.
- Pairs of one group belong together, and one picture listed once a caption is still one picture.
- Pixels are held for one batch, embeddings for all: (n + m) · d floats.
- Two models are measured one after the other, so that only one is in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mmsearch.data.loading import Failed, Loader
from mmsearch.data.pairs import read_pairs
from mmsearch.errors import InputError, UsageError
from mmsearch.evaluate.comparison import Comparison, compare
from mmsearch.evaluate.metrics import Ints
from mmsearch.evaluate.report import Evaluation
from mmsearch.evaluate.rows import evaluate_rows
from mmsearch.types import Embeddings, Pair, Pixels, Skipped, SkipReason

if TYPE_CHECKING:
    from mmsearch.encoder import Encodes


class Progress(Protocol):
    """Told how far the work is; the command line draws it."""

    def start(self, total: int | None) -> None:
        """`total` steps are to be done (None: nobody knows yet)."""

    def advance(self, n: int, *, note: str = "") -> None:
        """`n` more steps are done."""


class Silent:
    """Progress that nobody is told about."""

    def start(self, total: int | None) -> None:
        """Nothing."""

    def advance(self, n: int, *, note: str = "") -> None:
        """Nothing."""


class Rounds:
    """Progress of `rounds` equal rounds of work drawn as one: the first tells how long all will take."""

    def __init__(self, progress: Progress, *, rounds: int) -> None:
        self._progress, self._rounds = progress, rounds
        self._started = False

    def start(self, total: int | None) -> None:
        """A round begins; only the first one's total counts."""
        if not self._started:
            self._progress.start(None if total is None else total * self._rounds)
        self._started = True

    def advance(self, n: int, *, note: str = "") -> None:
        """`n` more steps of this round are done."""
        self._progress.advance(n, note=note)


def evaluate_file(
    path: str | Path,
    *,
    encoder: Encodes,
    split: str | None = None,
    limit: int | None = None,
    workers: int | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate `encoder` on the pairs in `path`: JSONL, CSV, Karpathy or COCO JSON, a folder with side-cars.

    `split`: only pairs of this split. `limit`: only the first so many pictures. The first stage alone; with a second
    one: `rerank_eval`. Raises `InputError` where nothing is left to evaluate and `UsageError` for numbers that cannot
    mean anything.
    """
    skipped: list[Skipped] = []
    pairs = read_pairs(str(path), split=split, on_skip=skipped.append)
    with Loader(preprocessing=encoder.preprocessing, workers=workers) as loader:
        found = evaluate_pairs(
            pairs, encoder=encoder, loader=loader, limit=limit, batch_size=batch_size, progress=progress
        )
    return replace(found, skipped=(*skipped, *found.skipped))


def compare_file(
    path: str | Path,
    *,
    before: Callable[[], Encodes],
    after: Callable[[], Encodes],
    progress: Progress | None = None,
    **options: Any,  # noqa: ANN401 - as `evaluate_file` has them
) -> Comparison[Evaluation]:
    """Evaluate two models on the same pairs. `before` and `after` load them, each when its turn comes.

    `options`: those of `evaluate_file`, for both. Raises as it does, and `UsageError` when the two models
    could not use the same pictures.
    """
    told = Rounds(progress or Silent(), rounds=2)
    first = evaluate_file(path, encoder=before(), progress=told, **options)
    return compare(first, evaluate_file(path, encoder=after(), progress=told, **options))


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Pairs as rows: m captions with their (m, d) `text_rows` and (m,) groups, n pictures with theirs (n, d), (n,).

    `owners` (m,): the position of each caption's picture.
    """

    texts: tuple[str, ...]
    text_rows: Embeddings
    image_rows: Embeddings
    text_groups: Ints
    image_groups: Ints
    owners: Ints
    skipped: tuple[Skipped, ...]


def evaluate_pairs(
    pairs: Iterable[Pair],
    *,
    encoder: Encodes,
    loader: Loader,
    limit: int | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Evaluation:
    """Encode all pictures and captions of `pairs` and rank both ways.

    Raises `InputError` when no picture with a caption could be read.
    """
    began = time.monotonic()
    encoded = encode_pairs(
        pairs, encoder=encoder, loader=loader, limit=limit, batch_size=batch_size, progress=progress or Silent()
    )
    found = evaluate_rows(
        encoded.text_rows,
        encoded.image_rows,
        text_groups=encoded.text_groups,
        image_groups=encoded.image_groups,
        model=encoder.identity.name,
    )
    return replace(found, skipped=encoded.skipped, seconds=time.monotonic() - began)


def encode_pairs(
    pairs: Iterable[Pair],
    *,
    encoder: Encodes,
    loader: Loader,
    limit: int | None = None,
    batch_size: int = 64,
    progress: Progress,
) -> Encoded:
    """The rows of all pictures that can be read, and of their captions. Raises as `evaluate_pairs`."""
    merged, skipped = _merge(pairs, limit=limit)
    texts_of = [len(pair.captions) for pair in merged]
    progress.start(len(merged) + sum(texts_of))
    rows: list[Embeddings] = []
    kept: list[int] = []
    paths = [pair.image for pair in merged]
    for keys, embeddings in image_rows(paths, encoder=encoder, loader=loader, batch_size=batch_size, skipped=skipped):
        kept.extend(keys)
        rows.append(embeddings)
        progress.advance(len(keys))
    if not kept:
        first = f", the first one {skipped[0].path} ({skipped[0].reason})" if skipped else ""
        raise InputError(
            "pairs", expected="at least one readable picture with a caption", got=f"{len(skipped)} skipped{first}"
        )
    progress.advance(len(merged) - len(kept) + sum(texts_of) - sum(texts_of[key] for key in kept))
    texts = [caption for key in kept for caption in merged[key].captions]
    groups = _numbered([pair.group for pair in merged])  # of all, so that models that skip differently do not match
    image_groups = groups[np.array(kept, np.int64)]
    owners = np.repeat(np.arange(len(kept)), [texts_of[key] for key in kept])
    return Encoded(
        tuple(texts),
        text_rows(texts, encoder=encoder, batch_size=batch_size, progress=progress),
        np.concatenate(rows),
        image_groups[owners],
        image_groups,
        owners,
        tuple(skipped),
    )


def _merge(pairs: Iterable[Pair], *, limit: int | None) -> tuple[list[Pair], list[Skipped]]:
    """One pair a picture, captions joined in the order they came; pictures without captions are skipped."""
    if limit is not None and limit < 1:
        raise UsageError("limit", expected="1 or more", got=str(limit))
    merged: dict[tuple[str, str], Pair] = {}
    skipped: list[Skipped] = []
    for pair in pairs:
        known = merged.get((pair.group, pair.image))
        if known is not None:
            merged[pair.group, pair.image] = replace(known, captions=known.captions + pair.captions)
        elif limit is not None and len(merged) == limit:
            continue  # a later line may still bring a caption of a picture that is in
        elif pair.captions:
            merged[pair.group, pair.image] = pair
        else:
            skipped.append(Skipped(pair.image, SkipReason.BAD_ROW, "no caption"))
    return list(merged.values()), skipped


def image_rows(
    paths: Sequence[str], *, encoder: Encodes, loader: Loader, batch_size: int, skipped: list[Skipped]
) -> Iterator[tuple[list[int], Embeddings]]:
    """Batches of (positions in `paths`, their (b, d) rows); what cannot be used goes to `skipped`."""
    keys: list[int] = []
    pixels: list[Pixels] = []

    def flush() -> tuple[list[int], Embeddings]:
        rows, usable = encoder.encode_pixels(np.stack(pixels), batch_size=batch_size)
        skipped.extend(
            Skipped(paths[key], SkipReason.BAD_EMBEDDING) for key, ok in zip(keys, usable, strict=True) if not ok
        )
        return [key for key, ok in zip(keys, usable, strict=True) if ok], rows[usable]

    for result in loader.load(enumerate(paths)):
        if isinstance(result, Failed):
            skipped.append(result.skipped)
            continue
        keys.append(result.key)
        pixels.append(result.pixels)
        if len(keys) == batch_size:
            yield flush()
            keys.clear()
            pixels.clear()
    if keys:
        yield flush()


def text_rows(texts: Sequence[str], *, encoder: Encodes, batch_size: int, progress: Progress) -> Embeddings:
    """(n) texts, at least one -> (n, d) rows, telling `progress` of every text."""
    rows: list[Embeddings] = []
    step = batch_size * 8  # captions are short, and an encoder sorts them by length within what it gets
    for low in range(0, len(texts), step):
        rows.append(encoder.encode_texts(texts[low : low + step], batch_size=batch_size))
        progress.advance(len(rows[-1]))
    return np.concatenate(rows)


def _numbered(groups: list[str]) -> Ints:
    """(n,) a number for each group name."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)
