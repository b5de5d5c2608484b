"""Any Pillow mode becomes 8-bit RGB, without the surprises of a plain `convert("RGB")`.

Decisions:
- 16-bit grey is scaled by 255/65535; Pillow's own conversion saturates and gives a white picture.
- 32-bit and float pictures name no range: the smallest usual one that holds their values is taken
  (0..1 for floats, 0..255, 0..65535), and else the values are stretched between their extremes.
- Transparency is laid over white: dropping alpha would show colours that nobody ever saw.
- CMYK follows Pillow: values in JPEG files are taken as inverted, as Adobe writes them.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

_WHITE = (255, 255, 255)
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_STRIP_PIXELS = 1 << 22


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in mode RGB; `ValueError` where its mode has no conversion (LAB)."""
    if image.mode in _DEEP:
        image = _to_grey(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.has_transparency_data:
        return _over_white(image)
    return image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode not in ("RGBA", "LA"):
        image = image.convert("RGBA")
    alpha = image.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return image.convert("RGB")
    under = Image.new("RGB", image.size, _WHITE)
    under.paste(image.convert("RGB"), mask=alpha)
    return under


def _to_grey(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit or float values -> mode L, strip by strip so that no wide copy of the whole is made."""
    width, height = image.size
    low, high = (0.0, 65535.0) if image.mode.startswith("I;16") else _range(image)
    scale = 255.0 / (high - low) if high > low else 0.0
    out = Image.new("L", image.size)
    rows = max(1, _STRIP_PIXELS // max(1, width))
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(height, top + rows)))
        values = np.nan_to_num(np.asarray(strip, np.float32), nan=low, posinf=high, neginf=low)
        scaled = np.clip((values - np.float32(low)) * np.float32(scale) + np.float32(0.5), 0, 255)
        out.paste(Image.fromarray(scaled.astype(np.uint8)), (0, top))
    return out


def _range(image: Image.Image) -> tuple[float, float]:
    values = np.asarray(image)
    if image.mode == "F":
        finite = values[np.isfinite(values)]
        if finite.size == 0:
            return 0.0, 1.0
        values = finite
    low, high = float(values.min()), float(values.max())
    usual = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    if low >= 0:
        for top in usual:
            if high <= top:
                return 0.0, top
    return low, high
