"""Random views of a photo and of a caption: crop, flip, colour, RandAugment, word drop.

Decisions:
- A view is a function of its seed alone: not of the worker, the batch or the order, nor, but for rounding, of the
  photo's size. That makes a run repeatable and lets views be kept on disk (`views`) and made of copies (`resident`).
- A crop keeps the photo's own shape to within `ratio`, because a photo of any shape is encoded by the same resize.
- RandAugment is written with Pillow's operations: a library's would bring torch into every decode worker.
- A photo whose caption speaks of left or right is never mirrored.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

from PIL import Image, ImageEnhance, ImageOps

from mmsearch.errors import UsageError

_SIDES = re.compile(
    r"\b((left|right)(most|wards?|-hand(ed)?)?|(east|west)(wards?|ern)?|text|signs?|reads?|words?|letters?|numbers?)\b",
    re.IGNORECASE,
)
_CROP_TRIES = 10
_COLOURS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How far random views may go; the defaults change little enough that a caption stays true.

    `crop`: smallest share of the area that a crop keeps, in (0, 1]; 1 switches crops off. `ratio`: largest factor by
    which a crop's shape differs from the photo's. `flip`: probability of mirroring. `colour`: largest relative change
    of brightness, contrast and saturation. `randaugment`: how many operations of RandAugment (Cubuk et al. 2019,
    arXiv:1909.13719) on top, 0 for none. `word_drop`: probability that a caption's word is left out.
    """

    crop: float = 0.5
    ratio: float = 1.33
    flip: float = 0.5
    colour: float = 0.2
    randaugment: int = 0
    word_drop: float = 0.0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("crop", 0.01, 1.0), ("ratio", 1.0, 10.0), ("flip", 0.0, 1.0), ("colour", 0.0, 1.0),
            ("randaugment", 0, 100), ("word_drop", 0.0, 1.0),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise UsageError(f"augment.{name}", expected=f"from {low} to {high}", got=str(getattr(self, name)))


NO_AUGMENTATION = Augmentation(crop=1.0, ratio=1.0, flip=0.0, colour=0.0)


def names_a_side(captions: Iterable[str]) -> bool:
    """True when mirroring could make a caption false: it speaks of left or right, or of something to read."""
    return any(_SIDES.search(caption) for caption in captions)


@dataclass(frozen=True, slots=True)
class DrawnView:
    """What a seed says of a view. `box`: left, top, width, height in pixels of the picture that it was drawn for.

    `colour`: factors of brightness, contrast and saturation, applied in this order; empty for none.
    """

    box: tuple[int, int, int, int]
    mirrored: bool
    colour: tuple[float, ...]


def draw_view(
    size: tuple[int, int], settings: Augmentation, draw: random.Random, *, may_flip: bool = True
) -> DrawnView:
    """The view of a picture of `size` (width, height) that these random numbers give, RandAugment not counted."""
    box = _random_box(size, settings, draw)
    mirrored = draw.random() < settings.flip and may_flip
    low, high = 1 - settings.colour, 1 + settings.colour
    return DrawnView(box, mirrored, tuple(draw.uniform(low, high) for _ in _COLOURS) if settings.colour else ())


def augment_image(image: Image.Image, settings: Augmentation, *, seed: int, may_flip: bool = True) -> Image.Image:
    """One random view of an RGB picture, of any size; the same `seed` gives the same view."""
    draw = random.Random(seed)
    drawn = draw_view(image.size, settings, draw, may_flip=may_flip)
    left, top, wide, high = drawn.box
    view = image if (wide, high) == image.size else image.crop((left, top, left + wide, top + high))
    if drawn.mirrored:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhance, factor in zip(_COLOURS, drawn.colour, strict=False):
        view = enhance(view).enhance(factor)
    return _randaugment(view, settings.randaugment, draw)


def drop_words(caption: str, probability: float, *, seed: int) -> str:
    """`caption` with each word left out at `probability`; at least one word stays."""
    words = caption.split()
    draw = random.Random(seed)
    kept = [word for word in words if draw.random() >= probability]
    return " ".join(kept or words[:1]) if len(words) > 1 else caption


def _random_box(size: tuple[int, int], settings: Augmentation, draw: random.Random) -> tuple[int, int, int, int]:
    """Random area and shape, as in Szegedy et al. 2014 (Inception), around the photo's own shape."""
    width, height = size
    if settings.crop >= 1.0:
        return 0, 0, width, height
    for _ in range(_CROP_TRIES):
        area = width * height * draw.uniform(settings.crop, 1.0)
        shape = width / height * math.exp(draw.uniform(-math.log(settings.ratio), math.log(settings.ratio)))
        wide, high = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < wide <= width and 0 < high <= height:
            # Shares, not whole numbers: those take a count of random numbers that depends on the size.
            return round(draw.random() * (width - wide)), round(draw.random() * (height - high)), wide, high
    return 0, 0, width, height


def _randaugment(image: Image.Image, operations: int, draw: random.Random) -> Image.Image:
    """So many operations of RandAugment, each at a random strength up to about two thirds of the paper's scale."""
    for _ in range(operations):
        image = draw.choice(_OPERATIONS)(image, draw.uniform(-0.6, 0.6))
    return image


def _one(strength: float, size: tuple[int, int]) -> float:
    return 1.0


def _none(strength: float, size: tuple[int, int]) -> float:
    return 0.0


def _enhanced(kind: Callable[[Image.Image], Any]) -> _Operation:
    def operation(image: Image.Image, strength: float) -> Image.Image:
        found: Image.Image = kind(image).enhance(1 + strength)
        return found

    return operation


def _moved(*rows: Callable[[float, tuple[int, int]], float]) -> _Operation:
    """An affine map from where a pixel goes to where it comes from; what comes from outside is grey."""

    def operation(image: Image.Image, strength: float) -> Image.Image:
        data = tuple(row(strength, image.size) for row in rows)
        return image.transform(image.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor=_GREY)

    return operation


_Operation: TypeAlias = Callable[[Image.Image, float], Image.Image]
_GREY = (128, 128, 128)
_OPERATIONS: tuple[_Operation, ...] = (
    lambda image, strength: image,
    lambda image, strength: ImageOps.autocontrast(image),
    lambda image, strength: ImageOps.equalize(image),
    lambda image, strength: ImageOps.posterize(image, 8 - round(4 * abs(strength))),
    lambda image, strength: ImageOps.solarize(image, round(256 * (1 - abs(strength)))),
    lambda image, strength: image.rotate(30 * strength, Image.Resampling.BILINEAR, fillcolor=_GREY),
    _enhanced(ImageEnhance.Color),
    _enhanced(ImageEnhance.Contrast),
    _enhanced(ImageEnhance.Brightness),
    _enhanced(ImageEnhance.Sharpness),
    _moved(_one, lambda strength, size: 0.3 * strength, _none, _none, _one, _none),
    _moved(_one, _none, _none, lambda strength, size: 0.3 * strength, _one, _none),
    _moved(_one, _none, lambda strength, size: 0.45 * strength * size[0], _none, _one, _none),
    _moved(_one, _none, _none, _none, _one, lambda strength, size: 0.45 * strength * size[1]),
)
"""The operations of the paper's table 1: colour, shear in x and y, shift in x and y."""
