"""A re-ranker's network: what it reads of both towers, and the fusion on top.

Decisions:
- The towers are read, not owned: their weights are no part of `state_dict`, `parameters` or `to`, so that a re-ranker's
  file holds nothing twice and an optimiser over it leaves them alone.
- The words come from a shorter BERT made of the tower's own lower layers: what is above `text_layer` is never run, and
  a tower that learns, moves or is filled anew is followed.
- Patches are of the picture as it is: the mirror image that a tower's row may average has other places, and attention
  over both would point nowhere.
- Averaging to the grid is two small matrix products, not the adaptive pooling of torch (the same numbers): they export
  for every size.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmsearch.errors import ModelError
from mmsearch.rerank.base import ImageSide, TextSide, build_fusion
from mmsearch.rerank.config import RerankConfig

if TYPE_CHECKING:
    from transformers import BertModel

    from mmsearch.towers.dual_encoder import DualEncoder


class RerankModel(nn.Module):
    """The patch projection and the fusion that `config` describes, reading `towers` (`self.towers`).

    `caption_bank`, `picture_bank`: (`config.bank`, d) unit rows, see `commonness`; nothing here reads them.
    c = `config.patch_dim`, p = `config.patches`, w: the text backbone's width, d: of the unit rows.
    Raises `ModelError` when the text backbone has fewer layers than `config.text_layer`.
    """

    caption_bank: Tensor
    picture_bank: Tensor

    def __init__(self, config: RerankConfig, towers: DualEncoder) -> None:
        super().__init__()
        self.config = config
        self._read = (towers, lower_layers(towers, config.text_layer))  # a tuple: nn.Module does not look into it
        self.backbone = copy.deepcopy(towers.image.backbone) if config.own_backbone else None
        self.patch_projection = nn.Linear(towers.image.width, config.patch_dim)
        self.fusion = build_fusion(config, dim=towers.config.dim, text_width=int(towers.text.width))
        for name in ("caption_bank", "picture_bank"):
            self.register_buffer(name, torch.zeros(config.bank, towers.config.dim), persistent=config.bank > 0)

    @property
    def image_backbone(self) -> nn.Module:
        """What patches are read from: its own backbone, or the image tower's."""
        tower: nn.Module = self.towers.image.backbone
        return tower if self.backbone is None else self.backbone

    @property
    def towers(self) -> DualEncoder:
        """The dual encoder whose words and patches are read."""
        return self._read[0]

    @property
    def lower(self) -> BertModel:
        """The text tower's backbone up to `config.text_layer`."""
        return self._read[1]

    def words(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(b, t) int64, (b, t) of 0/1 -> (b, t, w): the text backbone's hidden states after `text_layer` layers.

        Known values: 0 layers give the embeddings, all of them the backbone's `last_hidden_state`.
        """
        tokens: Tensor = self.lower(input_ids=ids, attention_mask=mask).last_hidden_state
        return tokens

    def patches(self, pixels: Tensor) -> Tensor:
        """(b, s, s, 3) uint8 -> (b, p, c); see `patches_of_map`."""
        return self.patches_of_map(self.image_backbone(self.towers.normalise_pixels(pixels)))

    def patches_of_map(self, features: Tensor) -> Tensor:
        """What the image backbone gives, a map (b, w, h, h) or tokens (b, prefix + h², w) -> (b, p, c), row by row.

        A map whose side is not the grid's is averaged to it: the cell i reads from floor(i h / g) to ceil((i+1) h / g).
        Raises `ModelError` for a backbone that gives one vector a picture, or tokens of no square.
        """
        projected: Tensor = self.patch_projection(self.grid_of_map(features))
        return projected

    def grid_of_map(self, features: Tensor) -> Tensor:
        """As `patches_of_map`, before the projection: (b, p, W) features, W the backbone's width."""
        places = as_map(features, prefix=self.towers.image.backbone.prefix)  # (b, w, h, h)
        pooled = pool_to_grid(places, self.config.grid)  # (b, w, grid, grid)
        return pooled.flatten(2).transpose(1, 2)

    def forward(self, text: TextSide, image: ImageSide) -> Tensor:
        """Aligned pairs -> (b,) float32 logits of "they match"; a side of batch 1 goes with all of the other."""
        logits: Tensor = self.fusion(text, image)
        return logits

    def attention(self, text: TextSide, image: ImageSide) -> Tensor | None:
        """(b, t, p) float32, how much each word looks at each patch, summing to 1 over patches; None: it reads none."""
        return self.fusion.attention(text, image)


def lower_layers(towers: DualEncoder, layers: int) -> BertModel:
    """A BERT of the first `layers` layers of the text tower's, the very same modules; `ModelError` if it has fewer."""
    from transformers import BertModel

    backbone: Any = getattr(towers.text, "backbone", None)
    if not isinstance(backbone, BertModel):
        raise ModelError("re-ranker", expected="a BERT as text tower", got=type(towers.text).__name__)
    there = len(backbone.encoder.layer)
    if layers > there:
        raise ModelError(
            "re-ranker text_layer", expected=f"at most the text backbone's {there} layers", got=str(layers)
        )
    settings = copy.deepcopy(backbone.config)
    settings.num_hidden_layers = layers
    with torch.device("meta"):
        lower = BertModel(settings, add_pooling_layer=False)
    lower.embeddings, lower.encoder.layer = backbone.embeddings, backbone.encoder.layer[:layers]
    return lower


def pool_to_grid(places: Tensor, grid: int) -> Tensor:
    """(b, w, h, v) -> (b, w, grid, grid) means; as torch's `adaptive_avg_pool2d`, also where a map is smaller."""
    height, width = places.shape[2:]
    if (height, width) == (grid, grid):
        return places
    rows, columns = (_averaging(size, grid).to(places) for size in (height, width))
    return rows @ (places @ columns.T)


def _averaging(size: int, grid: int) -> Tensor:
    """(grid, size): row i is the mean over its cells, adding up to 1."""
    matrix = torch.zeros(grid, size)
    for i in range(grid):
        start, stop = i * size // grid, -(-(i + 1) * size // grid)
        matrix[i, start:stop] = 1.0 / (stop - start)
    return matrix


def as_map(features: Tensor, *, prefix: int) -> Tensor:
    """(b, w, h, h) as it is, (b, prefix + h², w) -> (b, w, h, h); `ModelError` for anything else."""
    if features.ndim == 4:
        return features
    if features.ndim != 3:
        raise ModelError(
            "re-ranker patches",
            expected="an image backbone that gives a map or patch tokens",
            got=f"one with {features.ndim} axes: its features are already pooled",
            do="Convolutional, ViT and Swin models of timm and torchvision have patches.",
        )
    places = features[:, prefix:]  # (b, p, w)
    side = math.isqrt(places.shape[1])
    if side * side != places.shape[1]:
        got = f"{places.shape[1]} of them"
        raise ModelError("re-ranker patches", expected="patch tokens that form a square", got=got)
    return places.transpose(1, 2).reshape(*places.shape[::2], side, side)
