"""What a dual encoder is made of, as values that were checked once.

Decisions:
- Sizes are bounded here, before anything is built: a config file comes from anywhere, and a tower of a
  billion layers must be one sentence, not a dead machine.
- No torch: the cold query path reads these values without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mmsearch.errors import ModelError
from mmsearch.types import Preprocessing

PROJECTIONS = ("linear", "mlp", "residual")
ITEM_FUSIONS = ("weighted", "gated", "concat")
POOLINGS = ("avg", "max", "gem", "cls", "mean")
FITS = ("squash", "crop", "pad")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")

_BERT_LIMITS = {
    "vocab_size": 2_000_000,
    "hidden_size": 8192,
    "num_hidden_layers": 96,
    "num_attention_heads": 256,
    "intermediate_size": 65_536,
    "max_position_embeddings": 65_536,
    "type_vocab_size": 64,
}
_BERT_DEFAULTS = {
    "vocab_size": 30_522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
}
_MAX_BACKBONE_NAME = 128


@dataclass(frozen=True, slots=True)
class ProjectionConfig:
    """A projection head. `hidden`: width of the middle layer, 0 means twice the input; `dropout` in [0, 1)."""

    kind: str = "residual"
    hidden: int = 0
    dropout: float = 0.0
    norm: bool = False

    def __post_init__(self) -> None:
        _one_of("projection kind", self.kind, PROJECTIONS)
        _whole("projection hidden", self.hidden, low=0, high=65_536)
        _number("projection dropout", self.dropout, low=0.0, high=0.99)


@dataclass(frozen=True, slots=True)
class AnchorsConfig:
    """Class-name anchors: how many classes, and the mixing scalar at the start.

    `peak`: share in [0, 1] that a sharper verdict has in the mixture, one whose logits are `sharpness` times as far
    apart: the name of what is seen stands out, and the others still say what kind of thing it is.
    """

    classes: int = 1000
    scale: float = 1.0
    peak: float = 0.0
    sharpness: float = 4.0

    def __post_init__(self) -> None:
        _whole("anchor classes", self.classes, low=1, high=100_000)
        _number("anchor scale", self.scale, low=-100.0, high=100.0)
        _number("anchor peak", self.peak, low=0.0, high=1.0)
        _number("anchor sharpness", self.sharpness, low=1.0, high=100.0)


@dataclass(frozen=True, slots=True)
class TextConfig:
    """A text tower. `backbone`: the numbers of a `transformers.BertConfig` as a plain mapping."""

    kind: str = "bert"
    backbone: Mapping[str, Any] = field(default_factory=dict)
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)

    def __post_init__(self) -> None:
        if not isinstance(self.backbone, Mapping):
            raise ModelError("text backbone", expected="an object of settings", got=type(self.backbone).__name__)
        for name, limit in _BERT_LIMITS.items():
            _whole(f"text backbone {name}", self.backbone.get(name, _BERT_DEFAULTS[name]), low=1, high=limit)
        width, heads = (self.backbone.get(k, _BERT_DEFAULTS[k]) for k in ("hidden_size", "num_attention_heads"))
        if width % heads:
            raise ModelError("text backbone hidden_size", expected=f"a multiple of {heads} heads", got=str(width))


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """An image tower. `backbone`: "timm:NAME", "torchvision:NAME" or "plain_cnn[:width,width,...]".

    `mirror`: a picture's row is the mean of its own and its mirror image's, at twice the work; in training each view
    is one of both.
    """

    backbone: str = "timm:tf_efficientnet_lite2"
    pooling: str = "avg"
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    anchors: AnchorsConfig | None = None
    mirror: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.mirror, bool):
            raise ModelError("image mirror", expected="true or false", got=repr(self.mirror)[:60])
        if not isinstance(self.backbone, str) or not 0 < len(self.backbone) <= _MAX_BACKBONE_NAME:
            raise ModelError("image backbone", expected="a short name", got=repr(self.backbone)[:60])
        _one_of("image pooling", self.pooling, POOLINGS)


@dataclass(frozen=True, slots=True)
class ItemConfig:
    """The head that joins an item's picture and text. `hidden`, `dropout`: of "concat"'s MLP; width 0 means 2 d."""

    kind: str = "gated"
    hidden: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _one_of("item kind", self.kind, ITEM_FUSIONS)
        _whole("item hidden", self.hidden, low=0, high=65_536)
        _number("item dropout", self.dropout, low=0.0, high=0.99)


@dataclass(frozen=True, slots=True)
class DualEncoderConfig:
    """Both towers and what they share: `dim` is d, `max_tokens` the longest text in tokens (t).

    `item`: the head for items with a picture and a text; None for a model without one.
    """

    dim: int
    text: TextConfig = field(default_factory=TextConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    max_tokens: int = 64
    item: ItemConfig | None = None

    def __post_init__(self) -> None:
        _whole("dim", self.dim, low=1, high=8192)
        positions = self.text.backbone.get("max_position_embeddings", 512)
        _whole("max_tokens", self.max_tokens, low=2, high=positions)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` reads them back to an equal config."""
        plain = asdict(self)
        plain["text"]["backbone"] = dict(self.text.backbone)
        if self.item is None:
            del plain["item"]  # a model without the head is written, and identified, as before there was one
        if not self.image.mirror:
            del plain["image"]["mirror"]
        anchors = self.image.anchors
        if anchors is not None and anchors == AnchorsConfig(anchors.classes, anchors.scale):
            del plain["image"]["anchors"]["peak"], plain["image"]["anchors"]["sharpness"]
        return plain

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> DualEncoderConfig:
        """Check plain values from anywhere; `ModelError` names the first that cannot be."""
        text, image = _section(values, "text"), _section(values, "image")
        anchors, item = image.get("anchors"), values.get("item")
        return cls(
            dim=values.get("dim", 0),
            max_tokens=values.get("max_tokens", 64),
            preprocessing=preprocessing_from_json(_section(values, "preprocessing")),
            text=_make(TextConfig, text, projection=_make(ProjectionConfig, _section(text, "projection"))),
            image=_make(
                ImageConfig,
                image,
                projection=_make(ProjectionConfig, _section(image, "projection")),
                anchors=None if anchors is None else _make(AnchorsConfig, _section(image, "anchors")),
            ),
            item=None if item is None else _make(ItemConfig, _section(values, "item")),
        )


def no_item_fusion(where: str) -> ModelError:
    """The error for a model that is asked to join pictures and texts and never learned to."""
    return ModelError(
        where,
        expected="a model with a head that joins an item's picture and text",
        got="one without",
        do="Train one with an item head, or keep pictures and texts separate.",
    )


def preprocessing_from_json(values: Mapping[str, Any]) -> Preprocessing:
    """A checked `Preprocessing` from plain values; `ModelError` when one is out of range or unknown."""
    made: Preprocessing = _make(
        Preprocessing,
        values,
        **{name: _triple(name, values[name]) for name in ("mean", "std") if name in values},
    )
    _whole("preprocessing size", made.size, low=8, high=2048)
    _one_of("preprocessing fit", made.fit, FITS)
    _one_of("preprocessing interpolation", made.interpolation, INTERPOLATIONS)
    for channel in made.std:
        _number("preprocessing std", channel, low=1e-3, high=100.0)
    return made


def _make(cls: type[Any], values: Mapping[str, Any], **replacing: Any) -> Any:  # noqa: ANN401 - one of the classes above
    try:
        return cls(**{**values, **replacing})
    except TypeError as error:
        raise ModelError(f"config.json, {cls.__name__}", expected="its known settings", got=str(error)) from error


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name, {})
    if not isinstance(found, Mapping):
        raise ModelError(f"config.json, {name}", expected="an object", got=type(found).__name__)
    return found


def _triple(name: str, value: object) -> tuple[float, float, float]:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise ModelError(f"preprocessing {name}", expected="three numbers", got=repr(value)[:60])
    for channel in value:
        _number(f"preprocessing {name}", channel, low=-100.0, high=100.0)
    red, green, blue = (float(channel) for channel in value)
    return red, green, blue


def _one_of(where: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ModelError(where, expected=f"one of {', '.join(allowed)}", got=repr(value)[:60])


def _whole(where: str, value: object, *, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ModelError(where, expected=f"a whole number from {low} to {high}", got=repr(value)[:60])


def _number(where: str, value: object, *, low: float, high: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise ModelError(where, expected=f"a number from {low} to {high}", got=repr(value)[:60])
