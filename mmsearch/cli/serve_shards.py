"""`mmsearch serve-shards`: hold index directories in Ray, searched as one."""

from __future__ import annotations

from typing import Annotated

import typer

from mmsearch.cli import options
from mmsearch.cli.terminal import as_json, emit, guarded, plural, say
from mmsearch.errors import UsageError


@guarded()
def serve_shards(
    ctx: typer.Context,
    indexes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[INDEX]...", help="Index directories of one model, or the folder of a split one."),
    ] = None,
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="What they are searched as: ray://NAME.")
    ] = "mmsearch",
    address: Annotated[
        str, typer.Option("--address", metavar="HOST:PORT", help="The Ray cluster; auto: the one of this machine.")
    ] = "auto",
    stop: Annotated[bool, typer.Option("--stop", help="End those of this name.")] = False,
    json: options.Json = False,
) -> None:
    """Start an actor for each index in a Ray cluster; they go on until --stop."""
    if stop == bool(indexes):
        raise UsageError("serve-shards", expected="INDEX..., or --stop", got="both" if stop else "neither")
    if stop:
        say(f"{plural(ctx.obj.stop_shards(name, address=address), 'shard')} of {name} ended")
        return
    served = ctx.obj.serve_shards(indexes, name, address=address)
    say(f"{plural(len(served['shards']), 'shard')} served. Try: mmsearch query WORDS --index {served['index']}")
    if json:
        emit(as_json(served))
