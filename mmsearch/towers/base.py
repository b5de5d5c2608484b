"""The seam: what a tower is, and the table that names them.

A text tower turns token ids into unit rows, an image tower turns normalised pixels into unit rows.
To add one: write a file with the class, add one line to `_TOWERS`, run the contract test over it.

Decisions:
- The table holds module names, not classes: importing this file imports neither torch nor timm.
- A backbone is named "family:architecture" ("timm:resnet18", "torchvision:vgg16"); the family is what
  the table knows, the rest is handed to it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from mmsearch.errors import MissingExtraError, ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from mmsearch.towers.config import ImageConfig, TextConfig


class TextTower(Protocol):
    """Token ids to unit rows. `dim` is d; `width` is that of the backbone's tokens."""

    dim: int
    width: int

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(b, t) int64 ids, (b, t) mask of 1 for tokens and 0 for padding -> (b, d) float32 unit rows."""
        ...


class Backbone(Protocol):
    """Normalised pixels to a map or to tokens, before pooling.

    `width` is w. `prefix` counts the class and register tokens in front of the patch tokens (0 for maps).
    """

    width: int
    prefix: int

    def __call__(self, images: Tensor) -> Tensor:
        """(b, 3, s, s) float -> (b, w, h, h) map, (b, prefix + p, w) tokens, or (b, w) already pooled."""
        ...


_TOWERS: dict[str, tuple[str, str, str, str]] = {
    # name: (module, class, package, extra)
    "bert": ("mmsearch.towers.text", "BertTower", "transformers", ""),
    "timm": ("mmsearch.towers.image", "TimmBackbone", "timm", ""),
    "torchvision": ("mmsearch.towers.image", "TorchvisionBackbone", "torchvision", ""),
    "plain_cnn": ("mmsearch.towers.plain_cnn", "PlainCnn", "torch", ""),
}


def _tower_class(family: str, *, where: str) -> Any:  # noqa: ANN401 - the table holds classes of any tower
    if family not in _TOWERS:
        raise ModelError(where, expected=f"one of {', '.join(sorted(_TOWERS))}", got=repr(family))
    module, name, package, extra = _TOWERS[family]
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == package:
            raise MissingExtraError(f"tower {family!r}", package=package, extra=extra or "all") from error
        raise


def build_text_tower(config: TextConfig, *, dim: int) -> TextTower:
    """A text tower with random weights, as `config` describes it, ending in `dim` numbers a row."""
    tower: TextTower = _tower_class(config.kind, where="text tower")(config, dim=dim)
    return tower


def build_backbone(config: ImageConfig, *, size: int) -> Backbone:
    """An image backbone with random weights for inputs of `size` pixels a side."""
    family, _, architecture = config.backbone.partition(":")
    backbone: Backbone = _tower_class(family, where="image backbone")(architecture, size=size)
    return backbone
