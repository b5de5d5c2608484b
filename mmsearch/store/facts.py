"""What is in an index, for people and programs: the facts that `mmsearch info` shows."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from mmsearch.store import bridge_file, nested
from mmsearch.store.base import ItemState
from mmsearch.store.check import live_items
from mmsearch.store.manifest import FORMAT, preprocessing_from
from mmsearch.store.snapshot import DirectorySnapshot
from mmsearch.store.tokens import TokenStore


def facts_of(path: str, snapshot: DirectorySnapshot) -> dict[str, Any]:
    """JSON values, sizes in bytes; `path` is the index directory."""
    roots = snapshot.execute(
        "SELECT root, count(*), min(path), max(path) FROM items WHERE state = ? GROUP BY root", (ItemState.OK,)
    )
    derived = {} if snapshot.manifest is None else snapshot.manifest.derived
    meta = snapshot.meta
    with TokenStore.open(path, identity=None) as tokens:
        patch_tokens = {"pictures": tokens.count, "bytes": tokens.bytes}
    return {
        "path": path,
        "format": FORMAT,
        "made_by": meta.get("made_by"),
        "created_at": meta.get("created_at"),
        "updated_at": meta.get("updated_at"),
        "generation": snapshot.generation,
        "model": asdict(snapshot.model),
        "preprocessing": asdict(preprocessing_from(snapshot.fact("preprocessing"))),
        "settings": dict(snapshot.fact("settings")),
        "vectors": {"file": snapshot.vectors_name, "rows": snapshot.row_count, "dim": snapshot.dim},
        **live_items(snapshot),
        "roots": {_shown_root(*row[:1], *row[2:]): row[1] for row in roots},
        "derived": {
            name: {"file": one.file, "kind": one.kind, "rows": one.count, "bytes": one.size, **one.facts}
            for name, one in derived.items()
        },
        "patch_tokens": patch_tokens,
        **_upgrade(path),
        "bytes": _sizes(path),
    }


def _upgrade(path: str) -> dict[str, Any]:
    """A reindexing that has begun, and how far it is; a bridge, and where it leads. Nothing where neither is."""
    found, ends = nested.look(path), bridge_file.ends_of(path)
    facts = {} if found is None else {"reindex": {"model": asdict(found.model), "items": found.items}}
    return facts | ({} if ends is None else {"bridge": {"model": asdict(ends[1])}})


def _shown_root(root: bytes, first: bytes | None, last: bytes | None) -> str:
    """A root's name; files that have none are shown by the folder that holds them all."""
    if root or first is None or last is None:
        return os.fsdecode(root)
    return os.fsdecode(os.path.commonpath([os.path.dirname(first), os.path.dirname(last)]))


def _sizes(path: str) -> dict[str, int]:
    sizes = {}
    for folder, _, names in os.walk(path):
        for name in names:
            full = os.path.join(folder, name)
            if os.path.isfile(full):
                sizes[os.path.relpath(full, path)] = os.path.getsize(full)
    return dict(sorted(sizes.items()))
