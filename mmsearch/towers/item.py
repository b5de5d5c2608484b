"""One row for an item that has a picture, a text, or both: what the two sides' unit rows are joined to.

Three heads, all starting as the plain mean of the two rows: "weighted" learns one share for the picture, "gated" a
share for each of the d numbers, seen from both rows (the gated unit of Arevalo et al. 2017, arXiv:1702.01992, without
its two tanh layers, so that the result stays in the space of the rows), "concat" adds what an MLP makes of both.

Decisions:
- A side that is absent is replaced before anything is computed with it: NaN there changes no row and no gradient.
- With one side only, "weighted" and "gated" give that side's row as it is. "concat" learns a row that stands for the
  absent side, and with it what to change about the side that is there; it starts by changing nothing.
- Two rows that cancel out have no direction together: the picture's row is the item's. NaN is not covered up so.
- Several captions of one item are averaged by the caller: a head sees one text row an item.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmsearch.errors import UsageError
from mmsearch.towers.config import ItemConfig, ProjectionConfig
from mmsearch.towers.projection import build_projection

_NO_DIRECTION = 1e-6


class ItemFusion(nn.Module):
    """Base of the heads. Called with image (b, d) and text (b, d) unit rows, it gives (b, d) unit rows.

    `has_image`, `has_text`: (b,) bool, which sides are there (None: all); what a row of an absent side holds does not
    matter. Known value, for all kinds before training: the normalised sum of the two rows, or the one that is there.
    Raises `UsageError` for shapes that do not fit and for an item with neither side.
    """

    def __init__(self, config: ItemConfig, *, dim: int) -> None:
        super().__init__()
        self.kind, self.dim = config.kind, dim

    def forward(
        self, image: Tensor, text: Tensor, *, has_image: Tensor | None = None, has_text: Tensor | None = None
    ) -> Tensor:
        """Join both sides as the class says."""
        _check_rows(image, text, dim=self.dim)
        with_image, with_text = (_presence(mask, image) for mask in (has_image, has_text))  # (b, 1)
        if not bool((with_image | with_text).all()):
            number = int((~(with_image | with_text)).nonzero()[0, 0])
            raise UsageError(f"item {number}", expected="a picture, a text or both", got="neither")
        image = torch.where(with_image, image, torch.zeros_like(image))
        text = torch.where(with_text, text, torch.zeros_like(text))
        joined = self.join(image, text, with_image=with_image, with_text=with_text)
        lost = joined.detach().norm(dim=1, keepdim=True) < _NO_DIRECTION
        return functional.normalize(torch.where(lost, torch.where(with_image, image, text), joined), dim=-1)

    def join(self, image: Tensor, text: Tensor, *, with_image: Tensor, with_text: Tensor) -> Tensor:
        """(b, d), (b, d) with zeros where a side is absent, (b, 1) bool each -> (b, d), not normalised."""
        raise NotImplementedError(type(self).__name__)


class WeightedItem(ItemFusion):
    """share · image + (1 - share) · text with one learned share, sigmoid(`balance`), 0.5 at the start."""

    def __init__(self, config: ItemConfig, *, dim: int) -> None:
        super().__init__(config, dim=dim)
        self.balance = nn.Parameter(torch.zeros(()))

    def join(self, image: Tensor, text: Tensor, *, with_image: Tensor, with_text: Tensor) -> Tensor:
        """See the class; one side alone is left as it is."""
        share = torch.sigmoid(self.balance)
        return torch.where(with_image & with_text, share * image + (1.0 - share) * text, image + text)


class GatedItem(ItemFusion):
    """gate · image + (1 - gate) · text with gate = sigmoid(linear([image, text])) in (0, 1), a number for each of d."""

    def __init__(self, config: ItemConfig, *, dim: int) -> None:
        super().__init__(config, dim=dim)
        self.gate = nn.Linear(2 * dim, dim)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def join(self, image: Tensor, text: Tensor, *, with_image: Tensor, with_text: Tensor) -> Tensor:
        """See the class; one side alone is left as it is."""
        both = torch.cat([image, text], dim=1) * self.dim**0.5  # (b, 2 d), numbers of about 1: a gate can open early
        gate = torch.sigmoid(self.gate(both))
        return torch.where(with_image & with_text, gate * image + (1.0 - gate) * text, image + text)


class ConcatItem(ItemFusion):
    """mean of what is there + MLP([image, text]); `absent` (2, d), learned, stands for a side that is not."""

    def __init__(self, config: ItemConfig, *, dim: int) -> None:
        super().__init__(config, dim=dim)
        mlp = ProjectionConfig("mlp", hidden=config.hidden or 2 * dim, dropout=config.dropout, norm=True)
        self.branch = build_projection(mlp, width=2 * dim, dim=dim)
        self.absent = nn.Parameter(torch.zeros(2, dim))
        last = list(self.branch.children())[-1]
        assert isinstance(last, nn.Linear)  # for the type checker
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def join(self, image: Tensor, text: Tensor, *, with_image: Tensor, with_text: Tensor) -> Tensor:
        """See the class."""
        mean = (image + text) / (with_image.to(image.dtype) + with_text.to(image.dtype))
        seen = torch.where(with_image, image, self.absent[0]), torch.where(with_text, text, self.absent[1])
        branch: Tensor = self.branch(torch.cat(seen, dim=1))
        return mean + branch


_FUSIONS: dict[str, type[ItemFusion]] = {"weighted": WeightedItem, "gated": GatedItem, "concat": ConcatItem}


def build_item_fusion(config: ItemConfig, *, dim: int) -> ItemFusion:
    """The head of `config.kind` for rows of `dim` numbers, starting as the mean of both sides."""
    return _FUSIONS[config.kind](config, dim=dim)


def _presence(mask: Tensor | None, rows: Tensor) -> Tensor:
    """(b,) bool -> (b, 1) bool on the rows' device; None is True throughout."""
    if mask is None:
        return torch.ones(len(rows), 1, dtype=torch.bool, device=rows.device)
    if mask.dtype != torch.bool or mask.shape != (len(rows),):
        got = f"{mask.dtype} {tuple(mask.shape)}"
        raise UsageError("which sides are there", expected=f"torch.bool ({len(rows)},)", got=got)
    return mask.to(rows.device).unsqueeze(1)


def _check_rows(image: Tensor, text: Tensor, *, dim: int) -> None:
    if image.ndim != 2 or image.shape != text.shape or image.shape[1] != dim:
        got = f"{tuple(image.shape)} and {tuple(text.shape)}"
        raise UsageError("item sides", expected=f"image and text rows (b, {dim})", got=got)
