"""Random views of a photo and of a caption: crop, flip, colour, RandAugment, word drop.

Decisions:
- A view is a function of its seed alone: not of the worker, the batch or the order. That makes a run repeatable
  and lets views be kept on disk (`views`).
- A crop keeps the photo's own shape to within `ratio`, because a photo of any shape is encoded by the same resize.
- A photo whose caption speaks of left or right is never mirrored.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image, ImageEnhance

_SIDES = re.compile(
    r"\b(left|right|leftmost|rightmost|east|west|text|sign|reads?|words?|letters?|number)\b", re.IGNORECASE
)
_CROP_TRIES = 10


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


NO_AUGMENTATION = Augmentation(crop=1.0, ratio=1.0, flip=0.0, colour=0.0)


def names_a_side(captions: Iterable[str]) -> bool:
    """True when mirroring could make a caption false: it speaks of left or right, or of something to read."""
    return any(_SIDES.search(caption) for caption in captions)


def augment_image(image: Image.Image, settings: Augmentation, *, seed: int, may_flip: bool = True) -> Image.Image:
    """One random view of an RGB picture, of any size; the same `seed` gives the same view."""
    draw = random.Random(seed)
    view = _random_crop(image, settings, draw)
    if draw.random() < settings.flip and may_flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if settings.colour:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            view = enhance(view).enhance(draw.uniform(1 - settings.colour, 1 + settings.colour))
    return _randaugment(view, settings.randaugment, seed=seed) if settings.randaugment else view


def drop_words(caption: str, probability: float, *, seed: int) -> str:
    """`caption` with each word left out at `probability`; at least one word stays."""
    words = caption.split()
    draw = random.Random(seed)
    kept = [word for word in words if draw.random() >= probability]
    return " ".join(kept or words[:1]) if len(words) > 1 else caption


def _random_crop(image: Image.Image, settings: Augmentation, draw: random.Random) -> Image.Image:
    """Random area and shape, as in Szegedy et al. 2014 (Inception), around the photo's own shape."""
    if settings.crop >= 1.0:
        return image
    width, height = image.size
    for _ in range(_CROP_TRIES):
        area = width * height * draw.uniform(settings.crop, 1.0)
        shape = width / height * math.exp(draw.uniform(-math.log(settings.ratio), math.log(settings.ratio)))
        wide, high = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < wide <= width and 0 < high <= height:
            left, top = draw.randint(0, width - wide), draw.randint(0, height - high)
            return image.crop((left, top, left + wide, top + high))
    return image


def _randaugment(image: Image.Image, operations: int, *, seed: int) -> Image.Image:
    import torch
    from torchvision.transforms import v2

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        view: Image.Image = v2.RandAugment(num_ops=operations)(image)
    return view
