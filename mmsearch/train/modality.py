"""Training the row of an item that has a picture, a text, or both, so that either may be missing.

An item of a training batch is a photo with *another* of its captions as text; the query that must find it is the
caption of the pair. Modality dropout (Neverova et al. 2014, ModDrop, arXiv:1501.00102, sec. 4) takes one side away at
random, so that one model serves items of every kind, and in one ranked list: items with a picture, a text or both are
each other's rivals in the batch.

Decisions:
- The item's text never has the words of its query: it would be found by them alone and nothing else be learned. A
  photo without another caption is an item without a text.
- Dropout only takes from items that have both sides, and only one: there is nothing to learn from an empty item.
- What is drawn is drawn on the CPU, from the generator that is handed in: the same on every device.
- The loss is symmetric InfoNCE, whatever that of the pairs is, over other rows and with the same group masks.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmsearch.errors import UsageError
from mmsearch.types import Pair


@dataclass(frozen=True, slots=True, eq=False)
class ItemBatch:
    """Both sides of m items: `images`, `texts` (m, d) unit rows; `has_image`, `has_text` (m,) bool, which are there."""

    images: Tensor
    texts: Tensor
    has_image: Tensor
    has_text: Tensor


def another_caption(pair: Pair, caption: int, *, seed: int) -> str | None:
    """A random caption of the photo other than number `caption`, by `seed`; None when all have the same words."""
    words = _words(pair.captions[caption])
    others = [text for text in pair.captions if _words(text) and _words(text) != words]
    return random.Random(seed).choice(others) if others else None


def modality_dropout(
    has_image: Tensor, has_text: Tensor, *, probability: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """(m,) bool, (m,) bool -> the same with one side less, at `probability`, for items that have both.

    Which side goes is an even chance. `generator`: of the CPU. Known values: at 0 nothing changes, at 1 every item
    ends with one side. Raises `UsageError` for a probability outside [0, 1].
    """
    if not 0.0 <= probability <= 1.0:
        raise UsageError("modality dropout", expected="a probability from 0 to 1", got=str(probability))
    drawn = torch.rand(2, len(has_image), generator=generator).to(has_image.device)
    hit = has_image & has_text & (drawn[0] < probability)
    image_goes = drawn[1] < 0.5
    return has_image & ~(hit & image_goes), has_text & ~(hit & ~image_goes)


def item_loss(
    fusion: Callable[..., Tensor],
    queries: Tensor,
    items: ItemBatch,
    *,
    objective: Callable[..., Tensor],
    logit_scale: Tensor,
    groups: Tensor,
) -> Tensor:
    """The objective of (query i, item i) pairs: queries (n, d) unit rows, m >= n items, those from n on rivals only.

    `fusion`: the model's `item_rows`. `objective`: as `losses` defines one (`InfoNce()`); `groups` (m,) int64: of the
    items' photos, and the first n of the queries' too. Gradients reach the head, both towers through all three kinds
    of rows, and `logit_scale` (). Known value with `InfoNce`: log(n) for n items and queries that are all alike. On
    several ranks every argument is gathered first, as for the loss between pictures and texts.
    """
    rows = fusion(items.images, items.texts, has_image=items.has_image, has_text=items.has_text)  # (m, d)
    return objective(queries, rows, logit_scale, text_groups=groups[: len(queries)], image_groups=groups)


def _words(caption: str) -> list[str]:
    """What is left of a caption when case, punctuation and spaces do not count."""
    return "".join(sign if sign.isalnum() else " " for sign in caption.casefold()).split()
