"""A second model for indexes that `ColorEncoder` made: it knows the same colours, in another space."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from mmsearch.builder import build
from mmsearch.similarity import normalise
from mmsearch.testing import COLORS, ColorEncoder
from mmsearch.types import ModelIdentity, Source


def turn(dim: int = 12, *, seed: int = 0) -> np.ndarray:
    """(dim, 8) with orthonormal columns: a rotation into a larger space."""
    random = np.random.default_rng(seed).standard_normal((dim, dim))
    return np.linalg.qr(random)[0][:, : len(COLORS)].astype(np.float32)


class TurnedEncoder(ColorEncoder):
    """Rows are those of `ColorEncoder`, turned into a space of `dim` axes. Counts what it encodes."""

    def __init__(self, *, dim: int = 12, name: str = "turned", size: int = 24, stop_after: int | None = None):
        super().__init__(size=size, name=name)
        self._turn, self._stop_after = turn(dim), stop_after
        self.identity = ModelIdentity(name, name.encode().hex(), self.preprocessing.digest(), dim)
        self.images = self.texts = 0

    @property
    def dim(self):
        return len(self._turn)

    def _turned(self, rows):
        return normalise(rows @ self._turn.T) if len(rows) else np.empty((0, self.dim), np.float32)

    def encode_texts(self, texts, *, batch_size=64):
        self.texts += len(texts)
        return self._turned(self.of_colors().encode_texts(texts))

    def encode_images(self, images, *, batch_size=32):
        return self._turned(self.of_colors().encode_images(images))

    def encode_pixels(self, pixels, *, batch_size=32):
        if self._stop_after is not None and self.images >= self._stop_after:
            raise KeyboardInterrupt
        self.images += len(pixels)
        rows, ok = self.of_colors().encode_pixels(pixels)
        return self._turned(rows), ok

    def of_colors(self):
        return ColorEncoder(size=self.preprocessing.size)


class JoiningEncoder(TurnedEncoder):
    """One that joins pictures and texts: the sum of both, as a unit row."""

    joins_items = True

    def item_rows(self, images, texts, *, has_image, has_text):
        return normalise(images * has_image[:, None] + texts * has_text[:, None])


class JoiningColors(ColorEncoder):
    """`ColorEncoder` with the same way to join."""

    joins_items = True
    item_rows = JoiningEncoder.item_rows


def paint(path: Path, colour, *, size=(24, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, tuple(int(c) for c in colour)).save(path)
    return path


def shades(folder: Path, count: int, *, seed: int = 0) -> list[Path]:
    """Pictures of random colours, one colour each."""
    colours = np.random.default_rng(seed).integers(0, 256, (count, 3))
    return [paint(folder / f"{i:04d}.png", colour) for i, colour in enumerate(colours)]


def photos(folder: Path) -> list[Path]:
    """A picture of each named colour, named after it."""
    return [paint(folder / f"{name}.png", rgb) for name, rgb in COLORS.items()]


def captioned(folder: Path) -> list[Source]:
    """Those pictures as rows of a table, each with two captions and an id of its own, and a row of text alone."""
    rows = [
        Source("/table.csv", path.stem, str(path), None, (f"a {path.stem} thing", f"so {path.stem}"), {"n": i})
        for i, path in enumerate(photos(folder))
    ]
    return [*rows, Source("/table.csv", "words", None, None, ("green words",), {"id": "the-words"})]


def make_index(path: Path, sources, *, encoder=None, **options) -> Path:
    """An index of `sources` by `ColorEncoder`."""
    build(sources, path, encoder=encoder or ColorEncoder(), workers=1, **options)
    return path
