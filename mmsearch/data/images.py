"""One picture file -> one upright 8-bit RGB picture, or one reason why not.

Decisions:
- Only the formats of `sniffing` are decoded, chosen by content; the size is checked before decoding.
- A truncated picture is an error: Pillow's option to fill the rest with grey stays off.
- Damage that decoders tolerate (JPEG) and frames that are left out are said in `ImageInfo.note`.
- `target` uses the decoder's own scaling (JPEG, 1/2, 1/4, 1/8): the smallest scale with both sides >= target.
- Pillow's global limit is left alone here; a caller that wants more than Pillow allows (about 179
  megapixels) lifts `PIL.Image.MAX_IMAGE_PIXELS`, as the decode workers do.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from mmsearch.data import jpeg
from mmsearch.data.colour import to_rgb
from mmsearch.data.packed import read_picture
from mmsearch.data.reading import MAX_BYTES
from mmsearch.data.sniffing import HEAD_BYTES, foreign_format, looks_cut, picture_format
from mmsearch.errors import ImageError, UsageError
from mmsearch.types import Pixels, Preprocessing, SkipReason


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """Size in pixels after rotation, before scaling; `taken_at` ISO 8601; `note`: what was left out."""

    width: int
    height: int
    taken_at: str | None
    format: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """`max_pixels`: width x height; `max_bytes`: size of the file."""

    max_pixels: int = 200_000_000
    max_bytes: int = MAX_BYTES


DEFAULT_LIMITS = Limits()


def kept_limits(settings: Mapping[str, Any]) -> Limits:
    """What an index was built with, from its settings: what it holds can be read again."""
    try:
        return Limits(**settings["limits"])
    except (KeyError, TypeError):
        return DEFAULT_LIMITS  # made without them, or with some of another version


_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_REDUCING_GAP = 3.0
_COUNT_FRAMES_BYTES = 8 << 20  # counting the frames of a GIF or TIFF walks the whole file
_TAKEN = re.compile(r"(\d{4})[:-](\d\d)[:-](\d\d)[ T](\d\d):(\d\d):(\d\d)")
_OFFSET = re.compile(r"[+-]\d\d:\d\d")


def open_image(
    source: bytes | str | os.PathLike[str],
    *,
    limits: Limits = DEFAULT_LIMITS,
    target: int | None = None,
    where: str = "",
) -> tuple[Image.Image, ImageInfo]:
    """The picture as upright RGB: EXIF orientation applied, first frame, alpha over white, 16-bit scaled.

    `source`: the bytes of a file, its path, or the address of one inside a larger file (`data.packed`).
    `target`: the shortest side that is needed, in pixels; a JPEG may come back smaller than it is, never with
    a side below `target` that was not below it before.
    `where` names the picture in errors. Raises `ImageError` with a `SkipReason`.
    """
    if isinstance(source, bytes):
        data = source
    else:
        where = where or os.fspath(source)
        data, _ = read_picture(os.fspath(source), max_bytes=limits.max_bytes)
    format = _allowed_format(data, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _decode(data, format, limits, target, where)
    except ImageError:
        raise
    except MemoryError:
        raise ImageError(where, reason=SkipReason.OUT_OF_MEMORY, detail=f"decoding {format}") from None
    except Image.DecompressionBombError as error:
        raise ImageError(where, reason=SkipReason.TOO_LARGE, detail=str(error)) from None
    except Exception as error:  # noqa: BLE001 - decoders raise whatever is at hand when a file is broken
        raise _failure(data, format, error, where) from None


def prepare(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    """An RGB picture as the model's input: (size, size, 3) uint8, 0..255; see `Preprocessing` for `fit`.

    Resizing is antialiased, as Pillow does it; cutting happens in the same pass. `UsageError` for an
    unknown `fit` or `interpolation`.
    """
    size, width, height = preprocessing.size, image.width, image.height
    if preprocessing.interpolation not in _RESAMPLING:
        raise UsageError("interpolation", expected=" or ".join(_RESAMPLING), got=preprocessing.interpolation)
    resample = _RESAMPLING[preprocessing.interpolation]
    if preprocessing.fit == "squash":
        box: tuple[float, float, float, float] = (0, 0, width, height)
    elif preprocessing.fit == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    elif preprocessing.fit == "pad":
        return _padded(image, preprocessing, resample)
    else:
        raise UsageError("fit", expected="squash, crop or pad", got=preprocessing.fit)
    if image.size == (size, size):
        return np.array(image)
    return np.array(image.resize((size, size), resample, box=box, reducing_gap=_REDUCING_GAP))


def _padded(image: Image.Image, preprocessing: Preprocessing, resample: Image.Resampling) -> Pixels:
    size = preprocessing.size
    scale = size / max(image.size)
    width, height = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    small = image.resize((width, height), resample, reducing_gap=_REDUCING_GAP)
    out = np.empty((size, size, 3), np.uint8)
    out[:] = np.clip(np.rint(np.asarray(preprocessing.mean) * 255), 0, 255).astype(np.uint8)
    left, top = (size - width) // 2, (size - height) // 2
    out[top : top + height, left : left + width] = np.asarray(small)
    return out


def _allowed_format(data: bytes, where: str) -> str:
    if not data:
        raise ImageError(where, reason=SkipReason.EMPTY)
    head = data[:HEAD_BYTES]
    format = picture_format(head)
    if format is not None:
        return format
    if foreign := foreign_format(head):
        markup = foreign.startswith("HTML")
        reason = SkipReason.NOT_AN_IMAGE if markup else SkipReason.UNSUPPORTED
        raise ImageError(where, reason=reason, detail=f"it is {foreign}")
    raise ImageError(where, reason=SkipReason.NOT_AN_IMAGE)


def _decode(data: bytes, format: str, limits: Limits, target: int | None, where: str) -> tuple[Image.Image, ImageInfo]:
    if format == "HEIF":
        _register_heif(where)
    names = ("JPEG", "MPO") if format == "JPEG" else (format,)
    with Image.open(io.BytesIO(data), formats=names) as image:
        width, height = image.size
        if width * height > limits.max_pixels:
            megapixels = width * height / 1e6
            detail = f"{megapixels:.0f} MP, limit {limits.max_pixels / 1e6:.0f}"
            raise ImageError(where, reason=SkipReason.TOO_LARGE, detail=detail)
        drafted = target is not None and image.draft(None, (target, target)) is not None
        image.load()
        if not drafted:  # loading a TIFF turns it
            width, height = image.size
        orientation, taken_at = _exif(image)
        rgb = to_rgb(image)
        note = _jpeg_note(image, data, target, where) if format == "JPEG" else _frames_note(image, data, format)
    if orientation in _TURN:
        rgb = rgb.transpose(_TURN[orientation])
        if orientation >= 5:
            width, height = height, width
    return rgb, ImageInfo(width, height, taken_at, format, note)


def _register_heif(where: str) -> None:
    if "HEIF" in Image.OPEN:
        return
    try:
        import pillow_heif
    except ImportError:
        detail = "HEIC needs the package pillow-heif"
        raise ImageError(where, reason=SkipReason.UNSUPPORTED, detail=detail) from None
    pillow_heif.register_heif_opener(thumbnails=False)


def _exif(image: Image.Image) -> tuple[int, str | None]:
    """Orientation 1..8 and the time the photo was taken; 1 and None where EXIF is missing or broken."""
    try:
        exif = image.getexif()
        orientation = exif.get(ExifTags.Base.Orientation, 1)
        details = exif.get_ifd(ExifTags.IFD.Exif) if ExifTags.IFD.Exif in exif else {}
        taken = _taken_at(details.get(ExifTags.Base.DateTimeOriginal), details.get(0x9011))
    except Exception:  # noqa: BLE001 - broken EXIF raises anything and must not cost the picture
        return 1, None
    return (orientation if isinstance(orientation, int) else 1), taken


def _taken_at(value: object, offset: object) -> str | None:
    found = _TAKEN.match(value) if isinstance(value, str) else None
    if found is None:
        return None
    year, month, day, hour, minute, second = map(int, found.groups())
    moment = datetime(year, month, day, hour, minute, second).isoformat()
    zone = offset.strip("\0 ") if isinstance(offset, str) else ""
    return moment + zone if _OFFSET.fullmatch(zone) else moment


def _jpeg_note(image: Image.Image, data: bytes, target: int | None, where: str) -> str:
    """What is broken in a JPEG that was decoded all the same. Further pictures in it are previews, no frames."""
    broken, end = jpeg.walk(data)
    if _corner(image) in (((128, 128),) * 3, (128, 128)):  # what libjpeg fills in where data is missing
        with Image.open(io.BytesIO(jpeg.continued(data, end)), formats=("JPEG",)) as again:
            if target is not None:
                again.draft(None, (target, target))
            if again.tobytes() != image.tobytes():
                raise ImageError(where, reason=SkipReason.TRUNCATED, detail="ends too early")
    return f"damaged: {broken}" if broken else ""


def _corner(image: Image.Image) -> object:
    width, height = image.size
    return image.crop((max(0, width - 2), max(0, height - 2), width, height)).getextrema()


def _frames_note(image: Image.Image, data: bytes, format: str) -> str:
    try:
        if format not in ("GIF", "TIFF"):
            frames = getattr(image, "n_frames", 1)
        else:  # counting goes from frame to frame, so it gets an image object of its own
            with Image.open(io.BytesIO(data), formats=(format,)) as other:
                if len(data) > _COUNT_FRAMES_BYTES:
                    return "first of several frames" if getattr(other, "is_animated", False) else ""
                frames = getattr(other, "n_frames", 1)
    except Exception:  # noqa: BLE001 - a later frame is broken; the first one is here
        return "first of several frames"
    return f"first of {frames} frames" if frames > 1 else ""


def _failure(data: bytes, format: str, error: Exception, where: str) -> ImageError:
    if format == "JPEG" and (kind := jpeg.unsupported(data)):
        return ImageError(where, reason=SkipReason.UNSUPPORTED, detail=kind)
    text = str(error).split("<_io.", maxsplit=1)[0].strip() or type(error).__name__
    if "not supported" in text or isinstance(error, NotImplementedError):
        return ImageError(where, reason=SkipReason.UNSUPPORTED, detail=text)
    cut = looks_cut(data, format) or "truncated" in text.lower()
    return ImageError(where, reason=SkipReason.TRUNCATED if cut else SkipReason.DAMAGED, detail=text)
