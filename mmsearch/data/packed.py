"""A picture that lies inside a larger file: its address, and its bytes. An address stands wherever a path does.

    /data/shard-000.tar::1536+20480::0001.jpg            20480 bytes from byte 1536 on
    /data/train-00000.parquet::row=17::0018.jpg          the picture of row 17, counted from 0

Decisions:
- Nothing is ever unpacked, so no name in an archive can become a place on the disk. The name in an address is for
  people; what counts is where the bytes are.
- Bytes in a tar are taken only if the header before them still speaks of a file of that name and size: a shard that
  was written anew gives an error, not another picture.
- A file whose whole name looks like an address is that file.
- Parquet is read a row group at a time, as it is written; the last one is kept, for those who read in order.
"""

from __future__ import annotations

import os
import re
import tarfile
from dataclasses import dataclass

from mmsearch.data.reading import MAX_BYTES, read_file, skip_reason, stamp_of
from mmsearch.data.remote import is_uri, read_uri
from mmsearch.errors import ImageError
from mmsearch.types import SkipReason, Stamp

_ADDRESS = re.compile(
    r"(?P<file>.+?\.(?:tar|arrow|parquet))::(?:(?P<offset>\d{1,18})\+(?P<size>\d{1,18})|row=(?P<row>\d{1,18}))::(?P<name>.*)",
    re.DOTALL | re.IGNORECASE,
)
_HEADER = tarfile.BLOCKSIZE
_LONG = 100  # bytes of a name that fit into the header itself


@dataclass(frozen=True, slots=True)
class Packed:
    """`size` bytes from byte `offset` of `file` on, or (both None) the picture of a Parquet file's `row`."""

    file: str
    name: str
    offset: int | None = None
    size: int | None = None
    row: int | None = None

    @property
    def address(self) -> str:
        """As text; `packed` reads it back."""
        where = f"row={self.row}" if self.offset is None else f"{self.offset}+{self.size}"
        return f"{self.file}::{where}::{self.name}"


def packed(path: str) -> Packed | None:
    """What an address says; None for the path of a file."""
    found = _ADDRESS.fullmatch(path)
    if found is None or os.path.lexists(path):
        return None
    offset, size, row = (None if found[part] is None else int(found[part]) for part in ("offset", "size", "row"))
    return Packed(found["file"], found["name"], offset, size, row)


def read_picture(path: str, *, max_bytes: int = MAX_BYTES) -> tuple[bytes, Stamp]:
    """The bytes of a picture by its path, its address or its URI, and the stamp of the file that they are in.

    Raises `ImageError` as `data.reading.read_file`; CHANGING where a shard is not the one that was listed.
    """
    if is_uri(path):
        return read_uri(path, max_bytes=max_bytes)
    place = packed(path)
    if place is None:
        return read_file(path, max_bytes=max_bytes)
    try:
        stamp = stamp_of(os.stat(place.file))
        data = _read_row(place) if place.row is not None else _read_span(place, path, max_bytes=max_bytes)
    except OSError as error:
        raise ImageError(path, reason=skip_reason(error), detail=error.strerror or str(error)) from None
    if not data:
        raise ImageError(path, reason=SkipReason.EMPTY)
    if len(data) > max_bytes:
        raise _too_large(path, len(data), max_bytes)
    return data, stamp


def _read_span(place: Packed, path: str, *, max_bytes: int) -> bytes:
    offset, size = place.offset or 0, place.size or 0
    if size > max_bytes:
        raise _too_large(path, size, max_bytes)
    is_tar = place.file.lower().endswith(".tar")
    with open(place.file, "rb", buffering=0) as file:
        lead = _HEADER if is_tar else 0
        data = _read_at(file.fileno(), max(0, offset - lead), size + lead)
    if len(data) < size + lead:
        raise ImageError(path, reason=SkipReason.TRUNCATED, detail=f"{os.path.basename(place.file)} ends before it")
    if is_tar and not _is_header_of(data[:_HEADER], place):
        detail = f"{os.path.basename(place.file)} was written anew since it was listed"
        raise ImageError(path, reason=SkipReason.CHANGING, detail=detail)
    return data[lead:]


def _read_at(descriptor: int, offset: int, size: int) -> bytes:
    parts = []
    while size > 0 and (part := os.pread(descriptor, size, offset)):
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _is_header_of(block: bytes, place: Packed) -> bool:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    name = place.name.encode("utf-8", "surrogateescape")
    plain = name.isascii() and len(name) < _LONG  # other names stand in a block before, this one has a stump of it
    return header.size == place.size and (not plain or header.name == place.name)


def _read_row(place: Packed) -> bytes:
    from mmsearch.data.parquet import picture_bytes

    return picture_bytes(place.file, place.row or 0)


def _too_large(path: str, size: int, limit: int) -> ImageError:
    return ImageError(path, reason=SkipReason.TOO_LARGE, detail=f"{size} bytes, limit {limit}")
