"""What a re-ranker is made of, as values that were checked once. No torch: the cold query path reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mmsearch.errors import ModelError

FUSIONS = ("concat", "weighted", "gated", "bilinear", "late-interaction", "cross-attention", "single-stream")
"""Representation level (both unit rows): the first four. Feature level (words and patches): the last three."""

_LIMITS = {
    "patch_dim": (1, 4096),
    "grid": (1, 64),
    "text_layer": (0, 96),
    "layers": (0, 48),
    "width": (8, 4096),
    "heads": (1, 256),
    "hidden": (1, 65_536),
    "bank": (0, 1 << 20),
}


@dataclass(frozen=True, slots=True)
class RerankConfig:
    """A fusion and what it reads.

    `patch_dim`: numbers of a stored patch token (c). `grid`: patches a side, p = grid² of them. `text_layer`: the words
    are the hidden states of the text backbone after so many layers; what is above belongs to the fusion. `layers`,
    `heads`, `width`: of the fusion's own layers (0 layers: "late-interaction" can do without). `hidden`: of its MLPs
    (and the rank of "bilinear"). `dropout` in [0, 1).
    `own_backbone`: patches come from an image backbone of its own, built as the tower's, not from the tower's itself.
    `bank`: rows of captions, and as many of pictures, that say how common a candidate is (`commonness`); 0 for none.
    """

    fusion: str = "cross-attention"
    patch_dim: int = 384
    grid: int = 9
    text_layer: int = 3
    layers: int = 3
    width: int = 384
    heads: int = 12
    hidden: int = 512
    dropout: float = 0.1
    own_backbone: bool = False
    bank: int = 0

    def __post_init__(self) -> None:
        if self.fusion not in FUSIONS:
            raise ModelError("fusion", expected=f"one of {', '.join(FUSIONS)}", got=repr(self.fusion)[:60])
        for name, (low, high) in _LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ModelError(
                    f"re-ranker {name}", expected=f"a whole number from {low} to {high}", got=repr(value)[:60]
                )
        if self.layers == 0 and self.fusion in ("cross-attention", "single-stream"):
            raise ModelError("re-ranker layers", expected=f"at least 1 for {self.fusion}", got="0")
        if self.width % self.heads:
            raise ModelError("re-ranker width", expected=f"a multiple of {self.heads} heads", got=str(self.width))
        if type(self.own_backbone) is not bool:
            raise ModelError("re-ranker own_backbone", expected="true or false", got=repr(self.own_backbone)[:60])
        if not isinstance(self.dropout, (int, float)) or not 0.0 <= self.dropout < 1.0:
            raise ModelError("re-ranker dropout", expected="from 0 to below 1", got=repr(self.dropout)[:60])

    @property
    def patches(self) -> int:
        """p, patch tokens a picture."""
        return self.grid * self.grid

    @property
    def bytes_per_picture(self) -> int:
        """Of the quantised patch tokens: p · c of int8 and a half-precision scale a token. Known value: 31,266."""
        return self.patches * (self.patch_dim + 2)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` reads them back."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RerankConfig:
        """Checked values; `ModelError` names the first that cannot be."""
        try:
            return cls(**values)
        except TypeError as error:
            raise ModelError("rerank.json, config", expected="its known settings", got=str(error)) from error
