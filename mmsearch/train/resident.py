"""Training pictures in the memory of a GPU, and random views of them made there.

A GPU trains a small tower faster than a dozen cores decode. Here every picture is decoded once, larger than the towers
take it, and kept as bytes on the device; crop, mirror image and colour of a view are then a few operations on a batch.

Decisions:
- What a view is comes from the same numbers as with `augment.augment_image`: a function of the draw's seed alone.
  The pixels differ a little, since they are resampled twice.
- Only for pictures that are squashed to a square: a crop of the square is then the square of a crop. With RandAugment,
  and with pictures cut to their middle, they are decoded at each step.
- A canvas is larger than the towers' input by `_MARGIN` only, for the sake of memory: about half of all crops are
  scaled up, by at most 1 / (`_MARGIN` · sqrt(crop)).
- A picture that could not be read is tried once more when all others are there, and then left out of the whole run.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mmsearch.train.augment import Augmentation, DrawnView, draw_view
from mmsearch.train.batches import Draw
from mmsearch.train.feed import Batch, PixelFeed
from mmsearch.train.prefetch import prefetched
from mmsearch.types import Preprocessing

_MARGIN = 1.2
_AHEAD = 2
_GREY = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in Pillow's "L" (ITU-R 601-2)."""


def canvas_of(preprocessing: Preprocessing, augmentation: Augmentation | None) -> Preprocessing | None:
    """How pictures are kept; None where views of what is kept would not be those of the pictures."""
    if preprocessing.fit != "squash" or (augmentation is not None and augmentation.randaugment):
        return None
    crops = augmentation is not None and augmentation.crop < 1.0
    return replace(preprocessing, size=math.ceil(preprocessing.size * _MARGIN)) if crops else preprocessing


@dataclass(frozen=True, slots=True)
class Canvases:
    """`pixels` (n, c, c, 3) uint8 on the device; `unfit`: rows whose picture cannot be used."""

    pixels: Tensor
    unfit: frozenset[int]

    @classmethod
    def filled(
        cls, batches: Callable[[Sequence[Sequence[Draw]]], Iterator[Batch]], *, count: int, size: int, batch_size: int,
        device: torch.device, advance: Callable[[int], None] = lambda done: None,
    ) -> Canvases:  # fmt: skip
        """All pictures as `batches`, a feed of plain ones, gives them; `advance` hears how many more are there."""
        pixels = torch.zeros((count, size, size, 3), dtype=torch.uint8, device=device)
        missing = list(range(count))
        for last in (False, True):
            plan = [[Draw(i, 0, 0) for i in missing[s : s + batch_size]] for s in range(0, len(missing), batch_size)]
            there: set[int] = set()
            for planned, batch in zip(plan, batches(plan), strict=True):
                rows = [draw.row for draw in batch.draws]
                if rows:
                    pixels[rows] = batch.images.to(device)
                there.update(rows)
                advance(len(planned) if last else len(rows))
            missing = [row for row in missing if row not in there]
        return cls(pixels, frozenset(missing))


class ResidentFeed:
    """Batches whose pictures are views of `canvases`, (b, size, size, 3) uint8 on their device.

    `pixels` says and tokenises the captions.
    """

    def __init__(
        self, canvases: Canvases, *, pixels: PixelFeed, augmentation: Augmentation | None, size: int
    ) -> None:  # fmt: skip
        self._canvases, self._pixels, self._augmentation, self._size = canvases, pixels, augmentation, size

    def batches(self, plan: Sequence[Sequence[Draw]]) -> Iterator[Batch]:
        """One batch for each of `plan`, in order, made ahead; draws whose picture cannot be used are left out."""
        with closing(prefetched(lambda: self._made(plan), depth=_AHEAD)) as made:
            yield from made

    def close(self) -> None:
        """Nothing is open."""

    def _made(self, plan: Sequence[Sequence[Draw]]) -> Generator[Batch, None, None]:
        for draws in plan:
            kept = [draw for draw in draws if draw.row not in self._canvases.unfit]
            yield self._pixels.batch_of(kept, self._views(kept))

    def _views(self, draws: Sequence[Draw]) -> Tensor:
        held = self._canvases.pixels
        canvases = held[torch.tensor([draw.row for draw in draws], device=held.device, dtype=torch.int64)]
        if self._augmentation is None:
            return canvases
        side = int(held.shape[1])
        views = []
        for draw in draws:
            may_flip = self._pixels.may_be_mirrored(draw)
            views.append(draw_view((side, side), self._augmentation, random.Random(draw.seed), may_flip=may_flip))
        return make_views(canvases, views, size=self._size)


@torch.no_grad()
def make_views(canvases: Tensor, views: Sequence[DrawnView], *, size: int) -> Tensor:
    """(b, c, c, 3) uint8 and a view of each -> (b, size, size, 3) uint8 on the same device.

    Bilinear; colour as Pillow's `ImageEnhance` blends it. Known values: the whole picture with factors of 1 at its own
    size is that picture; mirrored, its mirror image.
    """
    if not views:
        return canvases.new_empty((0, size, size, 3))
    images = canvases.permute(0, 3, 1, 2).float() / 255.0  # (b, 3, c, c)
    cut = functional.grid_sample(
        images, _grid(views, side=int(canvases.shape[1]), size=size, device=images.device), mode="bilinear",
        padding_mode="border", align_corners=False,
    )  # fmt: skip
    if views[0].colour:
        # (b, 3, 1, 1, 1)
        factors = torch.tensor([view.colour for view in views], device=cut.device)[:, :, None, None, None]
        cut = (cut * factors[:, 0]).clamp(0, 1)
        weights = torch.tensor(_GREY, device=cut.device)[None, :, None, None]
        mean = (cut * weights).sum(dim=1, keepdim=True).mean(dim=(2, 3), keepdim=True)
        cut = (mean + factors[:, 1] * (cut - mean)).clamp(0, 1)
        grey = (cut * weights).sum(dim=1, keepdim=True)
        cut = (grey + factors[:, 2] * (cut - grey)).clamp(0, 1)
    return (cut * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _grid(views: Sequence[DrawnView], *, side: int, size: int, device: torch.device) -> Tensor:
    """(b, size, size, 2) places in [-1, 1] that the pixels of each view are read from."""
    boxes = np.array([view.box for view in views], np.float32)  # left, top, width, height
    turned = np.where([view.mirrored for view in views], -1.0, 1.0).astype(np.float32)
    theta = np.zeros((len(views), 2, 3), np.float32)
    theta[:, 0, 0], theta[:, 1, 1] = turned * boxes[:, 2] / side, boxes[:, 3] / side
    theta[:, :, 2] = (2 * boxes[:, :2] + boxes[:, 2:]) / side - 1
    placed = torch.from_numpy(theta).to(device)
    found: Tensor = functional.affine_grid(placed, [len(views), 3, size, size], align_corners=False)
    return found
