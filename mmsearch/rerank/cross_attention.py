"""Feature level, the fused reader: words look at words, then at the picture's patches, layer after layer.

The manner of ALBEF (Li et al. 2021, arXiv:2107.07651): the lower layers of a BERT read the text alone, the upper ones
also the picture, and the first token says whether both match.

Decisions:
- What a word reads from the patches is added without a norm of its own; the layer's last norm takes it in. With
  nothing read, a layer is BERT's to the last digit, so training starts from a text model that still works. The
  cross-attention starts small and random: BERT has nothing to copy for it.
- In the last layer only the first token is computed: nobody reads the others. `attention` is therefore the mean over
  the heads of all layers but the last (of the one layer, when there is one).
- A text of batch 1 meets many pictures with its first self-attention computed once. In the last layer of two or more
  no keys and values are made of the patches (`PatchAttention`, `few`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmsearch.rerank.base import Fusion, ImageSide, TextSide
from mmsearch.rerank.config import RerankConfig
from mmsearch.rerank.layers import (
    FeedForward,
    PatchAttention,
    PatchInput,
    SelfAttention,
    blank_masked,
    build_head,
    copy_layers,
    cosine,
    mask_bias,
)

if TYPE_CHECKING:
    from transformers import BertModel


class CrossLayer(nn.Module):
    """Words (b, t, w) look at words, at patches (b, p, c), and pass an MLP -> (b, s, w), weights (b, heads, s, p)."""

    def __init__(self, config: RerankConfig) -> None:
        super().__init__()
        width, heads, dropout = config.width, config.heads, config.dropout
        self.attention = SelfAttention(width, heads=heads, dropout=dropout)
        self.cross = PatchAttention(width, patch_width=config.patch_dim, heads=heads, dropout=dropout)
        self.feed = FeedForward(width, dropout=dropout)

    def forward(
        self, words: Tensor, patches: Tensor, *, bias: Tensor, first_only: bool = False
    ) -> tuple[Tensor, Tensor]:
        """`bias` (b, t): of the mask. `first_only`: s = 1, the first word only; else s = t."""
        words, _ = self.attention(words, bias, first_only=first_only)
        read, weights = self.cross(words, patches, few=first_only)
        return self.feed(words + read), weights


class CrossAttention(Fusion):
    """MLP of the first token after `config.layers` layers + e · cosine of the rows; `e` starts at 0.

    Words of another width than `config.width` are projected first; then `start_from` has nothing to copy.
    """

    cheap_pairs = False

    def __init__(self, config: RerankConfig, *, dim: int, text_width: int) -> None:
        super().__init__(config, dim=dim, text_width=text_width)
        same = text_width == config.width
        self.word_projection = nn.Identity() if same else nn.Linear(text_width, config.width)
        self.patch_input = PatchInput(config.patch_dim, patches=config.patches, dropout=config.dropout)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(CrossLayer(config) for _ in range(config.layers))
        self.head = build_head(config.width, hidden=config.hidden, dropout=config.dropout)
        self.cosine_scale = nn.Parameter(torch.zeros(()))

    def match(self, text: TextSide, image: ImageSide) -> tuple[Tensor, Tensor]:
        """See the class."""
        first, attention = self.read_words(text, image)
        logits: Tensor = self.head(first[:, 0])
        return logits + self.cosine_scale * cosine(text.rows, image.rows), attention

    def read_words(self, text: TextSide, image: ImageSide) -> tuple[Tensor, Tensor]:
        """The words after all layers: (b, s, w), only the first (s = 1) from two layers on; attention (b, t, p)."""
        bias, patches = mask_bias(text.mask), self.patch_input(image.patches)
        words = self.word_projection(self.dropout(blank_masked(text.tokens, text.mask)))
        seen = []
        for number, layer in enumerate(self.layers):
            only = 0 < number == len(self.layers) - 1
            words, weights = layer(words, patches, bias=bias, first_only=only)
            if not only:
                seen.append(weights.mean(dim=1))  # (b, t, p)
        return words, torch.stack(seen).mean(dim=0)

    def start_from(self, backbone: BertModel) -> None:
        """Self-attention, MLP and norms become those of the backbone's layers above `config.text_layer`."""
        if self.text_width == self.config.width:
            copy_layers(self.layers, backbone, start=self.config.text_layer)
