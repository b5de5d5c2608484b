"""Two towers, one space: texts and pictures as unit rows that can be compared by cosine; an item's two as one.

Decisions:
- Pictures come in as uint8 (b, s, s, 3), as decoders give them; scaling to the backbone's mean and deviation
  happens here, on the device, so that a quarter of the bytes travel and nobody scales twice.
- The learned temperature is kept as log_logit_scale and cut at a multiplier of 100 (Radford et al. 2021, CLIP).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmsearch.errors import ModelError
from mmsearch.towers.base import build_text_tower
from mmsearch.towers.config import DualEncoderConfig, no_item_fusion
from mmsearch.towers.image import ImageTower
from mmsearch.towers.item import build_item_fusion

MAX_LOGIT_SCALE = 100.0
_START_LOG_LOGIT_SCALE = math.log(1 / 0.07)


class DualEncoder(nn.Module):
    """A text tower, an image tower, a learned temperature and perhaps a head for items; `config` says which."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: DualEncoderConfig) -> None:
        super().__init__()
        self.config = config
        text = build_text_tower(config.text, dim=config.dim)
        if not isinstance(text, nn.Module):
            raise ModelError("text tower", expected="a torch module", got=type(text).__name__)
        self.text = text
        self.image = ImageTower(config.image, dim=config.dim, size=config.preprocessing.size)
        self.log_logit_scale = nn.Parameter(torch.tensor(_START_LOG_LOGIT_SCALE))
        self.item = None if config.item is None else build_item_fusion(config.item, dim=config.dim)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(config.preprocessing, name)).reshape(1, 3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    @property
    def logit_scale(self) -> Tensor:
        """1 / temperature: the multiplier of cosines in the contrastive loss, at most 100."""
        return self.log_logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)

    def normalise_pixels(self, pixels: Tensor) -> Tensor:
        """(b, s, s, 3) uint8 -> (b, 3, s, s) float32, (x / 255 - mean) / std per channel."""
        images = pixels.permute(0, 3, 1, 2).to(torch.float32) / 255.0
        return (images - self.mean) / self.std

    def encode_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(b, t) int64 ids, (b, t) mask of 0/1 -> (b, d) float32 unit rows."""
        rows: Tensor = self.text(ids, mask)
        return rows

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(b, s, s, 3) uint8 -> (b, d) float32 unit rows."""
        rows: Tensor = self.image(self.normalise_pixels(pixels))
        return rows

    def item_rows(
        self, image: Tensor, text: Tensor, *, has_image: Tensor | None = None, has_text: Tensor | None = None
    ) -> Tensor:
        """Unit rows of each item's picture and text, (b, d) and (b, d) -> (b, d) unit rows; see `item.ItemFusion`.

        `has_image`, `has_text`: (b,) bool, None means all. Raises `ModelError` when this model has no head for items.
        """
        if self.item is None:
            raise no_item_fusion("the model")
        rows: Tensor = self.item(image, text, has_image=has_image, has_text=has_text)
        return rows

    def forward(self, ids: Tensor, mask: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One training batch -> (text rows (b, d), image rows (b, d), logit_scale ())."""
        return self.encode_texts(ids, mask), self.encode_images(pixels), self.logit_scale


def build_dual_encoder(config: DualEncoderConfig | Mapping[str, Any]) -> DualEncoder:
    """A dual encoder with random weights; a plain mapping is checked as config.json would be."""
    checked = config if isinstance(config, DualEncoderConfig) else DualEncoderConfig.from_json(config)
    return DualEncoder(checked)
