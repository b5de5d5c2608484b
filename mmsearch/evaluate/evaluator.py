"""Pairs -> both encoders -> ranks in both directions.

Decisions:
- A picture that cannot be read takes its captions with it and is counted in the report: numbers over a
  smaller gallery are easier, so they must not look like the whole. No caption ever meets another's picture.
- Pairs of one group belong together, and one picture listed once a caption is still one picture.
- Pixels are held for one batch, embeddings for all: (n + m) · d floats.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mmsearch.data.loading import Failed, Loader
from mmsearch.data.pairs import read_pairs
from mmsearch.errors import InputError, UsageError
from mmsearch.evaluate.metrics import Ints, rank_groups
from mmsearch.evaluate.report import Evaluation, summarise
from mmsearch.types import Embeddings, Pair, Pixels, Skipped, SkipReason

if TYPE_CHECKING:
    from mmsearch.encoder import Encodes


class Progress(Protocol):
    """Told how far the work is; the command line draws it."""

    def start(self, total: int | None) -> None:
        """`total` steps are to be done (None: nobody knows yet)."""

    def advance(self, n: int, *, note: str = "") -> None:
        """`n` more steps are done."""


class _Silent:
    def start(self, total: int | None) -> None:
        pass

    def advance(self, n: int, *, note: str = "") -> None:
        pass


def evaluate_file(
    path: str | Path,
    *,
    encoder: Encodes,
    split: str | None = None,
    limit: int | None = None,
    rerank: int = 0,
    workers: int | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate `encoder` on the pairs in `path`: JSONL, CSV, Karpathy or COCO JSON, a folder with side-cars.

    `split`: only pairs of this split. `limit`: only the first so many pictures. `rerank`: how many hits
    of the first stage a second one reorders; 0 is the first stage alone. Raises `InputError` where nothing
    is left to evaluate and `UsageError` for numbers that cannot mean anything.
    """
    if rerank:
        raise UsageError("--rerank", expected="0", got=str(rerank), do="This model has no re-ranker: leave it out.")
    skipped: list[Skipped] = []
    pairs = read_pairs(str(path), split=split, on_skip=skipped.append)
    with Loader(preprocessing=encoder.preprocessing, workers=workers) as loader:
        found = evaluate_pairs(
            pairs, encoder=encoder, loader=loader, limit=limit, batch_size=batch_size, progress=progress
        )
    return replace(found, skipped=(*skipped, *found.skipped))


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
    began, told = time.monotonic(), progress or _Silent()
    merged, skipped = _merge(pairs, limit=limit)
    texts_of = [len(pair.captions) for pair in merged]
    told.start(len(merged) + sum(texts_of))
    rows: list[Embeddings] = []
    kept: list[int] = []
    for keys, embeddings in _encode_images(merged, encoder, loader=loader, batch_size=batch_size, skipped=skipped):
        kept.extend(keys)
        rows.append(embeddings)
        told.advance(len(keys))
    if not kept:
        first = f", the first one {skipped[0].path} ({skipped[0].reason})" if skipped else ""
        raise InputError(
            "pairs", expected="at least one readable picture with a caption", got=f"{len(skipped)} skipped{first}"
        )
    told.advance(len(merged) - len(kept) + sum(texts_of) - sum(texts_of[key] for key in kept))
    texts = [caption for key in kept for caption in merged[key].captions]
    text_rows = _encode_texts(texts, encoder, batch_size=batch_size, progress=told)
    images = np.repeat(np.arange(len(kept)), [texts_of[key] for key in kept]).astype(np.int64)  # (m,) owner
    image_groups = _numbered([merged[key].group for key in kept])
    return _compare(
        np.concatenate(rows),
        text_rows,
        image_groups=image_groups,
        owners=images,
        model=encoder.identity.name,
        skipped=skipped,
        seconds=time.monotonic() - began,
    )


def _compare(
    images: Embeddings,
    texts: Embeddings,
    *,
    image_groups: Ints,
    owners: Ints,
    model: str,
    skipped: list[Skipped],
    seconds: float,
) -> Evaluation:
    """(n, d) pictures, (m, d) captions, `owners` (m,) the picture of each caption -> both directions."""
    text_groups = image_groups[owners]
    return Evaluation(
        model=model,
        images=len(images),
        texts=len(texts),
        text_to_image=summarise(
            rank_groups(texts, images, query_groups=text_groups, candidate_groups=image_groups), clusters=owners
        ),
        image_to_text=summarise(
            rank_groups(images, texts, query_groups=image_groups, candidate_groups=text_groups),
            clusters=np.arange(len(images), dtype=np.int64),
        ),
        skipped=tuple(skipped),
        seconds=seconds,
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


def _encode_images(
    pairs: list[Pair], encoder: Encodes, *, loader: Loader, batch_size: int, skipped: list[Skipped]
) -> Iterator[tuple[list[int], Embeddings]]:
    """Batches of (positions in `pairs`, their (b, d) rows); what cannot be used goes to `skipped`."""
    keys: list[int] = []
    pixels: list[Pixels] = []

    def flush() -> tuple[list[int], Embeddings]:
        rows, usable = encoder.encode_pixels(np.stack(pixels), batch_size=batch_size)
        skipped.extend(
            Skipped(pairs[key].image, SkipReason.BAD_EMBEDDING) for key, ok in zip(keys, usable, strict=True) if not ok
        )
        return [key for key, ok in zip(keys, usable, strict=True) if ok], rows[usable]

    for result in loader.load((key, pair.image) for key, pair in enumerate(pairs)):
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


def _encode_texts(texts: list[str], encoder: Encodes, *, batch_size: int, progress: Progress) -> Embeddings:
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
