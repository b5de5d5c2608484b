"""Where a step's pictures come from: decoded anew each time, or kept as outputs of frozen stages.

Decisions:
- Both give the same `Batch`; only what `images` holds differs, and `TowerPass` was told which it will be.
- A kept view is shared by all captions of its picture, so it is mirrored only if none of them names a side.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from mmsearch.train.batches import Draw
from mmsearch.train.encoding import Texts
from mmsearch.train.feed import Batch, PixelFeed
from mmsearch.train.prefix import KeptViews
from mmsearch.types import Pair


def closing_feed(batches: Iterator[Batch]) -> AbstractContextManager[Iterator[Batch]]:
    """For a `with`: what makes the batches ends with the block, not when an error's traceback is forgotten."""
    return closing(batches) if isinstance(batches, Generator) else nullcontext(batches)


class Feed(Protocol):
    """Batches for a plan."""

    def batches(self, plan: Sequence[Sequence[Draw]]) -> Iterator[Batch]:
        """One batch for each of `plan`, in order; draws whose picture cannot be used are left out of it."""
        ...

    def close(self) -> None:
        """End what it holds."""
        ...


class KeptFeed:
    """Batches from `KeptViews`; `pixels` only says and tokenises the captions.

    `texts`: all captions of `pairs` in order, where the text backbone does not learn: a batch then holds the pooled
    features (n, w) of those that are said in the place of ids.
    """

    def __init__(
        self, pairs: Sequence[Pair], views: KeptViews, *, pixels: PixelFeed, texts: Texts | None = None
    ) -> None:  # fmt: skip
        self._texts = texts
        self._starts = list(itertools.accumulate((len(pair.captions) for pair in pairs), initial=0))
        self._views, self._pixels = views, pixels

    def batches(self, plan: Sequence[Sequence[Draw]]) -> Iterator[Batch]:
        """As `Feed` says."""
        for draws in plan:
            kept = [draw for draw in draws if draw.row not in self._views.unfit]
            images = self._views.read([d.row for d in kept], [d.seed for d in kept]) if kept else torch.zeros(0)
            owners, captions = self._pixels.said(kept)
            ids, mask = self._tokens(kept, captions)
            yield Batch(kept, images, ids, mask, self._pixels.groups_of(kept), captions, owners)

    def close(self) -> None:
        """Nothing is open."""

    def _tokens(self, draws: Sequence[Draw], captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        if self._texts is None:
            return self._pixels.tokens(captions)
        places = [self._starts[draw.row] + number for draw in draws for number in self._pixels.captions_of(draw)]
        return self._texts.pooled()[places], torch.ones(len(places), 1, dtype=torch.int64)


def joined_captions(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with all their captions as one text: what decides whether a kept view may be mirrored."""
    return [replace(pair, captions=(" . ".join(pair.captions),)) for pair in pairs]
