"""A two-tower model of transformers with the dual encoder's interface."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmsearch.types import Preprocessing


class TransformersTowers(nn.Module):
    """`model` has `get_text_features` and `get_image_features`. `masked`: texts come with an attention mask."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, *, preprocessing: Preprocessing, masked: bool) -> None:
        super().__init__()
        self.model, self.masked = model, masked
        for name in ("mean", "std"):
            values = torch.tensor(getattr(preprocessing, name)).reshape(1, 3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def encode_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(b, t) int64 ids, (b, t) mask of 0/1 -> (b, d) float32 unit rows."""
        found = self.model.get_text_features(input_ids=ids, attention_mask=mask if self.masked else None)  # type: ignore[operator]
        return _unit_rows(found)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(b, s, s, 3) uint8 -> (b, d) float32 unit rows."""
        images = pixels.permute(0, 3, 1, 2).to(torch.float32) / 255.0
        found = self.model.get_image_features(pixel_values=(images - self.mean) / self.std)  # type: ignore[operator]
        return _unit_rows(found)


def _unit_rows(found: Tensor | object) -> Tensor:
    """Older releases of transformers return the rows, newer ones an output that holds them as `pooler_output`."""
    rows = found if isinstance(found, Tensor) else found.pooler_output  # type: ignore[attr-defined]
    return functional.normalize(rows.to(torch.float32), dim=-1)
