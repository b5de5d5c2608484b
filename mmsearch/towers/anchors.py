"""Class-name anchors: a classifier's knowledge, spoken in the text tower's words.

A photo classifier knows names that no caption in the training data holds. Its verdict, as a mixture of the
text embeddings of the class names, is added to the image head's output: one more matrix product.
Sources: the convex combination of semantic embeddings of Norouzi et al. 2013 (ConSE, arXiv:1312.5650),
and Frome et al. 2013 (DeViSE) for text embeddings as a classifier's target.

Decisions:
- All classes take part, weighted by the softmax, where ConSE keeps the best few: it stays differentiable
  and exports as two plain matrix products.
- A plain verdict that is spread over kin ("husky", "malamute") says "dog" well and no name; a sharp one the reverse.
  With `peak` the mixture is of both: names are found, and captions lose less than with one sharper verdict
  (recipes/README.md).
- The names' rows are a buffer, not a parameter: they must stay what the text tower says. Whoever trains the
  text head refreshes them with `set_names`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmsearch.errors import UsageError
from mmsearch.towers.config import AnchorsConfig


class ClassNameAnchors(nn.Module):
    """(b, w) pooled features -> (b, d): m · shares · A, with A (classes, d) of unit rows.

    shares = (1 - peak) · softmax(z) + peak · softmax(sharpness · z), z = classifier(f). `classifier` is Linear(w,
    classes); `scale` is m, learned. A starts at zero: nothing is added until `set_names` gave it rows.
    """

    names: Tensor

    def __init__(self, config: AnchorsConfig, *, width: int, dim: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, config.classes)
        self.scale = nn.Parameter(torch.tensor(float(config.scale)))
        self.peak, self.sharpness = float(config.peak), float(config.sharpness)
        self.register_buffer("names", torch.zeros(config.classes, dim))

    def forward(self, features: Tensor) -> Tensor:
        """Mix the class names' rows by the classifier's verdict."""
        logits = self.classifier(features)  # (b, classes)
        shares = functional.softmax(logits, dim=-1)
        if self.peak:
            shares = (1.0 - self.peak) * shares + self.peak * functional.softmax(self.sharpness * logits, dim=-1)
        mixed: Tensor = self.scale * (shares @ self.names)
        return mixed

    def set_names(self, rows: Tensor) -> None:
        """Take (classes, d) text embeddings of the class names; they are scaled to norm 1."""
        if rows.shape != self.names.shape:
            raise UsageError("anchor names", expected=str(tuple(self.names.shape)), got=str(tuple(rows.shape)))
        with torch.no_grad():
            self.names.copy_(functional.normalize(rows.float(), dim=-1))
