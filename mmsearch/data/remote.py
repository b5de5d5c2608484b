"""Pictures that lie elsewhere, named by a URI: listed, stamped and fetched through fsspec (or pyarrow's file systems).

    s3://bucket/photos          all pictures below, folder by folder, sorted by the bytes of their names
    s3://bucket/photos/a.jpg    this picture

Decisions:
- Only the schemes of `SCHEMES` are fetched. http is none of them: a table from a stranger must not make this program
  ask addresses of a private network.
- `file://` is another way to write a local path, and becomes one.
- A stamp is size and time of the last change; the store's own mark (etag, md5, generation) stands where a local file
  has its ctime, so that a change of content within the same second is seen.
- The stamp of the listing is kept for bytes of the listed size: should they be newer, the next scan sees a change.
- A scheme without its fsspec package is tried with pyarrow, which brings S3, Google Cloud Storage and HDFS itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import unquote, urlsplit

import xxhash

from mmsearch.data.folder import Rules, is_picture_name
from mmsearch.data.reading import MAX_BYTES
from mmsearch.data.texts import MAX_SIDECAR_BYTES, SIDECAR_EXTENSIONS, OnSkip, read_sidecars
from mmsearch.errors import ImageError, InputError, MissingExtraError
from mmsearch.types import Skipped, SkipReason, Source, Stamp

SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hdfs", "memory")
"""What is fetched. `memory` is fsspec's, within this process."""

_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://", re.ASCII)
_ATTEMPTS = 3
_MARKS = ("ETag", "etag", "md5Hash", "content_md5", "generation", "checksum")
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "created")


def scheme_of(path: str) -> str | None:
    """ "s3" for s3://bucket/a.jpg; None for a local path."""
    found = _URI.match(path)
    return found[1].lower() if found else None


def is_uri(path: str) -> bool:
    """Whether a path names something that is to be fetched; False for local paths and `file://`."""
    return scheme_of(path) in SCHEMES


def local_path(path: str) -> str:
    """`file:///a/b` as /a/b; anything else as it is."""
    return unquote(urlsplit(path).path) if scheme_of(path) in ("file", "local") else path


def check_scheme(path: str) -> None:
    """`InputError` for a URI of a scheme that is not fetched."""
    scheme = scheme_of(path)
    if scheme is not None and scheme not in (*SCHEMES, "file", "local"):
        raise InputError(path, expected="/".join(SCHEMES) + "/file", got=f"{scheme}://", do="Download it first.")


def is_there(path: str) -> bool:
    """Whether a picture, local or not, is still where it was. True where that cannot be found out."""
    if not is_uri(path):
        return os.path.lexists(path)
    try:
        place = _place(path)
        return bool(place.fs.exists(place.root))
    except Exception:  # noqa: BLE001 - file systems of all kinds; not being reachable is not being gone
        return True


def may_be_shown(path: str) -> bool:
    """Whether a search may show a picture: a local one is there; the network is not asked at every query."""
    return is_uri(path) or os.path.lexists(path)


def read_uri(uri: str, *, max_bytes: int = MAX_BYTES, stamp: Stamp | None = None) -> tuple[bytes, Stamp]:
    """All bytes of a picture, with the stamp they had; `stamp`: that of a listing, which saves one request.

    Raises `ImageError` with EMPTY, TOO_LARGE, VANISHED, UNREADABLE or CHANGING, as `data.reading.read_file`.
    """
    try:
        place = _place(uri)
        for _ in range(_ATTEMPTS):
            stamp = stamp or _stamp(place.fs.info(place.root))
            if stamp.size == 0:
                raise ImageError(uri, reason=SkipReason.EMPTY)
            if stamp.size > max_bytes:
                detail = f"{stamp.size} bytes, limit {max_bytes}"
                raise ImageError(uri, reason=SkipReason.TOO_LARGE, detail=detail)
            data: bytes = place.fs.cat_file(place.root)
            if len(data) == stamp.size:
                return data, stamp
            place.fs.invalidate_cache()
            stamp = None
    except (ImageError, MissingExtraError):
        raise
    except FileNotFoundError as error:
        raise ImageError(uri, reason=SkipReason.VANISHED, detail=_words(error)) from None
    except Exception as error:  # noqa: BLE001 - each file system raises its own
        raise ImageError(uri, reason=SkipReason.UNREADABLE, detail=_words(error)) from None
    raise ImageError(uri, reason=SkipReason.CHANGING, detail=f"{_ATTEMPTS} readings differ")


def list_pictures(
    uri: str, *, exclude: Sequence[str] = (), include_hidden: bool = False, on_skip: OnSkip
) -> Iterator[Source]:
    """The picture at `uri`, or all of them below it, with their side-cars' texts; name is the URI, root is "".

    Streams a folder at a time; nothing where nothing is. Folders that cannot be listed are reported. Raises
    `InputError` when `uri` cannot be reached, `MissingExtraError`.
    """
    place = _place(uri)
    place.fs.invalidate_cache()
    try:
        found = place.fs.info(place.root)
    except FileNotFoundError:
        found = {"type": "directory"}  # a bucket's prefix is no object; listing it will tell
    except Exception as error:
        raise _unreachable(uri, error) from error
    if found["type"] == "file":
        return iter([Source("", uri, uri, _stamp(found))])
    try:
        top = place.fs.ls(place.root, detail=True)
    except FileNotFoundError:
        top = []
    except Exception as error:
        raise _unreachable(uri, error) from error
    rules = Rules(tuple(exclude), include_hidden)
    return _below(place, "", top, rules, on_skip)


@dataclass(frozen=True, slots=True)
class _Place:
    """`root`: the path within `fs` that `uri` stands for."""

    fs: Any
    root: str
    uri: str

    def uri_of(self, relative: str) -> str:
        return f"{self.uri.rstrip('/')}/{relative}"


def filesystem(uri: str) -> tuple[Any, str]:
    """(a file system as fsspec has them, the path within it) of a URI; `MissingExtraError`, `InputError`."""
    if importlib.util.find_spec("fsspec") is None:
        raise MissingExtraError(uri, package="fsspec", extra="ray")
    core = importlib.import_module("fsspec.core")
    try:
        fs, root = core.url_to_fs(uri)
    except ImportError as error:
        fs, root = _by_arrow(uri, error)
    return fs, root.rstrip("/") or root


def _place(uri: str) -> _Place:
    fs, root = filesystem(uri)
    return _Place(fs, root, uri)


def _by_arrow(uri: str, error: ImportError) -> tuple[Any, str]:
    """pyarrow's own file system in the clothes of fsspec."""
    if importlib.util.find_spec("pyarrow") is None:
        raise MissingExtraError(uri, package=error.name or "pyarrow", extra="ray")
    arrow, wrapping = importlib.import_module("pyarrow.fs"), importlib.import_module("fsspec.implementations.arrow")
    try:
        fs, root = arrow.FileSystem.from_uri(uri)
    except Exception as other:  # noqa: BLE001 - ArrowInvalid for a scheme it does not know, and what else there is
        raise _unreachable(uri, other) from error
    return wrapping.ArrowFSWrapper(fs), str(root)


def _below(
    place: _Place, relative: str, entries: list[Mapping[str, Any]], rules: Rules, on_skip: OnSkip
) -> Iterator[Source]:
    """Pictures of one folder and those below it, in order of their names."""
    named = {str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]: entry for entry in entries}
    stems: dict[str, set[str]] = {}
    for name in named:
        stem, extension = os.path.splitext(name)
        if extension.lower() in SIDECAR_EXTENSIONS:
            stems.setdefault(stem, set()).add(extension)
    for name in sorted(named, key=os.fsencode):
        entry, below = named[name], f"{relative}/{name}" if relative else name
        if not name or not rules.allow(name, below):
            continue
        if entry["type"] == "directory":
            yield from _below(place, below, _listed(place, below, on_skip), rules, on_skip)
        elif is_picture_name(name):
            uri = place.uri_of(below)
            captions, metadata = _texts(place, os.path.splitext(below)[0], stems, on_skip)
            yield Source("", uri, uri, _stamp(entry), captions, metadata)


def _listed(place: _Place, relative: str, on_skip: OnSkip) -> list[Mapping[str, Any]]:
    try:
        found: list[Mapping[str, Any]] = place.fs.ls(f"{place.root}/{relative}", detail=True)
        return found
    except Exception as error:  # noqa: BLE001 - each file system raises its own
        on_skip(Skipped(place.uri_of(relative), SkipReason.UNREADABLE, _words(error)))
        return []


def _texts(
    place: _Place, stem: str, stems: Mapping[str, set[str]], on_skip: OnSkip
) -> tuple[tuple[str, ...], dict[str, object]]:
    """Captions and metadata beside a picture: one request for each side-car, none where there is none."""
    extensions = stems.get(stem.rsplit("/", 1)[-1])
    if not extensions:
        return (), {}

    def read(path: str) -> bytes:
        return read_uri(path, max_bytes=MAX_SIDECAR_BYTES)[0]

    return read_sidecars(place.uri_of(stem), extensions, on_skip, read=read)


def _stamp(info: Mapping[str, Any]) -> Stamp:
    mark = next((str(info[key]) for key in _MARKS if info.get(key)), None)
    mtime = next((ns for key in _TIMES if (ns := _nanoseconds(info.get(key))) is not None), 0)
    ctime = mtime if mark is None else xxhash.xxh3_64_intdigest(mark.encode()) >> 1
    return Stamp(int(info.get("size") or 0), mtime, ctime)


def _nanoseconds(value: object) -> int | None:
    """A time as file systems give it (a datetime, its ISO text, or seconds), to the microsecond."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return None
    if isinstance(value, datetime):
        whole = value.replace(microsecond=0).timestamp()
        return int(whole) * 1_000_000_000 + value.microsecond * 1000
    return round(value * 1_000_000) * 1000 if isinstance(value, int | float) else None


def _words(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _unreachable(uri: str, error: Exception) -> InputError:
    return InputError(uri, expected="a place that can be listed", got=_words(error), do="Check name and credentials.")
