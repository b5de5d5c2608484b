"""Projection heads: from a backbone's width to the shared dimension.

Decisions:
- "residual" ends its side branch in zeros: with equal widths the head starts as the identity, so a language
  model's geometry survives the first steps of training; with unequal widths the straight path is one matrix.
- Heads do not normalise; the towers do, after everything that may be added.
"""

from __future__ import annotations

from torch import Tensor, nn

from mmsearch.towers.config import ProjectionConfig


def _branch(config: ProjectionConfig, *, width: int, dim: int) -> nn.Sequential:
    hidden = config.hidden or 2 * width
    return nn.Sequential(
        nn.LayerNorm(width) if config.norm else nn.Identity(),
        nn.Linear(width, hidden),
        nn.GELU(),
        nn.Dropout(config.dropout),
        nn.Linear(hidden, dim),
    )


class ResidualProjection(nn.Module):
    """(b, w) -> (b, d): straight(x) + branch(x), where branch starts at zero and straight at the identity if w = d."""

    def __init__(self, config: ProjectionConfig, *, width: int, dim: int) -> None:
        super().__init__()
        self.straight = nn.Identity() if width == dim else nn.Linear(width, dim, bias=False)
        self.branch = _branch(config, width=width, dim=dim)
        last = self.branch[-1]
        assert isinstance(last, nn.Linear)  # for the type checker
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Project as the class says."""
        straight: Tensor = self.straight(features)
        branch: Tensor = self.branch(features)
        return straight + branch


def build_projection(config: ProjectionConfig, *, width: int, dim: int) -> nn.Module:
    """A head of `config.kind` from (b, `width`) to (b, `dim`), not normalised."""
    if config.kind == "linear":
        return nn.Linear(width, dim, bias=False)
    if config.kind == "mlp":
        return _branch(config, width=width, dim=dim)
    return ResidualProjection(config, width=width, dim=dim)
