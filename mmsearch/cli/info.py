"""`mmsearch info`: what is in an index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import typer

from mmsearch.cli import options
from mmsearch.cli.places import chosen_indexes
from mmsearch.cli.terminal import as_json, emit, guarded, shown


@guarded()
def info(
    ctx: typer.Context,
    index: options.Indexes = None,
    partial: options.Partial = False,
    json: options.Json = False,
) -> None:
    """Show what is in an index, its model and sizes."""
    facts = ctx.obj.info(chosen_indexes(index, ctx.obj), **({"partial": True} if partial else {}))
    if json:
        emit(as_json(facts, indent=2))
        return
    if "shards" in facts:
        facts = {**facts, "shards": {path: _in_short(shard) for path, shard in facts["shards"].items()}}
    for name, value in lines(facts):
        emit(f"{name:<28} {shown(value)}".rstrip())


def _in_short(shard: Mapping[str, Any]) -> str:
    rows = shard["image_rows"] + shard["text_rows"]
    return f"{shard['items']} items, {rows} rows, generation {shard['generation']}"


def lines(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts as `model.name` and value, in the order they come; short lists on one line."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from lines(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            yield f"{prefix}{name}", ", ".join(str(entry) for entry in value)
        else:
            yield f"{prefix}{name}", "-" if value is None else str(value)
