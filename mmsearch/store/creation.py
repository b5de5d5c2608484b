"""How an index comes into being, and what a creation that was killed leaves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mmsearch.errors import IndexDamagedError, StoreError
from mmsearch.store.disk import Disk, sqlite_guard
from mmsearch.store.lock import LOCK_NAME, NOTE_NAME
from mmsearch.store.manifest import FORMAT, MANIFEST_NAME, made_by
from mmsearch.store.sqlite import (
    APPLICATION_ID,
    ITEMS_NAME,
    SCHEMA,
    encode_json,
    is_unfinished,
    write_meta,
    writer_connection,
)
from mmsearch.store.vectors import FIRST_NAME
from mmsearch.store.writer import now
from mmsearch.types import ModelIdentity, Preprocessing

_HALF_MADE = {LOCK_NAME, NOTE_NAME, FIRST_NAME, *(ITEMS_NAME + end for end in ("", "-wal", "-shm", "-journal"))}


def exists(path: str) -> bool:
    """Whether there is an index at `path` (also a damaged one). A creation that was killed is none."""
    if os.path.exists(os.path.join(path, MANIFEST_NAME)):
        return True
    try:
        return not is_unfinished(os.path.join(path, ITEMS_NAME))
    except IndexDamagedError:
        return True


def first_facts(model: ModelIdentity, preprocessing: Preprocessing, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `meta` says of a new index."""
    return {
        "generation": 0,
        "rows": 0,
        "dim": model.dim,
        "vectors": FIRST_NAME,
        "model": encode_json(asdict(model)),
        "preprocessing": encode_json(asdict(preprocessing)),
        "settings": encode_json(dict(settings)),
        "made_by": made_by(),
        "created_at": now(),
        "updated_at": now(),
    }


def clear_half_made(path: str, disk: Disk) -> None:
    """Make room for a new index: only what a killed creation left is removed; anything else is refused."""
    if exists(path):
        raise StoreError(path, expected="no index", got="one", do="Open it, or choose another place.")
    foreign = sorted(set(os.listdir(path)) - _HALF_MADE)
    if foreign:
        raise StoreError(
            path, expected="an empty folder", got=f"one that holds {foreign[0]!r}", do="Choose another place."
        )
    for name in sorted(_HALF_MADE - {LOCK_NAME, NOTE_NAME}):
        disk.remove(os.path.join(path, name))


def make_files(path: str, disk: Disk, facts: Mapping[str, Any]) -> None:
    """An empty vector file, and the database in one transaction; from that moment there is an index."""
    items = os.path.join(path, ITEMS_NAME)
    disk.append(os.path.join(path, FIRST_NAME), [], at=0)
    connection = writer_connection(items)
    try:
        with sqlite_guard(items):
            connection.execute("BEGIN IMMEDIATE")
            for statement in SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {FORMAT}")
            write_meta(connection, facts)
            disk.sync_dir(path)
            disk.commit(connection, items)
    finally:
        connection.close()
