"""Where a photo answers to words, drawn over it: a contact sheet with a tile for the whole text and one for each word.

Decisions:
- Numbers are drawn as they are, smoothed between places: warm and bright where they are large, the photo grey and dim
  where they are small. A tile's brightest spot is its own largest number, unless that is below `least`.
- The map covers what the model saw: all of the photo, its middle square, or more than the photo, see `Preprocessing`.
- Words of scripts that Pillow's own font lacks are shown as their numbers in the text: no font is looked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from mmsearch.errors import UsageError
from mmsearch.types import Preprocessing

TILE = 240
"""The longer side of a tile in pixels."""
MAX_TILES = 40
_GAP, _LINE = 8, 22
_DIM = 0.35
_COLOURS = np.array([(0.0, 30, 30, 80), (0.35, 130, 30, 120), (0.65, 240, 100, 40), (1.0, 255, 240, 120)], np.float64)
"""Stops of the scale: where, red, green, blue. Dark blue, violet, orange, light yellow."""

Floats = NDArray[np.float64]


def contact_sheet(
    photo: Image.Image, words: Sequence[str], grid: NDArray[np.floating], *, whole: NDArray[np.floating],
    preprocessing: Preprocessing, least: float = 0.0,
) -> Image.Image:  # fmt: skip
    """One RGB picture: a tile for the whole text, then one for each of the (t,) `words`, words below.

    `photo`: upright RGB. `grid` (t, g, g), `whole` (g, g): numbers of g x g places, row by row from the top left.
    `least`: what the largest number of a tile is at least taken to be. More than 39 words: the first 39. Raises
    `UsageError` for numbers that do not fit the words or are not finite.
    """
    first, rest = np.asarray(whole, np.float64), np.asarray(grid, np.float64)
    if first.ndim != 2 or first.shape[0] != first.shape[1] or rest.shape != (len(words), *first.shape):
        got = f"{rest.shape} and {first.shape}"
        raise UsageError("numbers of a sheet", expected=f"({len(words)}, g, g) and (g, g)", got=got)
    shares = np.concatenate([first[None], rest])
    if not np.isfinite(shares).all():
        raise UsageError("numbers of a sheet", expected="finite numbers", got="NaN or infinity")
    small = ImageOps.contain(photo.convert("RGB"), (TILE, TILE), Image.Resampling.LANCZOS)
    titles = ["whole text", *(_printable(word, place) for place, word in enumerate(words[: MAX_TILES - 1], 1))]
    tiles = [overlay(small, one, preprocessing=preprocessing, least=least) for one in shares[:MAX_TILES]]
    return _sheet(tiles, titles)


def overlay(
    photo: Image.Image, shares: NDArray[np.floating], *, preprocessing: Preprocessing, least: float = 0.0
) -> Image.Image:
    """One (g, g) map over an RGB photo of any size; the same size. A map of equal numbers lights nothing."""
    heat = _heat(np.asarray(shares, np.float64), photo.size, preprocessing, least)[..., None]  # (h, w, 1)
    pixels = np.asarray(photo, np.float64)
    grey = pixels.mean(axis=2, keepdims=True)
    dimmed = _DIM * (0.5 * pixels + 0.5 * grey)
    lit = 0.55 * pixels + 0.45 * _colour(heat[..., 0])
    mixed = (1.0 - heat) * dimmed + heat * lit
    return Image.fromarray(np.clip(np.rint(mixed), 0, 255).astype(np.uint8))


def _heat(shares: Floats, size: tuple[int, int], preprocessing: Preprocessing, least: float) -> Floats:
    """(g, g) -> (h, w) in [0, 1], 0 at the smallest and 1 at the largest number, 0 outside of what the model saw."""
    width, height = size
    low, high = float(shares.min()), max(float(shares.max()), float(shares.min()) + least)
    scaled = (shares - low) / (high - low) if high - low > 1e-9 else np.zeros_like(shares)
    left, top, right, bottom = _seen(width, height, preprocessing.fit)
    area = (max(1, right - left), max(1, bottom - top))
    smooth = np.asarray(Image.fromarray(scaled.astype(np.float32)).resize(area, Image.Resampling.BICUBIC), np.float64)
    heat = np.zeros((height, width))
    x, y = max(0, left), max(0, top)
    part = smooth[y - top : y - top + height, x - left : x - left + width]
    heat[y : y + part.shape[0], x : x + part.shape[1]] = np.clip(part, 0.0, 1.0)
    return heat


def _seen(width: int, height: int, fit: str) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the model's square input in a photo's own pixels; padding lies outside of it."""
    if fit == "squash":
        return 0, 0, width, height
    side = min(width, height) if fit == "crop" else max(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def _colour(heat: Floats) -> Floats:
    """(h, w) in [0, 1] -> (h, w, 3) RGB, 0..255."""
    return np.stack([np.interp(heat, _COLOURS[:, 0], _COLOURS[:, 1 + channel]) for channel in range(3)], axis=-1)


def _sheet(tiles: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    width, height = tiles[0].size
    cell = max(width, 90)
    columns = min(len(tiles), max(2, round(math.sqrt(len(tiles) * 1.4))))
    rows = math.ceil(len(tiles) / columns)
    size = (columns * (cell + _GAP) + _GAP, rows * (height + _LINE + _GAP) + _GAP)
    sheet = Image.new("RGB", size, (250, 250, 250))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for place, (tile, title) in enumerate(zip(tiles, titles, strict=True)):
        left = _GAP + (place % columns) * (cell + _GAP)
        top = _GAP + (place // columns) * (height + _LINE + _GAP)
        sheet.paste(tile, (left + (cell - width) // 2, top))
        while title and draw.textlength(title, font) > cell:
            title = title[:-2].rstrip("…") + "…" if len(title) > 2 else ""
        middle = left + (cell - draw.textlength(title, font)) / 2
        draw.text((middle, top + height + 2), title, fill=(20, 20, 20), font=font)
    return sheet


def _printable(word: str, place: int) -> str:
    """A word as the font can show it."""
    return word if word.isprintable() and all(ord(one) < 0x250 for one in word) else f"word {place}"
