"""`mmsearch split`: one index into several that are searched as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmsearch.cli import options
from mmsearch.cli.merge import RESUME, tell
from mmsearch.cli.progress import Bar
from mmsearch.cli.terminal import guarded


@guarded(interrupted=RESUME)
def split(
    ctx: typer.Context,
    index: Annotated[str, typer.Argument(metavar="INDEX", help="An index directory.")],
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="The folder that the shards go into.")],
    shards: Annotated[
        int | None, typer.Option("--shards", min=1, metavar="N", help="So many, each item where its id says.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, metavar="N", help="As many as it takes, of so many rows at most.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Make shards of an index; nothing is encoded again."""
    with Bar("splitting", unit="items") as bar:
        done = ctx.obj.split(index, Path(out), shards=shards, rows=rows, progress=bar)
    tell(done, json=json)
