"""Representation level: fusions that read the two unit rows of a pair and nothing else.

Decisions:
- All say scale · cosine + bias + something that starts at zero (or, "weighted", at the cosine itself): before training
  the order is the first stage's.
- A unit row's numbers are about 1/sqrt(d); they are multiplied by sqrt(d) before a layer sees them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmsearch.rerank.base import Fusion, ImageSide, TextSide
from mmsearch.rerank.config import RerankConfig
from mmsearch.rerank.layers import Logit, build_head, cosine

_START_SCALE = 10.0
_FACTORS = 4
_TINY = 1e-6


class VectorFusion(Fusion):
    """scale · cosine + bias + `branch` of both rows (b, d); `scale` starts at 10, the branch at zero."""

    reads_tokens = False

    def __init__(self, config: RerankConfig, *, dim: int, text_width: int) -> None:
        super().__init__(config, dim=dim, text_width=text_width)
        self.scale = nn.Parameter(torch.tensor(_START_SCALE))
        self.bias = nn.Parameter(torch.zeros(()))

    def match(self, text: TextSide, image: ImageSide) -> tuple[Tensor, None]:
        """See the class; no attention."""
        count = max(text.rows.shape[0], image.rows.shape[0])  # len() would be a constant in a graph
        u, v = text.rows.expand(count, -1), image.rows.expand(count, -1)
        return self.scale * cosine(u, v) + self.bias + self.branch(u * self.dim**0.5, v * self.dim**0.5), None

    def branch(self, u: Tensor, v: Tensor) -> Tensor:
        """(b, d), (b, d), numbers of about 1 -> (b,) float32."""
        raise NotImplementedError(type(self).__name__)


class ConcatFusion(VectorFusion):
    """MLP([u, v, u · v, |u - v|]): both rows, where they agree, where they differ."""

    def __init__(self, config: RerankConfig, *, dim: int, text_width: int) -> None:
        super().__init__(config, dim=dim, text_width=text_width)
        self.head = build_head(4 * dim, hidden=config.hidden, dropout=config.dropout, zero=True)

    def branch(self, u: Tensor, v: Tensor) -> Tensor:
        """See the class."""
        logit: Tensor = self.head(torch.cat([u, v, u * v, (u - v).abs()], dim=-1))
        return logit


class GatedFusion(VectorFusion):
    """MLP(z · tanh(A u) + (1 - z) · tanh(B v)), z = sigmoid(C [u, v]): which side to believe, for each of `hidden`.

    The gated multimodal unit of Arevalo et al. 2017, arXiv:1702.01992.
    """

    def __init__(self, config: RerankConfig, *, dim: int, text_width: int) -> None:
        super().__init__(config, dim=dim, text_width=text_width)
        self.text, self.image = nn.Linear(dim, config.hidden), nn.Linear(dim, config.hidden)
        self.gate = nn.Linear(2 * dim, config.hidden)
        self.head = build_head(config.hidden, hidden=config.hidden, dropout=config.dropout, zero=True)

    def branch(self, u: Tensor, v: Tensor) -> Tensor:
        """See the class."""
        gate = torch.sigmoid(self.gate(torch.cat([u, v], dim=-1)))
        logit: Tensor = self.head(gate * torch.tanh(self.text(u)) + (1.0 - gate) * torch.tanh(self.image(v)))
        return logit


class BilinearFusion(VectorFusion):
    """A low-rank bilinear form: (A u) · (B v) of rank `hidden`, summed in fours, signed root, unit length, weighted.

    Factorised pooling of Yu et al. 2017 (MFB, arXiv:1708.01471), a case of the tensor of Ben-younes et al. 2017 (MUTAN,
    arXiv:1705.06676) whose core is diagonal. A rank that is no multiple of four is rounded up to one.
    """

    def __init__(self, config: RerankConfig, *, dim: int, text_width: int) -> None:
        super().__init__(config, dim=dim, text_width=text_width)
        groups = -(-config.hidden // _FACTORS)
        self.text, self.image = nn.Linear(dim, groups * _FACTORS), nn.Linear(dim, groups * _FACTORS)
        self.dropout = nn.Dropout(config.dropout)
        self.out = Logit(groups, zero=True)

    def branch(self, u: Tensor, v: Tensor) -> Tensor:
        """See the class."""
        products: Tensor = self.dropout((self.text(u) * self.image(v)).float())
        pooled = products.reshape(*products.shape[:-1], -1, _FACTORS).sum(dim=-1)
        rooted = pooled / (pooled.abs() + _TINY).sqrt()  # sign(x) · sqrt(|x|), with a slope at 0
        joint = functional.normalize(rooted, dim=-1) * rooted.shape[-1] ** 0.5
        logit: Tensor = self.out(joint)
        return logit


class WeightedFusion(Fusion):
    """scale · (α · weighted cosine + (1 - α) · cosine of two learned views) + bias, with a learned α in (0, 1).

    Weighted cosine: every one of the d numbers counts by a positive weight (all 1 at the start). Views: (A u, B v), A
    and B the identity at the start. So all of it starts as the plain cosine: known value, 10 for equal rows.
    """

    reads_tokens = False

    def __init__(self, config: RerankConfig, *, dim: int, text_width: int) -> None:
        super().__init__(config, dim=dim, text_width=text_width)
        self.scale = nn.Parameter(torch.tensor(_START_SCALE))
        self.bias, self.balance = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.log_weights = nn.Parameter(torch.zeros(dim))
        self.text, self.image = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        for view in (self.text, self.image):
            nn.init.eye_(view.weight)

    def match(self, text: TextSide, image: ImageSide) -> tuple[Tensor, None]:
        """See the class; no attention."""
        root = (0.5 * self.log_weights).exp()
        weighted = cosine(_unit(text.rows.float() * root), _unit(image.rows.float() * root))
        viewed = cosine(_unit(self.text(text.rows)), _unit(self.image(image.rows)))
        share = torch.sigmoid(self.balance)
        return self.scale * (share * weighted + (1.0 - share) * viewed) + self.bias, None


def _unit(rows: Tensor) -> Tensor:
    return functional.normalize(rows.float(), dim=-1)
