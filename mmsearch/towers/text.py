"""The text tower: BERT, masked mean pooling, projection head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel

from mmsearch.errors import ModelError
from mmsearch.towers.config import TextConfig
from mmsearch.towers.pooling import masked_mean
from mmsearch.towers.projection import build_projection

_IGNORED = ("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path")


class BertTower(nn.Module):
    """(b, t) ids and mask -> (b, d) unit rows. Padding changes nothing; t from 1 to `max_position_embeddings`.

    Devlin et al. 2018 (BERT); mean pooling over tokens after Reimers & Gurevych 2019 (Sentence-BERT).
    The backbone has no pooler: its weights would never be used.
    """

    def __init__(self, config: TextConfig, *, dim: int) -> None:
        super().__init__()
        settings = {k: v for k, v in config.backbone.items() if k not in _IGNORED}
        try:
            self.backbone = BertModel(BertConfig(**settings), add_pooling_layer=False)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ModelError("text backbone", expected="settings of a BERT", got=str(error)[:200]) from error
        self.width, self.dim = int(self.backbone.config.hidden_size), dim
        self.projection = build_projection(config.projection, width=self.width, dim=dim)

    def pooled(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(b, t), (b, t) -> (b, w): the mean of the tokens that are not padding, before projection."""
        tokens = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state  # (b, t, w)
        return masked_mean(tokens, mask)

    def embed(self, pooled: Tensor) -> Tensor:
        """(b, w) -> (b, d) float32 unit rows."""
        return functional.normalize(self.projection(pooled).to(torch.float32), dim=-1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(b, t) int64, (b, t) of 0/1 -> (b, d) float32 unit rows."""
        return self.embed(self.pooled(ids, mask))
