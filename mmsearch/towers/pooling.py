"""From many vectors to one: a map or a row of tokens becomes one vector a picture or text.

Decisions:
- Masks select; they are never multiplied into a value first, so that whatever stands at a padded place
  (a huge number, a NaN) cannot leak into the mean.
- One class a pooling, all for both maps (b, w, h, h) and tokens (b, p, w): a backbone may change
  without the config changing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmsearch.errors import ModelError


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that the mask keeps: (b, t, w), (b, t) of 0/1 -> (b, w).

    A row whose mask keeps nothing gives zeros. Known value: tokens 2 and 4 kept, 9 masked -> 3.
    """
    kept = mask.to(torch.bool).unsqueeze(-1)  # (b, t, 1)
    total = torch.where(kept, tokens, torch.zeros((), dtype=tokens.dtype, device=tokens.device)).sum(dim=1)
    count = kept.sum(dim=1).clamp(min=1).to(tokens.dtype)  # (b, 1)
    return total / count


class Pooling(nn.Module):
    """(b, w, h, h), (b, prefix + p, w) or (b, w) -> (b, w) by `kind`.

    - "avg", "mean": mean over places; prefix tokens are left out.
    - "max": largest over places; prefix tokens are left out.
    - "gem": generalised mean, (mean of x^e)^(1/e) with a learned e that starts at 3; values are cut off
      below at 1e-6 (Radenović et al. 2018, "Fine-tuning CNN Image Retrieval with No Human Annotation", eq. 3).
    - "cls": the first token; a map has none, which is a `ModelError`.
    """

    def __init__(self, kind: str, *, prefix: int = 0) -> None:
        super().__init__()
        self.kind, self.prefix = kind, prefix
        if kind == "cls" and prefix < 1:
            raise ModelError(
                "image pooling", expected="a backbone with a class token for 'cls'", got="one without", do="Use 'avg'."
            )
        self.exponent = nn.Parameter(torch.tensor(3.0)) if kind == "gem" else None

    def forward(self, features: Tensor) -> Tensor:
        """Pool as the class says."""
        if features.ndim == 2:
            return features
        if self.kind == "cls":
            return features[:, 0]
        if features.ndim == 3:
            places = features[:, self.prefix :]  # (b, p, w)
            return self._pool(places, axes=(1,))
        return self._pool(features, axes=(2, 3))

    def _pool(self, places: Tensor, *, axes: tuple[int, ...]) -> Tensor:
        if self.kind == "max":
            return places.amax(dim=axes)
        if self.exponent is not None:
            powered = places.clamp(min=1e-6).pow(self.exponent).mean(dim=axes)
            return powered.pow(1.0 / self.exponent)
        return places.mean(dim=axes)
