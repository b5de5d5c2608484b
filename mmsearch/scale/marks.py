"""The mark that a push leaves in a collection: which indexes it mirrors, at which generation, and whether all was sent.

Decisions:
- A collection in shards has a mark in each. They are judged together: a push may have been killed between two of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mmsearch.store.snapshot import DirectorySnapshot
from mmsearch.where import storable


def mark_of(paths: Sequence[str], snapshots: Sequence[DirectorySnapshot]) -> dict[str, Any]:
    """Which indexes at which generation, as the collection remembers it."""
    facts = [
        [storable(path), snapshot.meta.get("created_at"), snapshot.meta.get("updated_at"), snapshot.generation]
        for path, snapshot in zip(paths, snapshots, strict=True)
    ]
    return {"indexes": facts, "whole": True}


def unfinished(mark: dict[str, Any]) -> str:
    """The mark of a push that is under way."""
    return json.dumps({**mark, "whole": False})


def read_mark(text: str) -> dict[str, Any]:
    """A mark, {} for one that cannot be read."""
    try:
        read = json.loads(text) if text else {}
    except ValueError:
        return {}
    named = read.get("indexes", []) if isinstance(read, dict) else None
    readable = isinstance(named, list) and all(isinstance(one, list) and len(one) == 4 for one in named)
    return read if readable else {}


def common_mark(marks: Sequence[str]) -> str:
    """What marks of several shards say together: where they differ, an unfinished push if all name the same indexes."""
    if len(set(marks)) == 1:
        return marks[0]
    read = [read_mark(mark) for mark in marks]
    named = {json.dumps([one[:2] for one in mark.get("indexes", [])]) for mark in read}
    return unfinished(read[0]) if len(named) == 1 and read[0].get("indexes") else ""
