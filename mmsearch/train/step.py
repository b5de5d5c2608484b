"""The gradient of one batch: rows of both sides, the objective over all of them, and what else is asked for.

Decisions:
- One path for big and small: with `chunk` both sides are cut and their gradients cached (`chunked`), without it each
  is one chunk, which is the plain way.
- Groups and rows are gathered from all ranks before the objective sees them, so that a loss never knows of ranks.
- Where a picture comes with several captions, its row is repeated beside each: the objective sees pairs, and of one
  group none repels another. The picture is encoded once. As a rival of a text it counts once for each of its captions.
  A teacher and an item head look at the first caption alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmsearch.train.batches import Draw
from mmsearch.train.chunked import Side, backward_in_chunks, chunks_of
from mmsearch.train.distributed import Ranks
from mmsearch.train.encoding import TowerPass
from mmsearch.train.feed import Batch
from mmsearch.train.keeping import KeptClasses, KeptNames
from mmsearch.train.losses import Distillation, InfoNce
from mmsearch.train.modality import ItemBatch, another_caption, item_loss, modality_dropout
from mmsearch.types import Pair

Tokens = Callable[[Sequence[str]], tuple[Tensor, Tensor]]


class Taught(nn.Module):
    """Distillation with the teacher's rows of the training pairs, made once: `images` (n, e), `texts` (m, e).

    `starts` (n,): the row of each pair's first caption in `texts`.
    """

    images: Tensor
    texts: Tensor
    starts: Tensor

    def __init__(self, loss: Distillation, images: Tensor, texts: Tensor, starts: Tensor) -> None:
        super().__init__()
        self.loss = loss
        self.register_buffer("images", images, persistent=False)
        self.register_buffer("texts", texts, persistent=False)
        self.register_buffer("starts", starts, persistent=False)

    def rows(self, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
        """(b, e) of the captions and of the pictures that were drawn."""
        rows = torch.tensor([draw.row for draw in draws])
        captions = torch.tensor([draw.caption for draw in draws])
        return self.texts[self.starts[rows] + captions], self.images[rows]


@dataclass(slots=True)
class StepParts:
    """What a step is made of; see `BatchGradient`."""

    passes: TowerPass
    objective: nn.Module
    ranks: Ranks
    pairs: Sequence[Pair]
    tokens: Tokens
    chunk: int = 0
    taught: Taught | None = None
    modality_dropout: float = 0.5
    kept: Sequence[KeptClasses | KeptNames] = ()


class BatchGradient:
    """Adds the gradient of a batch's loss to every `.grad`, and tells the loss."""

    def __init__(self, parts: StepParts) -> None:
        self._parts, self._model = parts, parts.passes.model
        self._item_objective = InfoNce()

    def backward(self, batch: Batch, *, scale: Callable[[Tensor], Tensor] | None = None) -> float:
        """One batch; with `scale` applied to its loss before the backward pass. Returns the unscaled loss."""
        parts = self._parts
        groups = parts.ranks.gather_rows(batch.groups.to(parts.passes.device))
        owners = batch.owners.to(parts.passes.device)
        owned = parts.ranks.gather_rows(batch.groups.to(parts.passes.device)[owners])
        first = torch.searchsorted(owners, torch.arange(len(batch.draws), device=owners.device))
        sides = [
            self._side(lambda piece: parts.passes.texts(*piece), self._model.text, batch.ids, batch.mask),
            self._side(lambda piece: parts.passes.images(*piece), self._model.image, batch.images),
        ]
        items = self._items(batch) if self._model.item is not None else None
        if items is not None:
            sides.append(self._side(lambda piece: parts.passes.texts(*piece), self._model.text, *items[0]))

        def loss(texts: Tensor, images: Tensor, *others: Tensor) -> Tensor:
            scale_now = self._model.logit_scale
            value: Tensor = parts.objective(
                parts.ranks.gather_rows(texts), parts.ranks.gather_rows(images[owners]), scale_now, text_groups=owned,
                image_groups=owned,
            )  # fmt: skip
            if parts.taught is None and items is None:
                return value
            texts, images = parts.ranks.gather_rows(texts[first]), parts.ranks.gather_rows(images)
            named = {"text_groups": groups, "image_groups": groups}
            if parts.taught is not None:
                taught = [parts.ranks.gather_rows(rows.to(texts.device)) for rows in parts.taught.rows(batch.draws)]
                value = value + parts.taught.loss(
                    texts, images, scale_now, **named, teacher_texts=taught[0], teacher_images=taught[1]
                )
            if items is not None:
                value = value + self._item_value(texts, images, others[0], present=items[1], groups=groups)
            return value

        value = float(backward_in_chunks(sides, loss, scale=scale))
        if not parts.kept:
            return value
        held = torch.tensor([sum(kept.backward(batch.images, scale=scale) for kept in parts.kept)], dtype=torch.float64)
        return value + float(parts.ranks.gather_rows(held.to(parts.passes.device)).mean())  # each rank has its own part

    def _side(self, encode: Callable[[tuple[Tensor, ...]], Tensor], module: nn.Module, *tensors: Tensor) -> Side:
        size = self._parts.chunk or max(1, len(tensors[0]))
        return Side(encode, chunks_of(size, *tensors), module)

    def _items(self, batch: Batch) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Tokens of another caption of each picture, and (b,) which have one."""
        drawn = [another_caption(self._parts.pairs[d.row], d.caption, seed=d.seed) for d in batch.draws]
        present = torch.tensor([caption is not None for caption in drawn])
        return self._parts.tokens([caption or "" for caption in drawn]), present

    def _item_value(self, queries: Tensor, images: Tensor, texts: Tensor, *, present: Tensor, groups: Tensor) -> Tensor:
        parts = self._parts
        texts = parts.ranks.gather_rows(texts)
        has_text = parts.ranks.gather_rows(present.to(texts.device))
        has_image, has_text = modality_dropout(
            torch.ones_like(has_text), has_text, probability=parts.modality_dropout,
            generator=torch.Generator().manual_seed(int(groups.sum())),
        )  # fmt: skip
        items = ItemBatch(images, texts, has_image, has_text)
        return item_loss(
            self._model.item_rows, queries, items, objective=self._item_objective,
            logit_scale=self._model.logit_scale, groups=groups,
        )  # fmt: skip
