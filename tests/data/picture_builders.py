"""Pictures, good and nasty, as bytes; each builder is small and its content is known."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image


def photo(width: int = 96, height: int = 64) -> Image.Image:
    """A smooth picture, lopsided in both directions: red grows to the right, green downwards."""
    x = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    y = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    blue = 128 + 60 * np.sin(x / 19) * np.cos(y / 23)
    return Image.fromarray(np.stack([x, y, blue], 2).astype(np.uint8))


def noisy(width: int = 320, height: int = 240, seed: int = 0) -> Image.Image:
    """A picture with detail everywhere, so that its file is long."""
    grain = np.random.default_rng(seed).normal(0, 25, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(photo(width, height)) + grain, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def jpeg(image: Image.Image | None = None, **options: object) -> bytes:
    return encoded(image or photo(), "JPEG", **{"quality": 92, **options})


def png(image: Image.Image | None = None, **options: object) -> bytes:
    return encoded(image or photo(), "PNG", **options)


def heic(image: Image.Image | None = None, **options: object) -> bytes:
    import pillow_heif

    out = io.BytesIO()
    pillow_heif.from_pillow(image or photo()).save(out, quality=90, **options)
    return out.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_bomb(side: int) -> bytes:
    """A PNG of side x side one-bit pixels, all black, in a few kilobytes."""
    row = b"\0" * (1 + (side + 7) // 8)
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def png_with(kind: bytes, body: bytes) -> bytes:
    """A good PNG with one more chunk after its header."""
    data = png()
    return data[:33] + chunk(kind, body) + data[33:]


def with_orientation(image: Image.Image, orientation: int, format: str = "JPEG", **options: object) -> bytes:
    """`image` stored so that it is upright once the EXIF orientation is applied."""
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = image if undo is None else image.transpose(undo)
    return encoded(stored, format, exif=exif.tobytes(), **options)
