"""What an index was made with, as its user set it: read although other files are damaged, and replaced."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from mmsearch.errors import IndexDamagedError, IndexNotFoundError
from mmsearch.store.creation import exists
from mmsearch.store.disk import REBUILD, sqlite_guard
from mmsearch.store.migrations import check_format
from mmsearch.store.sqlite import ITEMS_NAME, ReaderConnection, encode_json, read_meta, write_meta
from mmsearch.store.writer import Writer

PUSHED = "pushed"
"""The setting that says of which indexes an index is kept a copy, and the root of the items that came so: see
`scale.local_engine`."""


def no_index(path: str) -> IndexNotFoundError:
    """The error where no index is."""
    return IndexNotFoundError(
        path, expected="an index", got="none", do="Make one with 'mmsearch index PATH...', or name another."
    )


def no_items(path: str) -> IndexDamagedError:
    """The error for an index without its database."""
    return IndexDamagedError(os.path.join(path, ITEMS_NAME), expected="a file", got="none", do=REBUILD)


def stored_settings(path: str) -> Mapping[str, Any]:
    """See `IndexStore.stored_settings`; only items.sqlite is looked at."""
    if not exists(path):
        raise no_index(path)
    items = os.path.join(path, ITEMS_NAME)
    if not os.path.exists(items):
        raise no_items(path)
    reader = ReaderConnection(items)
    try:
        with sqlite_guard(items):
            check_format(reader.db, items)
            meta = read_meta(reader.db)
    finally:
        reader.close()
    try:
        settings = json.loads(meta["settings"])
        if not isinstance(settings, dict):
            raise TypeError("not an object")
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise IndexDamagedError(items, got=f"settings that cannot be read ({error!r})", do=REBUILD) from error
    return settings


def note_settings(writer: Writer, settings: Mapping[str, Any]) -> None:
    """See `base.Store.note_settings`."""
    text = encode_json(dict(settings))
    if writer.facts().get("settings") != text:
        with writer.transaction() as db:
            write_meta(db, {"settings": text})
