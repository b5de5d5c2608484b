"""Whatever the user names (folders, pictures, tables) as one stream of items.

Decisions:
- Each picture file is listed once, also when the named paths overlap or link to each other.
- In a folder only names of pictures count, and other files are none of our business; a file that the user
  names is either used or reported.
- A named picture belongs to the root that is its folder; a row belongs to the root that is its table.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence

from mmsearch.data import formats
from mmsearch.data.folder import Rules, Walk, is_picture_name
from mmsearch.data.reading import skip_reason
from mmsearch.data.records import sources
from mmsearch.data.sniffing import HEAD_BYTES, PICTURE_EXTENSIONS, picture_format
from mmsearch.data.texts import SIDECAR_EXTENSIONS, OnSkip
from mmsearch.errors import InputError
from mmsearch.types import Skipped, SkipReason, Source


def read_collection(
    paths: Sequence[str],
    *,
    exclude: Sequence[str] = (),
    include_hidden: bool = False,
    follow_symlinks: bool = True,
    on_skip: OnSkip,
    format: str | None = None,
) -> Iterator[Source]:
    """The items of all `paths`, in their order; below a folder sorted by the bytes of the names. Streams.

    `exclude`: globs of names, or of paths below a folder. `format`: that of all files named, where their ending
    does not tell. Texts beside a picture with its stem (a.txt, a.json) become its captions and metadata.
    `on_skip` hears of everything that is left out, folders that cannot be listed among it.
    Raises `InputError` for a path that is not there or a table that is none.
    """
    absolute = [os.path.abspath(path) for path in paths]
    modes = [_mode(path) for path in absolute]
    folders = [path for path, mode in zip(absolute, modes, strict=True) if stat.S_ISDIR(mode)]
    rules = Rules(tuple(exclude), include_hidden, follow_symlinks)
    return _stream(absolute, Walk(rules, on_skip, folders), on_skip, format)


def is_table(path: str) -> bool:
    """Whether a file that was named itself is read as a table of pictures and texts."""
    return not os.path.isdir(path) and formats.sniff(path) is not None and not _is_sidecar(path)


def _stream(paths: Sequence[str], walk: Walk, on_skip: OnSkip, format: str | None) -> Iterator[Source]:
    named: set[str] = set()
    for path in paths:
        if path in named:
            continue
        named.add(path)
        if path in walk.roots:
            yield from walk.folder(path)
        elif table := format or formats.sniff(path):
            if format or not _is_sidecar(path):
                records, finder = formats.open_table(path, format=table, on_skip=on_skip)
                yield from sources(path, records, finder=finder, on_skip=on_skip)
        elif (source := _picture(path, walk, on_skip)) is not None:
            yield source


def _mode(path: str) -> int:
    try:
        return os.stat(path).st_mode
    except OSError as error:
        if os.path.islink(path):
            return 0  # reported when its turn comes
        got = "no such path" if skip_reason(error) is SkipReason.VANISHED else error.strerror or str(error)
        raise InputError(path, expected="a folder, a picture, or a table", got=got, do="Check the path.") from None
    except ValueError as error:
        raise InputError(path, expected="a path", got=str(error)) from None


def _picture(path: str, walk: Walk, on_skip: OnSkip) -> Source | None:
    """A picture that was named itself; None when it is none (then reported) or comes with a folder."""
    root, name = os.path.split(path)
    if walk.reaches(os.path.join(os.path.realpath(root), name)) and is_picture_name(name):
        return None
    if not is_picture_name(name) and not _is_sidecar(path) and not _begins_like_picture(path):
        extension = os.path.splitext(name)[1] or "no ending"
        on_skip(Skipped(path, SkipReason.UNSUPPORTED, f"{extension}: neither picture nor table"))
        return None
    if _is_sidecar(path):
        return None
    stem = os.path.splitext(path)[0]
    return walk.source(root, name, {e for e in SIDECAR_EXTENSIONS if os.path.exists(stem + e)})


def _is_sidecar(path: str) -> bool:
    """Whether this is the .txt or .json that belongs to a picture beside it."""
    stem, extension = os.path.splitext(path)
    if extension.lower() not in SIDECAR_EXTENSIONS:
        return False
    endings = (*PICTURE_EXTENSIONS, *(ending.upper() for ending in PICTURE_EXTENSIONS))
    return any(os.path.exists(stem + ending) for ending in endings)


def _begins_like_picture(path: str) -> bool:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return True  # reported for what it is
        with open(path, "rb") as file:
            return picture_format(file.read(HEAD_BYTES)) is not None
    except OSError:
        return True
