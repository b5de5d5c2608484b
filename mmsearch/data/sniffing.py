"""What a file is, by its first bytes: the allow-list of picture formats, and names for what is refused.

Decisions:
- The name of a file decides nothing here: a PostScript file called .jpg must not reach an interpreter.
- Formats outside the list are refused even where Pillow could read them: each is attack surface.
"""

from __future__ import annotations

import re
import struct

PICTURE_EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"}
    | {".heic", ".heics", ".heif", ".hif", ".avif"}
)
"""Endings, in lower case, that make a file in a folder a candidate."""

HEAD_BYTES = 512

_AVIF = {b"avif", b"avis"}
_HEIF = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_FOREIGN = (
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"%PDF", "PDF"),
    (b"8BPS", "Photoshop"),
    (b"SIMPLE  =", "FITS"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "gzip data"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\x1aE\xdf\xa3", "a Matroska video"),
    (b"\0\0\x01\0", "an icon"),
    (b"\xd7\xcd\xc6\x9a", "a Windows metafile"),
)
_MARKUP = re.compile(rb"\A(?:\xef\xbb\xbf)?\s*<(?:(?P<svg>svg)|!doctype|html|\?xml|head|body)", re.I)


def picture_format(head: bytes) -> str | None:
    """Pillow's name of the allowed format that `head` (the first 32 bytes or more) begins, or None."""
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if head[:4] in _TIFF:
        return "TIFF"
    if head[:2] == b"BM" and len(head) >= 18 and head[14:18] in _BMP_HEADERS:
        return "BMP"
    if head[4:8] == b"ftyp":
        return _iso_format(head)
    return None


_BMP_HEADERS = {struct.pack("<I", size) for size in (12, 16, 40, 52, 56, 64, 108, 124)}


def foreign_format(head: bytes) -> str:
    """What a file that is no allowed picture seems to be, in words; "" when there is no telling."""
    for magic, name in _FOREIGN:
        if head.startswith(magic):
            return name
    if found := _MARKUP.match(head):
        return "SVG" if found["svg"] else "HTML or XML"
    if head[4:8] == b"ftyp":
        return "a video or an unknown ISO media file"
    return ""


def looks_cut(data: bytes, format: str) -> bool:
    """True when the file's own lengths or end mark say that its end is missing."""
    if format == "JPEG":
        return b"\xff\xd9" not in data[-65536:]
    if format == "PNG":
        return b"IEND" not in data[-65536:]
    if format == "GIF":
        return b";" not in data[-16:]
    if format == "WEBP":
        return len(data) < 12 or struct.unpack_from("<I", data, 4)[0] + 8 > len(data)
    if format == "BMP":
        return len(data) < 26 or struct.unpack_from("<I", data, 2)[0] > len(data)
    if format in ("AVIF", "HEIF"):
        return _boxes_cut(data)
    if format == "TIFF" and len(data) >= 8 and data[2:4] in (b"*\0", b"\0*"):
        return bool(struct.unpack_from("<I" if data[:2] == b"II" else ">I", data, 4)[0] + 2 > len(data))
    return False


def _iso_format(head: bytes) -> str | None:
    end = min(max(struct.unpack_from(">I", head)[0], 16), len(head))
    brands = {head[8:12]} | {head[at : at + 4] for at in range(16, end - 3, 4)}
    if brands & _AVIF:
        return "AVIF"
    return "HEIF" if brands & _HEIF else None


def _boxes_cut(data: bytes) -> bool:
    at = 0
    while at + 8 <= len(data):
        size = int(struct.unpack_from(">I", data, at)[0])
        if size == 1 and at + 16 <= len(data):
            size = int(struct.unpack_from(">Q", data, at + 8)[0])
        if size == 0:  # to the end of the file
            return False
        at += max(size, 8)
    return at != len(data)
