"""Captions and metadata from outside, made fit to be stored: valid text, valid JSON, side-cars.

Decisions:
- Half a surrogate pair and NUL cannot be stored or tokenised; they become U+FFFD and a space.
- NaN and infinity are no JSON and become null; values JSON does not know become their text.
- A side-car is joined by stem (a.jpg, a.txt, a.json). A broken one is reported and costs the texts only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

from mmsearch.data.reading import read_file
from mmsearch.errors import ImageError
from mmsearch.types import Skipped, SkipReason

OnSkip: TypeAlias = Callable[[Skipped], None]

CAPTION_KEYS = ("caption", "captions", "title", "text")
SIDECAR_EXTENSIONS = (".txt", ".json")

MAX_SIDECAR_BYTES = 1 << 20
"""The largest side-car that is read."""
_MAX_DEPTH = 32


def clean(text: str) -> str:
    """Valid Unicode without NUL, white space trimmed."""
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode("utf-8")
    return text.replace("\0", " ").strip()


def captions_in(value: object) -> tuple[str, ...]:
    """The captions that a value holds: one text, or a list of texts; empty ones are dropped."""
    if isinstance(value, str):
        return (text,) if (text := clean(value)) else ()
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(text for v in values if isinstance(v, str) and (text := clean(v)))


def unique(captions: tuple[str, ...]) -> tuple[str, ...]:
    """Each caption once, in order."""
    return tuple(dict.fromkeys(captions))


def json_value(value: object, depth: int = 0) -> object:
    """`value` as JSON knows it (see the decisions above); bytes and what nests too deep become None."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return clean(value)
    if depth >= _MAX_DEPTH or isinstance(value, bytes | bytearray):
        return None
    if isinstance(value, Mapping):
        return {clean(str(k)): json_value(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(v, depth + 1) for v in value]
    return value.isoformat() if hasattr(value, "isoformat") else clean(str(value))


def parse_json(text: str | bytes) -> object:
    """Parsed JSON; `ValueError` for anything that is none, also for nesting beyond reason."""
    try:
        parsed: object = json.loads(text)
        return parsed
    except RecursionError:
        raise ValueError("nested too deep") from None


def split_texts(entries: Mapping[str, object]) -> tuple[tuple[str, ...], dict[str, object]]:
    """(captions, metadata) of a mapping: the keys in `CAPTION_KEYS` and the rest."""
    captions: tuple[str, ...] = ()
    metadata: dict[str, object] = {}
    for key, value in entries.items():
        if key.lower() in CAPTION_KEYS:
            captions += captions_in(value)
        else:
            metadata[clean(key)] = json_value(value)
    return unique(captions), metadata


def _read(path: str) -> bytes:
    return read_file(path, max_bytes=MAX_SIDECAR_BYTES)[0]


def read_sidecars(
    stem: str, found: frozenset[str] | set[str], on_skip: OnSkip, *, read: Callable[[str], bytes] = _read
) -> tuple[tuple[str, ...], dict[str, object]]:
    """(captions, metadata) of the side-cars of `stem` (a path without ending) whose endings are in `found`.

    `read`: path -> bytes, where they are not local files; raises `ImageError` as `read_file` does.
    """
    captions: tuple[str, ...] = ()
    metadata: dict[str, object] = {}
    for extension in sorted(found, reverse=True):  # .txt before .json
        path = stem + extension
        try:
            data = read(path)
            if extension.lower() == ".txt":
                captions += captions_in(decoded(data).splitlines())
                continue
            entries = parse_json(decoded(data))
            if not isinstance(entries, dict):
                raise ValueError("not an object")
            more, metadata = split_texts(entries)
            captions += more
        except ImageError as error:
            if error.reason != SkipReason.EMPTY:
                on_skip(Skipped(path, SkipReason(error.reason), error.detail))
        except ValueError as error:
            on_skip(Skipped(path, SkipReason.BAD_ROW, f"side-car: {error}"))
    return unique(captions), metadata


def decoded(data: bytes) -> str:
    """The text of a file: UTF-16 where a mark says so, else UTF-8; what is neither becomes U+FFFD."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace")
    return data.decode("utf-8-sig", "replace")
