"""Feature level, one stream: words and patches are tokens of one BERT, each looking at all.

The manner of VisualBERT (Li et al. 2019, arXiv:1908.03557): patches are projected to the words' width, get a learned
place and type, and stand behind the words; the first token says whether both match.

Decisions:
- Words come out of BERT's lower layers with their places in them, so they get only a type, which starts at zero.
- In the last layer only the first token is computed. `attention` is the mean over the heads of all layers but the last
  (of the one layer, when there is one) of how much a word looks at each patch, made to sum to 1 over the patches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmsearch.rerank.base import Fusion, ImageSide, TextSide
from mmsearch.rerank.config import RerankConfig
from mmsearch.rerank.layers import Layer, PatchInput, blank_masked, build_head, copy_layers, cosine, mask_bias

if TYPE_CHECKING:
    from transformers import BertModel


class SingleStream(Fusion):
    """MLP of the first token after `config.layers` layers over both + e · cosine of the rows; `e` starts at 0.

    Words of another width than `config.width` are projected first; then `start_from` has nothing to copy.
    """

    cheap_pairs = False

    def __init__(self, config: RerankConfig, *, dim: int, text_width: int) -> None:
        super().__init__(config, dim=dim, text_width=text_width)
        width, dropout = config.width, config.dropout
        self.word_projection = nn.Identity() if text_width == width else nn.Linear(text_width, width)
        self.word_type = nn.Parameter(torch.zeros(width))
        self.patch_input = PatchInput(config.patch_dim, patches=config.patches, dropout=0.0)
        self.patch_projection = nn.Linear(config.patch_dim, width)
        self.patch_type = nn.Parameter(torch.randn(width) * 0.02)
        self.patch_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(width, heads=config.heads, dropout=dropout) for _ in range(config.layers))
        self.head = build_head(width, hidden=config.hidden, dropout=dropout)
        self.cosine_scale = nn.Parameter(torch.zeros(()))

    def match(self, text: TextSide, image: ImageSide) -> tuple[Tensor, Tensor]:
        """See the class."""
        tokens, bias = self._together(text, image)
        t, seen = text.tokens.shape[1], []
        for number, layer in enumerate(self.layers):
            only = 0 < number == len(self.layers) - 1
            tokens, weights = layer(tokens, bias, first_only=only)  # weights (b, heads, t + p, t + p)
            if not only:
                seen.append(weights[:, :, :t, t:].mean(dim=1))
        attention = functional.normalize(torch.stack(seen).mean(dim=0), p=1.0, dim=-1)  # (b, t, p)
        logits: Tensor = self.head(tokens[:, 0])
        return logits + self.cosine_scale * cosine(text.rows, image.rows), attention

    def start_from(self, backbone: BertModel) -> None:
        """The layers become the backbone's above `config.text_layer`."""
        if self.text_width == self.config.width:
            copy_layers(self.layers, backbone, start=self.config.text_layer)

    def _together(self, text: TextSide, image: ImageSide) -> tuple[Tensor, Tensor]:
        """Tokens (b, t + p, w), words first, and their bias (b, t + p); a side of batch 1 is repeated."""
        words = self.word_projection(blank_masked(text.tokens, text.mask)) + self.word_type
        patches = self.patch_norm(self.patch_projection(self.patch_input(image.patches)) + self.patch_type)
        count = max(words.shape[0], patches.shape[0])  # len() would be a constant in a graph
        kept = torch.ones_like(patches[:, :, 0], dtype=text.mask.dtype)  # (b, p)
        mask = torch.cat([text.mask.expand(count, -1), kept.expand(count, -1)], dim=1)
        parts = [side.expand(count, -1, -1) for side in (words.to(patches.dtype), patches)]
        tokens: Tensor = self.dropout(torch.cat(parts, dim=1))
        return tokens, mask_bias(mask)
