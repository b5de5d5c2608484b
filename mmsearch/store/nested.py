"""The folder `reindex/` of an index: the index of the same items by another model, while it is being made.

Decisions:
- It is a whole index directory of its own, so that each of its batches is one durable commit, and `verify` reads it.
- It is taken away by one rename and then file by file: killed in between, what is left is no index any more.
- One whose model is the index's own has served its purpose (or was overtaken): whoever writes next removes it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from mmsearch.errors import MmsearchError
from mmsearch.store.base import ItemState
from mmsearch.store.disk import Disk, os_fault, sqlite_guard
from mmsearch.store.manifest import MANIFEST_NAME
from mmsearch.store.sqlite import ITEMS_NAME, ReaderConnection, is_unfinished, read_meta
from mmsearch.types import ModelIdentity

FOLDER = "reindex"
LEAVING = "reindex.gone"
"""What the folder is called while it is being removed."""
REPAIR = "Run 'mmsearch reindex' with the same model again: what is damaged is encoded anew; --abort gives it up."


@dataclass(frozen=True, slots=True)
class Nested:
    """What is known of a reindexing that has begun: the new model, its items and its committed rows so far."""

    model: ModelIdentity
    items: int
    rows: int


def folder_of(index: str) -> str:
    """Where the nested index of the index at `index` is, or would be."""
    return os.path.join(index, FOLDER)


def is_there(index: str) -> bool:
    """Whether a reindexing of the index at `index` has begun; a creation that was killed is none."""
    folder = folder_of(index)
    if not os.path.isdir(folder):
        return False
    if os.path.exists(os.path.join(folder, MANIFEST_NAME)):
        return True
    try:
        return not is_unfinished(os.path.join(folder, ITEMS_NAME))
    except MmsearchError:
        return True  # something is there, if damaged


def look(index: str) -> Nested | None:
    """What the nested index holds; None where there is none, or none that can be read (`verify` says why)."""
    if not is_there(index):
        return None
    items = os.path.join(folder_of(index), ITEMS_NAME)
    try:
        reader = ReaderConnection(items)
    except MmsearchError:
        return None
    try:
        with sqlite_guard(items):
            meta = read_meta(reader.db)
            count = reader.db.execute("SELECT count(*) FROM items WHERE state = ?", (ItemState.OK,)).fetchone()[0]
        return Nested(ModelIdentity(**json.loads(meta["model"])), int(count), int(meta["rows"]))
    except (MmsearchError, KeyError, ValueError, TypeError, RecursionError):
        return None
    finally:
        reader.close()


def tidy(index: str, model: str, disk: Disk) -> None:
    """Remove what a removal left, and a nested index of the index's own model; `model` as `meta` has it (JSON).

    For the one writer of the index.
    """
    remove_tree(os.path.join(index, LEAVING), disk)
    if os.path.isdir(folder_of(index)):
        found = look(index)
        if found is not None and found.model.same_space(ModelIdentity(**json.loads(model))):
            discard(index, disk)


def discard(index: str, disk: Disk) -> bool:
    """Remove the nested index of an index, whatever its state; whether there was one. For the one writer."""
    folder, leaving = folder_of(index), os.path.join(index, LEAVING)
    remove_tree(leaving, disk)
    if not os.path.isdir(folder):
        return False
    try:
        disk.step("rename_dir", leaving)
        os.rename(folder, leaving)
    except OSError as error:
        raise os_fault(error, folder) from error
    disk.sync_dir(index)
    remove_tree(leaving, disk)
    return True


def remove_tree(folder: str, disk: Disk) -> None:
    """Remove a folder and all that is in it, if it is there. Links are removed, not followed."""
    if os.path.islink(folder):
        disk.remove(folder)
    for inner, folders, files in os.walk(folder, topdown=False):
        for name in files + [name for name in folders if os.path.islink(os.path.join(inner, name))]:
            disk.remove(os.path.join(inner, name))
        try:
            disk.step("remove_dir", inner)
            os.rmdir(inner)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise os_fault(error, inner) from error
